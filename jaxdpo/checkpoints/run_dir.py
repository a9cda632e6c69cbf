"""A run folder as others read it: its config, its model's small files, and the base that its adapter belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.hub import fetch_model
from jaxdpo.models.hf.lora_targets import lora_of
from jaxdpo.models.hf.weight_files import weights_fingerprint
from jaxdpo.models.lora import Lora, adapter_shapes


def read_run_config(run_dir: Path) -> Config:
    """The config that a run was started with.

    Raises:
        ValueError: it is not this version's.
    """
    path = run_dir / "config.yaml"
    config, problems = cli.validate(Config, yaml.safe_load(path.read_text(encoding="utf-8")))
    if problems or config is None:
        raise ValueError(
            f"{path}: is not a config of this version of jaxdpo:\n"
            + "\n".join(f"  {line}" for line in problems)
        )
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


def lora_of_run(config: Config, model: ModelConfig, saved: Mapping[str, Any]) -> Lora:
    """What the adapter in a run's checkpoint is, its weights aside.

    Args:
        saved: the adapter, arrays of any kind.

    Raises:
        ValueError: the checkpoint holds something else than the adapter that the run's config names.
    """
    lora = lora_of(config.lora, model)
    shapes = [_shapes(tree) for tree in (adapter_shapes(model, lora), saved)]
    if shapes[0] != shapes[1]:
        differing = sorted(
            path
            for path in shapes[0].keys() | shapes[1].keys()
            if shapes[0].get(path) != shapes[1].get(path)
        )
        lines = [
            f"{path}: must be {_show(shapes[0].get(path))}, is {_show(shapes[1].get(path))}"
            for path in differing
        ]
        listed = "\n".join(f"  {line}" for line in lines[:10] + ["..."] * (len(lines) > 10))
        raise ValueError(
            f"the checkpoint does not hold the adapter of its config.yaml; another version or run saved it:\n{listed}"
        )
    return lora


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _show(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def check_base(config: Config, meta: Mapping[str, Any], folder: Path) -> None:
    """Make sure that a folder's weights are those that a run's adapter was trained over.

    Args:
        meta: of the run's checkpoint.

    Raises:
        ValueError: they are not, or cannot be compared.
    """
    if config.model.init == "random":
        raise ValueError(
            "model.init=random: the run's base was drawn at random and lies in no file, so its adapter is of no use elsewhere"
        )
    known = meta.get("identity", {}).get("weights")
    if known is None:
        raise ValueError(
            "the checkpoint does not say which base its adapter belongs to: it is of an older version. Train again to export"
        )
    if (now := weights_fingerprint(folder)) != known:
        raise ValueError(
            f"base={folder}: has other weights than the adapter was trained over (hash {_short(known)}, here {_short(now)}). "
            "Name the model as it was: base=<folder or hub id>"
        )


def _short(fingerprint: str) -> str:
    return fingerprint.split(":")[-1][:12]


def find_base(config: Config, name: str | None) -> Path:
    """The folder of the base under a run's adapter.

    Args:
        name: folder or hub id, where it is no longer what the run was started from.

    Raises:
        ValueError: it is not here and not on the hub.
    """
    wanted, revision = (
        (config.model.path or "", config.model.revision) if name is None else (name, None)
    )
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        return folder
    try:
        return fetch_model(wanted, revision)
    except ValueError as error:
        raise ValueError(
            f"the base under the run's adapter is missing. Say where it is: base=<folder or hub id>. {error}"
        ) from None
