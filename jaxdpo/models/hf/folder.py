"""The small files of a Hugging Face folder: configs, tokenizer and chat template."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdpo.utils.files import atomic_write
from jaxdpo.utils.text import printable

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
"""All files that a tokenizer may consist of, as names and patterns. Never Python files."""
_MODEL_FILES = ("config.json", "generation_config.json")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_model_files(source: Path, target: Path, chat_template: str | None = None) -> None:
    """Copy config.json, generation_config.json and the tokenizer.

    With them and a checkpoint, a run no longer needs the folder that it started from.

    Args:
        source: a Hugging Face folder (links are followed: the hub's cache consists of links).
        target: the folder to fill; created if it does not exist.
        chat_template: Jinja text that replaces the tokenizer's own.
    """
    _copy(source, target, (*_MODEL_FILES, *TOKENIZER_FILES))
    if chat_template is not None:
        set_chat_template(target, chat_template)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of `source`, its chat template included."""
    _copy(source, target, TOKENIZER_FILES)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def set_chat_template(folder: Path, template: str) -> None:
    """Make `template` (Jinja) the chat template of a folder.

    Old versions of transformers read it from tokenizer_config.json, new ones from a file of its
    own.
    """
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        write_json(path, {**read_json(path), "chat_template": template})
    (folder / "chat_template.json").unlink(missing_ok=True)


def generation_config(folder: Path, raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """Contents for generation_config.json.

    The folder's own file, else the special token ids of config.json or of the tokenizer.

    Args:
        folder: a Hugging Face folder, with a tokenizer or without.
        raw_config: its config.json.
    """
    own = folder / "generation_config.json"
    if own.is_file():
        return read_json(own)
    ids = {key: raw_config[key] for key in _TOKEN_IDS if raw_config.get(key) is not None}
    return _tokenizer_ids(folder) | ids


def end_ids(folder: Path, raw_config: Mapping[str, Any]) -> list[int]:
    """The eos tokens, which end a completion, by generation_config.json or what replaces it."""
    return _as_list(generation_config(folder, raw_config).get("eos_token_id"))


def add_end_tokens(folder: Path, ids: Sequence[int], eos_token: str | None) -> None:
    """Make a folder name every end token, so that transformers and vLLM stop where training did.

    Args:
        folder: a Hugging Face folder; its config.json, generation_config.json and, for eos_token,
            tokenizer_config.json and special_tokens_map.json are written where they lack some.
        ids: the tokens that end an answer.
        eos_token: what the tokenizer is to name as its eos token: the end of the training answers,
            such as <|im_end|>. None: what it names.
    """
    raw = read_json(folder / "config.json")
    every = list(dict.fromkeys([*end_ids(folder, raw), *ids]))
    if every:
        named: int | list[int] = every if len(every) > 1 else every[0]
        generation = generation_config(folder, raw)
        for name, content in (("config.json", raw), ("generation_config.json", generation)):
            if _as_list(content.get("eos_token_id")) != every:
                write_json(folder / name, {**content, "eos_token_id": named})
    if eos_token is None:
        return
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        # Only tokenizer_config.json may lack it: the map repeats what some tokenizers name there.
        if path.is_file() and ("eos_token" in read_json(path) or name == "tokenizer_config.json"):
            write_json(path, {**read_json(path), "eos_token": eos_token})


def _as_list(ids: Any) -> list[int]:
    """Token ids as a list: config.json has a number, a list or null.

    Raises:
        ValueError: it is something else, or no token id.
    """
    if ids is None:
        return []
    found = ids if isinstance(ids, list) else [ids]
    for item in found:
        is_id = isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31
        if not is_id:
            raise ValueError(
                f"eos_token_id={printable(str(ids))[:80]} in generation_config.json or "
                "config.json: must be a token id or a list of them"
            )
    return list(found)


def _tokenizer_ids(folder: Path) -> dict[str, int]:
    """Ids of the special tokens that tokenizer_config.json names, from tokenizer.json."""
    settings_file, tokenizer_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not settings_file.is_file() or not tokenizer_file.is_file():
        return {}
    settings = read_json(settings_file)
    added = read_json(tokenizer_file).get("added_tokens", [])
    id_of = {token["content"]: token["id"] for token in added}
    ids = {}
    for key in _TOKEN_IDS:
        token = settings.get(key.removesuffix("_id"))
        if isinstance(token, dict):  # an AddedToken with its flags
            token = token.get("content")
        if token in id_of:
            ids[key] = id_of[token]
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is something else.
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
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
