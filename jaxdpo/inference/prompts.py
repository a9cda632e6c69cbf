"""Prompts to answer: from a file's rows or lines, or from the command line."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdpo.data.formats.preference import Text, read_text, strings
from jaxdpo.data.readers import file_kind, read_rows
from jaxdpo.utils.text import is_unicode, printable

TEXT_SUFFIX = ".txt"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, as text or as the turns of a conversation."""

    text: Text
    place: str
    """Where it stands, for messages: questions.jsonl:3."""


def read_prompts(source: str | Sequence[str]) -> list[Prompt]:
    """The prompts of a file (rows with a column "prompt", or lines of a .txt), or those given themselves.

    Raises:
        ValueError: the file cannot be read, or some prompts cannot be used; names each of them.
    """
    found = list(
        _from_file(Path(source).expanduser()) if isinstance(source, str) else _given(source)
    )
    if problems := [problem for problem in found if isinstance(problem, str)]:
        raise ValueError("\n".join(problems))
    prompts = [prompt for prompt in found if isinstance(prompt, Prompt)]
    if not prompts:
        raise ValueError(f"prompts={source}: holds no prompt")
    return prompts


def _given(texts: Sequence[str]) -> Iterator[Prompt | str]:
    for number, text in enumerate(texts, start=1):
        yield _checked(text, f"prompts:{number}")


def _from_file(path: Path) -> Iterator[Prompt | str]:
    if path.suffix.lower() == TEXT_SUFFIX:
        lines = enumerate(_lines(path), start=1)
        yield from (
            _checked(line, f"{path.name}:{number}") for number, line in lines if line.strip()
        )
    elif file_kind(path) is not None:
        try:
            for number, row in read_rows(path):
                yield _from_row(row, f"{path.name}:{number}")
        except ValueError as error:
            raise ValueError(f"prompts={error}") from None
    else:
        raise ValueError(
            f"prompts={path}: name a file with a prompt a line (.txt) or rows with a column 'prompt' (.jsonl, .json, .csv, .parquet), "
            "or write the prompts themselves as a list: prompts=[Who are you?]"
        )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts={path}: not UTF-8 ({error.reason} at byte {error.start}). Convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise ValueError(f"prompts={path}: cannot be read ({error.strerror})") from None


def _from_row(row: Mapping[str, Any], place: str) -> Prompt | str:
    if "prompt" not in row:
        found = ", ".join(printable(str(name)) for name in row) or "none"
        return f"prompts={place}: column 'prompt' is missing; columns found: {found}"
    try:
        return _checked(read_text(row["prompt"], "prompt"), place)
    except ValueError as error:
        return f"prompts={place}: {error}"


def _checked(text: Text, place: str) -> Prompt | str:
    """The prompt, or what is wrong with it."""
    if not isinstance(text, str) and (not text or text[-1].role == "assistant"):
        return f"prompts={place}: " + (
            "ends with an assistant turn. End it with the turn to answer"
            if text
            else "has no message"
        )
    if not all(map(is_unicode, strings(text))):
        return f"prompts={place}: is not valid Unicode"
    return Prompt(text, place)
