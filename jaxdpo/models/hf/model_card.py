"""README.md of an exported model: base model, data, training options and metrics."""

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
"""Beginnings of the metrics that the model card shows, also after eval/."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Contents of a model card; `settings` and `metrics` become tables."""

    base_model: str
    """A hub id (with a slash) or a plain name."""
    adapter: bool = False
    """Whether the folder is an adapter without its base model."""
    datasets: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def model_card(card: Card) -> str:
    """README.md of an exported model, with the front matter that the hub reads."""
    front: dict[str, Any] = {
        "library_name": "peft" if card.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "jaxdpo"],
    }
    if card.adapter:
        front["tags"].append("lora")
    if "/" in card.base_model:
        front["base_model"] = card.base_model
    settings = {
        "base model": card.base_model,
        "data": ", ".join(card.datasets),
        **card.settings,
        "jaxdpo": __version__,
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", ""]
    lines += [f"# {_cell(card.base_model)}, preference-optimised", ""]
    if card.adapter:
        lines += ["A LoRA adapter: load it over its base model with PEFT.", ""]
    lines += ["Trained with jaxdpo: preference optimization in JAX and Flax.", ""]
    lines += [*_table("Setting", "Value", settings), ""]
    if card.metrics:
        metrics = {key: f"{value:.6g}" for key, value in card.metrics.items()}
        lines += ["## Last metrics", "", *_table("Metric", "Value", metrics), ""]
    return "\n".join(lines)


def _table(left: str, right: str, rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {left} | {right} |", "|---|---|"]
    for key, value in rows.items():
        lines.append(f"| {_cell(key)} | {_cell(value)} |")
    return lines


def _cell(value: Any) -> str:
    """A value as one line of inert Markdown: names of data sets and models are not ours."""
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
    """The model card of a run at a step. Of local paths only the last part is shown.

    Args:
        config: the run's options.
        run_dir: its folder, for the metrics.
        step: of the checkpoint that is exported.
        base: the model that was trained.
        lora: the adapter that was trained, if one was.
        adapter: whether it is exported without its base model.
    """
    loss = config.loss
    names = list(loss.names)
    if loss.weights is not None:
        names = [f"{weight} x {name}" for weight, name in zip(loss.weights, names, strict=True)]
    first = LOSSES[loss.names[0]]
    settings: dict[str, Any] = {
        "loss": ", ".join(names),
        "beta": first.reward_scale(first.defaults.of(loss)),
        "steps": step,
        "pairs per step": config.train.batch_size,
        "learning rate": config.optim.learning_rate,
        "reference": config.reference,
        "seed": config.seed,
    }
    if lora is not None:
        kind = "rsLoRA" if lora.rslora else "LoRA"
        key = "adapter" if adapter else "adapter, merged"
        targets = ", ".join(lora.names)
        settings[key] = f"{kind}, rank {lora.rank}, alpha {lora.alpha:g}, on {targets}"
        if config.model.quantize != "none":
            settings["base while training"] = config.model.quantize
    return Card(
        base_model=_public(base),
        adapter=adapter,
        datasets=tuple(_public(name) for name in config.data.train),
        settings=settings,
        metrics=last_metrics(run_dir, step),
    )


def _public(name: str) -> str:
    """A hub id or data set name as it is; of a path on this machine the last part."""
    return Path(name).expanduser().name if is_local(name) else name


def last_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """The last value of each of CARD_METRICS in metrics.jsonl, not later than `step`.

    Lines that are not JSON (a crash can cut one) are ignored.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or row["step"] > step:
            continue
        for key, value in row.items():
            is_shown = key.removeprefix("eval/").startswith(CARD_METRICS)
            if is_shown and isinstance(value, int | float) and math.isfinite(value):
                found[key] = value
    return found
