"""README.md of an exported model: what it was made from, how, and how it measured."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxdpo import __version__
from jaxdpo.config.schema import Config
from jaxdpo.losses.registry import LOSSES
from jaxdpo.models.lora import Lora
from jaxdpo.utils.files import is_local

CARD_METRICS = ("loss", "rewards/", "logps/", "kl/", "lengths/")
"""Beginnings of the metrics that the model card shows; also with eval/ before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What the model card tells. `base_model` is a hub id (with a slash) or a plain name; `settings` and `metrics` become tables."""

    base_model: str
    adapter: bool = False
    """Whether the folder holds an adapter alone."""
    datasets: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def model_card(card: Card) -> str:
    """README.md of an exported model, with the front matter that the hub reads."""
    head: dict[str, Any] = {
        "library_name": "peft" if card.adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    head |= {"tags": ["dpo", "jaxdpo", *["lora"] * card.adapter]}
    head |= {"base_model": card.base_model} if "/" in card.base_model else {}
    rows = {
        "base model": card.base_model,
        "data": ", ".join(card.datasets),
        **card.settings,
        "jaxdpo": __version__,
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {_cell(card.base_model)}, preference-optimised",
        "",
    ]
    lines += ["A LoRA adapter: load it over its base model with PEFT.", ""] * card.adapter
    lines += [
        "Trained with jaxdpo: preference optimization in JAX and Flax.",
        "",
        *_table("Setting", "Value", rows),
        "",
    ]
    if card.metrics:
        lines += [
            "## Last metrics",
            "",
            *_table(
                "Metric", "Value", {key: f"{value:.6g}" for key, value in card.metrics.items()}
            ),
            "",
        ]
    return "\n".join(lines)


def _table(left: str, right: str, rows: Mapping[str, Any]) -> list[str]:
    cells = [(_cell(key), _cell(value)) for key, value in rows.items()]
    return [f"| {left} | {right} |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)]


def _cell(value: Any) -> str:
    text = " ".join(str(value).split()).replace("\\", "\\\\")
    for sign in "|`<*_[":
        text = text.replace(sign, "\\" + sign)
    return text


def run_card(
    config: Config,
    run_dir: Path,
    step: int,
    *,
    base: str,
    lora: Lora | None = None,
    adapter: bool = False,
) -> Card:
    """The model card of a run at a step. Of paths only the last part is told.

    Args:
        base: the model that was trained.
        lora: the adapter that was, if one was.
        adapter: whether it alone is exported.
    """
    loss = config.loss
    first = LOSSES[loss.names[0]]
    settings = {
        "loss": ", ".join(loss.names)
        if loss.weights is None
        else ", ".join(map("{} x {}".format, loss.weights, loss.names)),
        "beta": first.reward_scale(first.defaults.of(loss)),
        "steps": step,
        "pairs per step": config.train.batch_size,
        "learning rate": config.optim.learning_rate,
        "reference": config.reference,
        "seed": config.seed,
    }
    if lora is not None:
        kind = "rsLoRA" if lora.rslora else "LoRA"
        described = f"{kind}, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.names)}"
        settings |= {"adapter" if adapter else "adapter, merged": described}
        settings |= (
            {}
            if config.model.quantize == "none"
            else {"base while training": config.model.quantize}
        )
    return Card(
        base_model=_public(base),
        adapter=adapter,
        datasets=tuple(map(_public, config.data.train)),
        settings=settings,
        metrics=last_metrics(run_dir, step),
    )


def _public(name: str) -> str:
    """A hub id or dataset name as it is; of a path on this machine the last part."""
    return Path(name).expanduser().name if is_local(name) else name


def last_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """The newest value of each of CARD_METRICS in metrics.jsonl, not later than `step`; damaged lines are passed over."""
    path, found = run_dir / "metrics.jsonl", {}
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    ):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            found |= {
                key: value
                for key, value in row.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
    return {
        key: value
        for key, value in found.items()
        if key.removeprefix("eval/").startswith(CARD_METRICS)
    }
