"""What the parsers of all row formats share: columns, the prompt, the finished pair.

A row is one object of a file: {"prompt": "Why?", "chosen": "So.", "rejected": "No."}. Its parser is
a generator that yields, for each pair in it, the record (formats/preference.py) or Dropped:

- dropped (invalid): the pair is well formed but has nothing to learn from, e.g. an empty answer,
  two identical answers, weight 0. Counts against data.max_dropped_fraction.
- filtered: an option or the data set's own rule excludes the pair, e.g. a tie. Does not count.

A row of another format than the parser's raises ValueError: it is never guessed at.

What each format drops or filters beyond make_preference is listed at the top of its parser's file.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxdpo.config.data_options import DataSection
from jaxdpo.config.impossible import MAX_FLOAT
from jaxdpo.data.formats.preference import (
    Dropped,
    Message,
    Preference,
    Text,
    Turns,
    strings,
)
from jaxdpo.utils.text import has_content, is_unicode, printable

Row = Mapping[str, Any]
Outcome = Preference | Dropped
Unread = Callable[[Row, DataSection], Iterable[str]]
"""Names the columns (and fields, as column.field) of a row that have content and are not read."""
Parser = Callable[[Row, DataSection], Iterable[Outcome]]
"""Reads one row: yields its pairs, and Dropped for each that is not used. Raises ValueError for a
row of another format."""

EMPTY = "empty answer"
IDENTICAL = "identical answers"
TIE = "tie"
EMPTY_PROMPT = "empty prompt"
SYSTEMS = ("system", "system_prompt", "system_message")
"""Columns with a system prompt."""
OPTIONAL = (*SYSTEMS, "tools", "weight", "margin", "id", "group")
"""Columns that rows of every format may have."""
QUESTIONS = (
    "question", "query", "instruction", "conversations", "conversation", "messages", "trajectory",
    "input",
)  # fmt: skip
"""Other names of the prompt. A string in them is a user's message; one named prompt is verbatim."""
PROMPTS = ("prompt", *QUESTIONS)
"""Columns that read_prompt (formats/prompt.py) reads, the first that has content."""
ROW_NUMBERS = re.compile(r"id|index|qid|uid|seed|.*_(id|idx|index|uid)|idx", re.IGNORECASE)
"""Names of columns that only number the rows or name their source."""
_MEDIA = re.compile(
    r"(image|img|picture|photo|video|audio|pixel_value)s?"
    r"(_?(path|file|filename|url|uri|bytes|base64|b64|list|data)s?)?",
    re.IGNORECASE,
)
"""Names of columns with something other than text."""


# --- columns ---


def unread(row: Row, read: Iterable[str]) -> Iterator[str]:
    """The columns with content that are neither read nor optional columns of the right type.

    Args:
        read: the columns that the row's parser reads.
    """
    known = {*read, *OPTIONAL}
    if not isinstance(row.get("id"), str | int):
        known.discard("id")
    for name, value in row.items():
        if name not in known and has_content(value):
            yield str(name)


def media_column(row: Row) -> str | None:
    """A column of images, video or audio that is not empty: the row's text alone would mislead."""
    for name, value in row.items():
        if _MEDIA.fullmatch(str(name)) and value is not False and has_content(value):
            return str(name)
    return None


def require(row: Row, *names: str) -> None:
    """Raises: ValueError: the row lacks some of these columns."""
    missing = [repr(name) for name in names if name not in row]
    if missing:
        raise ValueError(
            f"column {' and '.join(missing)} is missing; columns found: {shown_columns(row)}"
        )


def shown_columns(row: Row) -> str:
    """The names of a row's columns, for a message."""
    return ", ".join(printable(str(name)) for name in row) or "none"


