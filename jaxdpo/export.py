"""`python -m jaxdpo.export run_dir=<run> out=<folder>`: a trained policy as a Hugging Face folder that transformers loads.

The folder is written beside its final place and renamed when it is complete, so `out` is whole or absent.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from jaxdpo import __version__, options
from jaxdpo.checkpoint import restore_params
from jaxdpo.config import STRICT_KEYS, Config, require
from jaxdpo.losses import LOSSES
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf_folder import copy_tokenizer, fetch_model, generation_config, set_chat_template, write_json
from jaxdpo.models.hfconfig import from_hf, read_config_json, to_hf
from jaxdpo.models.weights import save_params

CARD_METRICS = ("loss", "rewards/", "logps/", "kl/", "lengths/")
"""Beginnings of the metrics that the model card shows; also with eval/ before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's policy as a Hugging Face folder: weights, config, tokenizer, generation config, model card."""

    __pydantic_config__ = STRICT_KEYS

    run_dir: str
    """Folder of the run."""
    out: str
    """Folder to write. It must not exist, or be empty."""
    step: int | None = None
    """Which checkpoint. Default: the newest that is undamaged."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in the files. auto: as the model was before training, if its config.json says so, else float32."""
    max_shard_bytes: int = 5_000_000_000
    """Larger weights are split over several files, none larger than this."""

    def __post_init__(self) -> None:
        require(
            (self.step is None or self.step >= 0, f"step={self.step}: must not be negative"),
            (self.max_shard_bytes >= 1, f"max_shard_bytes={self.max_shard_bytes}: must be at least 1"),
        )


