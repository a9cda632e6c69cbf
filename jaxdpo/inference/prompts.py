"""Prompts to answer: from the rows or lines of a file, or from the command line."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdpo.data.formats.common import media_column, read_tools
from jaxdpo.data.formats.preference import Text, strings
from jaxdpo.data.formats.prompt import read_prompt, unfold
from jaxdpo.data.readers import file_kind, read_rows
from jaxdpo.utils.text import is_unicode, printable

TEXT_SUFFIX = ".txt"
DIALOGUES = ("chosen", "rejected", "messages", "conversations", "conversation")
"""Columns beside a prompt that may be answers, or complete dialogues with the prompt in them."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, as text or as the turns of a conversation."""

    text: Text
    place: str
    """Where it is from, for messages: questions.jsonl:3."""
    tools: str = ""
    """JSON text of the tools that the chat template is given."""


def read_prompts(source: str | Sequence[str]) -> list[Prompt]:
    """The prompts of a file (rows with a column "prompt", or lines of a .txt), or of a list.

    Raises:
        ValueError: the file cannot be read, or some prompts are invalid; names each of them.
    """
    if isinstance(source, str):
        found = _from_file(Path(source).expanduser())
    else:
        found = _from_list(source)
    prompts, problems = [], []
    for item in found:
        if isinstance(item, Prompt):
            prompts.append(item)
        else:
            problems.append(item)
    if problems:
        raise ValueError("\n".join(problems))
    if not prompts:
        raise ValueError(f"prompts={source}: holds no prompt")
    return prompts


def _from_list(texts: Sequence[str]) -> Iterator[Prompt | str]:
    """Each prompt, or what is wrong with it."""
    for number, text in enumerate(texts, start=1):
        yield _checked(text, f"prompts:{number}")


def _from_file(path: Path) -> Iterator[Prompt | str]:
    """Each prompt of a file, or what is wrong with it."""
    if path.suffix.lower() == TEXT_SUFFIX:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield _checked(line, f"{path.name}:{number}")
    elif file_kind(path) is not None:
        try:
            for number, row in read_rows(path):
                yield _from_row(row, f"{path.name}:{number}")
        except ValueError as error:
            raise ValueError(f"prompts={error}") from None
    else:
        raise ValueError(
            f"prompts={path}: name a file with a prompt a line (.txt) or rows with a column "
            "'prompt' (.jsonl, .json, .csv, .parquet), or write the prompts themselves as a list: "
            '"prompts=[Who are you?]"'
        )


def _lines(path: Path) -> list[str]:
    if path.exists() and not path.is_file():  # a named pipe would be waited for
        raise ValueError(f"prompts={path}: is not a file")
    try:
        # Not splitlines: it also breaks at U+2028 and others, which a prompt may contain.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts={path}: not UTF-8 ({error.reason} at byte {error.start}). "
            "Convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise ValueError(f"prompts={path}: cannot be read ({error.strerror})") from None


def _from_row(row: Mapping[str, Any], place: str) -> Prompt | str:
    if "prompt" not in row:
        found = ", ".join(printable(str(name)) for name in row) or "none"
        return f"prompts={place}: column 'prompt' is missing; columns found: {found}"
    media = media_column(row)
    if media is not None:
        return (
            f"prompts={place}: column {printable(repr(media))} holds media, and only text is read. "
            "Remove the column or the row"
        )
    try:
        row = unfold(row)
        # Verbatim text, or a chat with system prompt, tools and history, as in training.
        text = read_prompt(row, *(row.get(name) for name in DIALOGUES))
        if text is None:
            return f"prompts={place}: column 'prompt' is empty. Fill it, or remove the row"
        return _checked(text, place, read_tools(row.get("tools")))
    except ValueError as error:
        return f"prompts={place}: {error}"


def _checked(text: Text, place: str, tools: str = "") -> Prompt | str:
    """The prompt, or what is wrong with it."""
    if not isinstance(text, str):
        if not text:
            return f"prompts={place}: has no message"
        if text[-1].role == "assistant":
            return f"prompts={place}: ends with an assistant turn. End it with the turn to answer"
    if not all(map(is_unicode, strings(text))):
        return f"prompts={place}: is not valid Unicode"
    return Prompt(text, place, tools)
