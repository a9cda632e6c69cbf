"""A finished run as others read it: its config, its model's files, and its adapter's base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.hub import fetch_model
from jaxdpo.models.hf.lora_targets import lora_of
from jaxdpo.models.hf.weight_files import weights_fingerprint
from jaxdpo.models.lora import Lora, adapter_shapes
from jaxdpo.utils.tree import named_leaves

MAX_LINES = 10
"""Differences that an error lists."""


def read_run_config(run_dir: Path) -> Config:
    """The config that a run was started with.

    Raises:
        ValueError: it is not this version's.
    """
    path = run_dir / "config.yaml"
    config, problems = cli.validate(Config, yaml.safe_load(path.read_text(encoding="utf-8")))
    if problems or config is None:
        listed = "\n".join(f"  {line}" for line in problems)
        raise ValueError(f"{path}: is not a config of this version of jaxdpo:\n{listed}")
    return config


def model_files(run_dir: Path, config: Config) -> Path:
    """The folder with config.json and tokenizer of a run.

    That is its own copy <run>/model, else the model that it was started from.

    Raises:
        ValueError: neither exists.
    """
    own, source = run_dir / "model", Path(config.model.path or "").expanduser()
    if (own / "config.json").is_file() or config.model.path is None:
        return own
    return source if source.is_dir() else fetch_model(config.model.path, config.model.revision)


def lora_of_run(config: Config, model: ModelConfig, saved: Mapping[str, Any]) -> Lora:
    """Rank, scale and targets of the adapter in a run's checkpoint.

    Args:
        saved: the adapter's weights, arrays of any kind.

    Raises:
        ValueError: the checkpoint holds something else than the adapter of the run's config.
    """
    lora = lora_of(config.lora, model)
    wanted, found = _shapes(adapter_shapes(model, lora)), _shapes(saved)
    lines = []
    for path in sorted(wanted.keys() | found.keys()):
        must, is_ = wanted.get(path, "absent"), found.get(path, "absent")
        if must != is_:
            lines.append(f"  {path}: must be {must}, is {is_}")
    if lines:
        listed = "\n".join(lines[:MAX_LINES])
        if len(lines) > MAX_LINES:
            listed += "\n  ..."
        raise ValueError(
            "the checkpoint does not hold the adapter of its config.yaml; "
            f"another version or run saved it:\n{listed}"
        )
    return lora


def _shapes(tree: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(list(leaf.shape)) for name, leaf in named_leaves(tree).items()}


def check_base(config: Config, meta: Mapping[str, Any], folder: Path) -> None:
    """Check that a folder's weights are the base that a run's adapter was trained on.

    Args:
        meta: of the run's checkpoint.

    Raises:
        ValueError: they are not, or cannot be compared.
    """
    if config.model.init == "random":
        raise ValueError(
            "model.init=random: the run's base was drawn at random and is stored nowhere, "
            "so its adapter is of no use elsewhere"
        )
    known = meta.get("identity", {}).get("weights")
    if known is None:
        raise ValueError(
            "the checkpoint does not say which base its adapter belongs to: "
            "it is of an older version. Train again to export"
        )
    now = weights_fingerprint(folder)
    if now != known:
        raise ValueError(
            f"base={folder}: has other weights than the adapter was trained on "
            f"(hash {_short(known)}, here {_short(now)}). "
            "Name the model as it was: base=<folder or hub id>"
        )


def _short(fingerprint: str) -> str:
    """Enough of a hash to compare by eye."""
    return fingerprint.split(":")[-1][:12]


def find_base(config: Config, name: str | None) -> Path:
    """The folder of the base under a run's adapter.

    Args:
        name: folder or hub id, where it is no longer what the run was started from.

    Raises:
        ValueError: it is not here and not on the hub.
    """
    wanted, revision = name, None
    if name is None:
        wanted, revision = config.model.path, config.model.revision
    wanted = wanted or ""
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        return folder
    try:
        return fetch_model(wanted, revision)
    except ValueError as error:
        raise ValueError(
            "the base under the run's adapter is missing. "
            f"Say where it is: base=<folder or hub id>. {error}"
        ) from None
