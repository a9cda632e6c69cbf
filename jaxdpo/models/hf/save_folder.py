"""Saving a model or an adapter as a Hugging Face folder that appears complete or not at all."""

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
    """The part of transformers' tokenizers that export calls."""

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
    """Write a model as a Hugging Face folder.

    Where the parameters are sharded over several processes, all of them call this, and process 0
    writes.

    Args:
        folder: must not exist, or be empty; appears only when complete.
        config: the model.
        params: its parameters, nested dict of arrays as `save_params` takes them: on devices, on
            the host, or in files.
        card: contents of README.md.
        raw_config: the config.json the model came from; keys that do not describe its computation
            are copied.
        tokenizer: a folder whose tokenizer files (and generation_config.json) are copied, or a
            tokenizer object, or none.
        chat_template: Jinja text that replaces the tokenizer's own.
        dtype: float32, bfloat16 or float16; auto: as raw_config says, else float32.
        max_shard_bytes: see `save_params`.

    Returns:
        The files, as paths within `folder`.

    Raises:
        ValueError: `folder` is not empty, or `params` do not fit `config`.
    """
    if dtype == "auto":
        dtype = source_dtype(raw_config or {})
    with _complete_folder(folder) as draft:
        if draft is None:
            save_params(folder, config, params, dtype)  # takes part in gathering, writes nothing
        else:
            hf_config = to_hf(config, raw_config, dtype=dtype)
            write_json(draft / "config.json", hf_config)
            save_params(draft, config, params, dtype, max_shard_bytes)
            _write_small_files(draft, card, tokenizer, chat_template)
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
    """Write an adapter as a folder that PEFT loads.

    Where the adapter is sharded over several processes, all of them call this, and process 0
    writes.

    Args:
        folder: must not exist, or be empty; appears only when complete.
        config: the model that the adapter is for.
        adapter: arrays as `save_params` takes them.
        lora: rank, alpha and targets.
        base: hub id or folder of the model, for adapter_config.json.
        revision: of a hub id.
        card, tokenizer, chat_template: see `export_model`.

    Returns:
        The files, as paths within `folder`.

    Raises:
        ValueError: `folder` is not empty.
    """
    with _complete_folder(folder) as draft:
        on_host = jax.tree.map(lambda array: fetch(array, ()), dict(adapter))
        if draft is not None:
            write_peft(draft, config, on_host, lora, base=base, revision=revision)
            _write_small_files(draft, card, tokenizer, chat_template)
    return _files(folder)


@contextlib.contextmanager
def _complete_folder(folder: Path) -> Iterator[Path | None]:
    """A draft folder to fill, renamed to `folder` at the end and removed on an error.

    Processes other than 0 get None.
    """
    if problem := occupied(folder):
        raise ValueError(problem)
    _barrier("no process found the folder occupied")
    if jax.process_index() == 0:
        draft = folder.parent / f".{folder.name}.{os.getpid()}.exporting"
        draft.mkdir(parents=True)
        try:
            yield draft
            if folder.exists():
                folder.rmdir()
            draft.rename(folder)
        except BaseException:  # also KeyboardInterrupt: no draft is left behind
            shutil.rmtree(draft, ignore_errors=True)
            raise
    else:
        yield None
    _barrier("the folder is complete")


def _barrier(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def occupied(folder: Path) -> str | None:
    """Why a folder cannot be written to as a new one; None when it can."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return f"out={folder}: is not a folder. Name one that does not exist yet"
    if folder.exists() and any(folder.iterdir()):
        return (
            f"out={folder}: is not empty. Name a folder that does not exist yet, or empty this one"
        )
    return None


def _write_small_files(
    draft: Path, card: Card, tokenizer: Path | Tokenizer | None, chat_template: str | None
) -> None:
    """Tokenizer, chat template and model card."""
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
    value = raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"
