"""Writing a model or an adapter as a Hugging Face folder that appears complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.config_json import to_hf
from jaxdpo.models.hf.folder import copy_tokenizer, generation_config, set_chat_template, write_json
from jaxdpo.models.hf.load_save import fetch, save_params
from jaxdpo.models.hf.model_card import Card, model_card
from jaxdpo.models.hf.peft import write_peft
from jaxdpo.models.lora import Lora


class Tokenizer(Protocol):
    """What export needs of a tokenizer object."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the tokenizer's files into a folder."""


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
    """Write a Hugging Face folder. Where the parameters are spread over several hosts, all of them call this, and process 0 writes.

    Args:
        folder: must not exist, or be empty; appears only when complete.
        config: the model.
        params: its parameters, nested dict of arrays as `save_params` takes them: on devices, on the host, or in files.
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
    dtype = source_dtype(raw_config or {}) if dtype == "auto" else dtype
    with _written_by_one(folder) as draft:
        if draft is None:
            save_params(folder, config, params, dtype)  # gathers; writes nothing
        else:
            hf_config = to_hf(config, raw_config, dtype=dtype)
            write_json(draft / "config.json", hf_config)
            save_params(draft, config, params, dtype, max_shard_bytes)
            _write_beside(draft, card, tokenizer, chat_template)
            source = tokenizer if isinstance(tokenizer, Path) else draft
            write_json(draft / "generation_config.json", generation_config(source, hf_config))
    return _files(folder)


def export_adapter(
    folder: Path,
    config: ModelConfig,
    adapter: Mapping[str, Any],
    lora: Lora,
    *,
    base: str,
    revision: str | None = None,
    card: Card,
    tokenizer: Path | Tokenizer | None = None,
    chat_template: str | None = None,
) -> list[Path]:
    """Write a folder that PEFT loads. Where the adapter is spread over several hosts, all of them call this, and process 0 writes.

    Args:
        folder: must not exist, or be empty; appears only when complete.
        config: the model that the adapter is for.
        adapter: arrays as `save_params` takes them.
        lora: what the adapter is, its weights aside.
        base: hub id or folder of the model, as adapter_config.json is to name it.
        revision: of a hub id.
        card, tokenizer, chat_template: see `export_model`.

    Returns:
        The files, as paths within `folder`.

    Raises:
        ValueError: `folder` is not empty.
    """
    with _written_by_one(folder) as draft:
        on_host = jax.tree.map(lambda array: fetch(array, ()), dict(adapter))
        if draft is not None:
            write_peft(draft, config, on_host, lora, base=base, revision=revision)
            _write_beside(draft, card, tokenizer, chat_template)
    return _files(folder)


@contextlib.contextmanager
def _written_by_one(folder: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes `folder` when it is complete and vanishes when it is not; None in processes other than 0."""
    if problem := occupied(folder):
        raise ValueError(problem)
    _meet("all have seen that there is room")
    if jax.process_index() == 0:
        draft = folder.parent / f".{folder.name}.{os.getpid()}.exporting"
        draft.mkdir(parents=True)
        try:
            yield draft
            if folder.exists():
                folder.rmdir()
            draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    else:
        yield None
    _meet("the folder is complete")


def _meet(where: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def occupied(folder: Path) -> str | None:
    """Why a folder cannot be written to as a new one; None when it can."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return f"out={folder}: is not a folder. Name one that does not exist yet"
    if folder.exists() and any(folder.iterdir()):
        return (
            f"out={folder}: is not empty. Name a folder that does not exist yet, or empty this one"
        )
    return None


def _write_beside(
    draft: Path, card: Card, tokenizer: Path | Tokenizer | None, chat_template: str | None
) -> None:
    """What lies beside the weights: tokenizer, chat template, model card."""
    if isinstance(tokenizer, Path):
        copy_tokenizer(tokenizer, draft)
    elif tokenizer is not None:
        tokenizer.save_pretrained(str(draft))
    if chat_template is not None:
        set_chat_template(draft, chat_template)
    (draft / "README.md").write_text(model_card(card), encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def source_dtype(raw_config: Mapping[str, Any]) -> str:
    """The dtype that a config.json names; float32 where it names none that an export can write."""
    name = str(raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32").removeprefix(
        "torch."
    )
    return name if name in ("float32", "bfloat16", "float16") else "float32"