class Tokenizer(Protocol):
    """What export needs of a tokenizer object."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the tokenizer's files into a folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What the model card tells. `base_model` is a hub id (with a slash) or a plain name; `settings` and `metrics` become tables."""

    base_model: str
    datasets: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def export_model(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    card: Card,
    raw_config: Mapping[str, Any] | None = None,
    tokenizer: Path | Tokenizer | None = None,
    chat_template: str | None = None,
    dtype: str = "auto",
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Write a Hugging Face folder.

    Args:
        folder: must not exist, or be empty; appears only when complete.
        config: the model.
        params: its parameters, nested dict of jax or numpy arrays, sharded or not.
        card: what README.md tells.
        raw_config: the config.json the model came from; keys that say nothing about its computation are kept.
        tokenizer: a folder whose tokenizer files (and generation_config.json) are copied, or a tokenizer object, or none.
        chat_template: Jinja text that replaces the tokenizer's own.
        dtype: float32, bfloat16 or float16; auto: as raw_config says, else float32.
        max_shard_bytes: see `save_params`.

    Returns:
        The files, as paths within `folder`.

    Raises:
        ValueError: `folder` is not empty, or `params` do not fit `config`.
    """
    if problem := _occupied(folder):
        raise ValueError(problem)
    dtype = _source_dtype(raw_config or {}) if dtype == "auto" else dtype
    draft = folder.parent / f".{folder.name}.{os.getpid()}.exporting"
    draft.mkdir(parents=True)
    try:
        hf_config = to_hf(config, raw_config, dtype=dtype)
        write_json(draft / "config.json", hf_config)
        save_params(draft, config, params, dtype, max_shard_bytes)
        if isinstance(tokenizer, Path):
            copy_tokenizer(tokenizer, draft)
        elif tokenizer is not None:
            tokenizer.save_pretrained(str(draft))
        if chat_template is not None:
            set_chat_template(draft, chat_template)
        source = tokenizer if isinstance(tokenizer, Path) else draft
        write_json(draft / "generation_config.json", generation_config(source, hf_config))
        (draft / "README.md").write_text(model_card(card), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _occupied(folder: Path) -> str | None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return f"out={folder}: is not a folder. Name one that does not exist yet"
    if folder.exists() and any(folder.iterdir()):
        return f"out={folder}: is not empty. Name a folder that does not exist yet, or empty this one"
    return None


def _source_dtype(raw_config: Mapping[str, Any]) -> str:
    name = str(raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def model_card(card: Card) -> str:
    """README.md of an exported model, with the front matter that the hub reads."""
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dpo", "jaxdpo"]}
    head |= {"base_model": card.base_model} if "/" in card.base_model else {}
    rows = {"base model": card.base_model, "data": ", ".join(card.datasets), **card.settings, "jaxdpo": __version__}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {_cell(card.base_model)}, preference-optimised", ""]
    lines += ["Trained with jaxdpo: preference optimization in JAX and Flax.", "", *_table("Setting", "Value", rows), ""]
    if card.metrics:
        lines += ["## Last metrics", "", *_table("Metric", "Value", {key: f"{value:.6g}" for key, value in card.metrics.items()}), ""]
    return "\n".join(lines)


def _table(left: str, right: str, rows: Mapping[str, Any]) -> list[str]:
    cells = [(_cell(key), _cell(value)) for key, value in rows.items()]
    return [f"| {left} | {right} |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)]


def _cell(value: Any) -> str:
    text = " ".join(str(value).split()).replace("\\", "\\\\")
    for sign in "|`<*_[":
        text = text.replace(sign, "\\" + sign)
    return text


def read_run_config(run_dir: Path) -> Config:
    """The config that a run was started with.

    Raises:
        ValueError: it is not this version's.
    """
    path = run_dir / "config.yaml"
    config, problems = options.validate(Config, yaml.safe_load(path.read_text(encoding="utf-8")))
    if problems or config is None:
        raise ValueError(f"{path}: is not a config of this version of jaxdpo:\n" + "\n".join(f"  {line}" for line in problems))
    return config


def model_files(run_dir: Path, config: Config) -> Path:
    """The folder with config.json and tokenizer of a run: its own copy <run>/model, else where it was started from.

    Raises:
        ValueError: neither exists.
    """
    own, source = run_dir / "model", Path(config.model.path or "").expanduser()
    if (own / "config.json").is_file() or config.model.path is None:
        return own
    return source if source.is_dir() else fetch_model(config.model.path, config.model.revision)


def run_card(config: Config, run_dir: Path, step: int) -> Card:
    """The model card of a run at a step. Of paths only the last part is told."""
    loss = config.loss
    settings = {
        "loss": ", ".join(loss.names) if loss.weights is None else ", ".join(map("{} x {}".format, loss.weights, loss.names)),
        "beta": LOSSES[loss.names[0]].reward_scale(loss) if loss.beta is None else loss.beta,
        "steps": step,
        "pairs per step": config.train.pairs_per_step,
        "learning rate": config.optim.learning_rate,
        "reference": config.reference,
        "seed": config.seed,
    }
    return Card(
        base_model=_public(config.model.path or "a model made by jaxdpo"),
        datasets=tuple(map(_public, config.data.train)),
        settings=settings,
        metrics=last_metrics(run_dir, step),
    )


def _public(name: str) -> str:
    """A hub id or dataset name as it is; of a path on this machine the last part."""
    path = Path(name).expanduser()
    return path.name if path.exists() or path.is_absolute() or name.startswith(".") else name


def last_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """The newest value of each of CARD_METRICS in metrics.jsonl, not later than `step`; damaged lines are passed over."""
    path, found = run_dir / "metrics.jsonl", {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            found |= {key: value for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {key: value for key, value in found.items() if key.removeprefix("eval/").startswith(CARD_METRICS)}


def export_run(config: ExportConfig) -> list[Path]:
    """Export a run's checkpoint; returns the files written.

    Raises:
        ValueError: the run, its checkpoint or its model's files cannot be used, or `out` is not empty.
    """
    run_dir, out = Path(config.run_dir).expanduser(), Path(config.out).expanduser()
    run_config = read_run_config(run_dir)
    source = model_files(run_dir, run_config)
    raw_config = read_config_json(source)
    step, params, _ = restore_params(run_dir, config.step)
    own_template = source == run_dir / "model" or run_config.data.chat_template is None  # the run's copy has the template that it used
    template = None if own_template else Path(run_config.data.chat_template or "").expanduser().read_text(encoding="utf-8")
    return export_model(
        out,
        from_hf(raw_config),
        params,
        card=run_card(run_config, run_dir, step),
        raw_config=raw_config,
        tokenizer=source,
        chat_template=template,
        dtype=config.dtype,
        max_shard_bytes=config.max_shard_bytes,
    )


def _check(config: ExportConfig) -> list[str]:
    run_dir, occupied = Path(config.run_dir).expanduser(), _occupied(Path(config.out).expanduser())
    no_run = None if (run_dir / "config.yaml").is_file() else f"run_dir={run_dir}: has no config.yaml. Name the folder of a run"
    return [problem for problem in (no_run, occupied) if problem]


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    config, _ = options.load(ExportConfig, argv, command="export", checks=[_check])
    try:
        files = export_run(config)
    except (ValueError, OSError) as error:
        print(f"jaxdpo.export: {error}", file=sys.stderr)
        return 1
    for path in files:
        print(f"{path.stat().st_size:>15,}  {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
