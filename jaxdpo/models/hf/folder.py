"""The small files of a Hugging Face folder: config.json, generation_config.json, tokenizer and chat template."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Names and patterns of all files that a tokenizer may consist of. Python files are never among them."""
_MODEL_FILES = ("config.json", "generation_config.json")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_model_files(source: Path, target: Path, chat_template: str | None = None) -> None:
    """Copy config.json, generation_config.json and the tokenizer; with them and a checkpoint a run needs its source no more.

    Args:
        source: a Hugging Face folder (links are followed: the hub's cache consists of them).
        target: the folder to fill; made if it does not exist.
        chat_template: Jinja text that replaces the tokenizer's own.
    """
    _copy(source, target, (*_MODEL_FILES, *TOKENIZER_FILES))
    if chat_template is not None:
        set_chat_template(target, chat_template)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of `source`, its chat template included."""
    _copy(source, target, TOKENIZER_FILES)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in (path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def set_chat_template(folder: Path, template: str) -> None:
    """Make `template` (Jinja) the chat template of a folder, for transformers old (tokenizer_config.json) and new (its own file)."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        write_json(path, {**read_json(path), "chat_template": template})
    (folder / "chat_template.json").unlink(missing_ok=True)


def generation_config(folder: Path, raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json should hold: the folder's own, else the special token ids of config.json or of the tokenizer.

    Args:
        folder: a Hugging Face folder with a tokenizer, or not.
        raw_config: its config.json.
    """
    own = folder / "generation_config.json"
    if own.is_file():
        return read_json(own)
    ids = {key: raw_config[key] for key in _TOKEN_IDS if raw_config.get(key) is not None}
    return _tokenizer_ids(folder) | ids


def end_ids(folder: Path, raw_config: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer, as generation_config.json says, or what stands in for it."""
    ids = generation_config(folder, raw_config).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _tokenizer_ids(folder: Path) -> dict[str, int]:
    paths = [folder / name for name in ("tokenizer_config.json", "tokenizer.json")]
    if not all(path.is_file() for path in paths):
        return {}
    settings, tokenizer = map(read_json, paths)
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    texts = {key: settings.get(key.removesuffix("_id")) for key in _TOKEN_IDS}
    texts = {
        key: text.get("content") if isinstance(text, dict) else text for key, text in texts.items()
    }
    return {key: ids[text] for key, text in texts.items() if text in ids}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