def string(row: Row, column: str) -> str:
    """A column that must hold a string.

    Raises:
        ValueError: it does not.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {type(value).__name__}, must be a string")
    return value


def number(value: Any, column: str) -> float:
    """The value of a column that must hold a number which is finite as float32.

    Raises:
        ValueError: it does not.
    """
    # A bool is an int to Python, but a column of bools is a label of unknown meaning, no score.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"column {column!r} is {printable(repr(value))}, must be a number")
    if not abs(value) < MAX_FLOAT:
        raise ValueError(f"column {column!r} is {value}, must be a number below 3.4e38 (float32)")
    return float(value)


def read_tools(value: Any) -> str:
    """A list of tools, or the JSON text of one, as JSON text; empty for none.

    Raises:
        ValueError: it is something else.
    """
    tools = value
    if isinstance(value, str) and value:
        try:
            tools = json.loads(value)
        except json.JSONDecodeError:
            tools = False  # no list, so that it is refused below
    if not tools and tools is not False:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("column 'tools' must be a list of objects, or its JSON text")
    return json.dumps(tools, ensure_ascii=False)


# --- the prompt ---


def one_turn(role: str, text: str) -> Turns:
    """A conversation of one message."""
    return (Message(role, text),)


def with_system(row: Row, prompt: Turns) -> Turns:
    """The prompt after the system prompt of the row's column for it, if that is not empty.

    Raises:
        ValueError: the prompt begins with another system message, or two columns hold different
            system prompts.
    """
    texts = {}
    for column in SYSTEMS:
        if has_content(row.get(column)):
            texts.setdefault(string(row, column), column)
    if not texts:
        return prompt
    if len(texts) > 1:
        raise ValueError(
            f"columns {' and '.join(map(repr, texts.values()))} hold different system prompts: "
            "keep one"
        )
    ((text, column),) = texts.items()
    system = one_turn("system", text)
    if prompt and prompt[0].role == "system":
        if prompt[:1] != system:
            raise ValueError(
                f"column {column!r} and the system message of the prompt differ: keep one"
            )
        return prompt
    return system + prompt


# --- the pair ---


def make_preference(row: Row, prompt: Text, chosen: Text, rejected: Text, **more: Any) -> Outcome:
    """The record with the row's optional columns; Dropped if there is nothing to learn from it.

    Args:
        more: fields of the record that the row has no column for.

    Raises:
        ValueError: an optional column has the wrong type, or the weight is negative.
    """
    weight = 1.0
    if row.get("weight") is not None:
        weight = number(row["weight"], "weight")
    if weight < 0:
        raise ValueError(f"column 'weight' is {weight:g}, must be a number that is not negative")
    reason = _reason_to_drop(prompt, chosen, rejected)
    if reason is None and weight == 0:
        reason = "weight 0"
    if reason is not None:
        return Dropped(reason)
    fields: dict[str, Any] = {"weight": weight, "tools": read_tools(row.get("tools"))}
    if row.get("margin") is not None:
        fields["margin"] = number(row["margin"], "margin")
    if isinstance(row.get("id"), str | int):
        fields["id"] = str(row["id"])
    if row.get("group") is not None:
        if not isinstance(row["group"], str | int) or isinstance(row["group"], bool):
            raise ValueError(
                f"column 'group' is {printable(repr(row['group']))}, must be a name or a whole "
                "number: what the pair belongs to. Rename the column if it is something else"
            )
        fields["group"] = str(row["group"])
    record = Preference(prompt, chosen, rejected, **{**more, **fields})
    if not all(map(is_unicode, (*record.texts, record.group))):
        return Dropped("text is not valid Unicode")
    return record


def _reason_to_drop(prompt: Text, chosen: Text, rejected: Text) -> str | None:
    """Why a pair is dropped whatever its other columns hold; None if it is not."""
    answers = (chosen, rejected)
    if not has_content(strings(prompt)):
        return EMPTY_PROMPT if prompt else "no shared prompt"
    if not isinstance(prompt, str):
        if prompt[-1].role == "assistant":
            return "prompt ends with an assistant turn"
        if not all(_is_answer(answer) for answer in answers):
            return "answer does not begin and end with an assistant turn"
    for answer in answers:
        if not has_content(answer if isinstance(answer, str) else strings(answer[-1:])):
            return EMPTY
    return IDENTICAL if chosen == rejected else None


def _is_answer(text: Text) -> bool:
    """Whether a text can answer a conversation: turns from the assistant's to the assistant's."""
    if isinstance(text, str) or not text:
        return False
    return text[0].role == text[-1].role == "assistant"
