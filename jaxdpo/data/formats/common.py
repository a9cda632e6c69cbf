"""What all parsers of rows share: columns and their types, prompts under their usual names, and the check of a finished pair."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Dropped, Message, Preference, Text, Turns, read_text
from jaxdpo.utils.text import is_unicode, printable

Row = Mapping[str, Any]
Outcome = Preference | Dropped
Parser = Callable[[Row, DataSection], Iterable[Outcome]]
"""Reads one raw row: yields its pairs, and Dropped for each that is well formed but useless. Raises ValueError for a row of the
wrong form."""

EMPTY = "empty answer"
IDENTICAL = "identical answers"
TIE = "tie"
OPTIONAL = ("system", "tools", "weight", "margin", "id")
"""Columns that every form of rows may have."""
QUESTIONS = ("question", "instruction", "conversations")
"""Other names of the prompt. Unlike a string named prompt, which is used verbatim, what they hold is said by a user."""
PROMPTS = ("prompt", *QUESTIONS, "input")
"""Columns that read_prompt reads."""


def require(row: Row, *names: str) -> None:
    """Raises: ValueError: the row lacks some of these columns."""
    if missing := [name for name in names if name not in row]:
        raise ValueError(
            f"column {' and '.join(map(repr, missing))} is missing; columns found: {shown_columns(row)}"
        )


def shown_columns(row: Row) -> str:
    """The names of a row's columns, for a message."""
    return ", ".join(printable(str(name)) for name in row) or "none"


def string(row: Row, column: str) -> str:
    """A column that must hold a string."""
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {type(value).__name__}, must be a string")
    return value


def number(value: Any, column: str) -> float:
    """A column that must hold a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"column {column!r} is {printable(repr(value))}, must be a number")
    return float(value)


def said(role: str, text: str) -> Turns:
    """One turn."""
    return (Message(role, text),)


def read_prompt(row: Row) -> Text | None:
    """The prompt, under one of its names, after the system prompt if the row has a column for it; None if it has no prompt.

    A string is used verbatim only if it is named prompt and the row has neither a column for a system prompt nor tools.
    """
    name = next((name for name in ("prompt", *QUESTIONS) if row.get(name) is not None), None)
    prompt = None if name is None else read_text(row[name], name)
    if name == "instruction" and isinstance(prompt, str) and row.get("input"):
        prompt = f"{prompt}\n{string(row, 'input')}"
    if isinstance(prompt, str) and (name != "prompt" or "system" in row or row.get("tools")):
        prompt = said("user", prompt)
    return prompt if prompt is None or isinstance(prompt, str) else with_system(row, prompt)


def with_system(row: Row, prompt: Turns) -> Turns:
    """The prompt after the system prompt of the column for it, if that says something."""
    if not row.get("system"):
        return prompt
    system = said("system", string(row, "system"))
    if prompt and prompt[0].role == "system":
        if prompt[:1] != system:
            raise ValueError(
                "column 'system' and the system message of the prompt differ: keep one"
            )
        return prompt
    return system + prompt


def checked(row: Row, prompt: Text, chosen: Text, rejected: Text, **more: Any) -> Outcome:
    """The record with the row's optional columns, unless it has nothing to learn from."""
    weight = 1.0 if row.get("weight") is None else number(row["weight"], "weight")
    if weight < 0:
        raise ValueError(f"column 'weight' is {weight:g}, must be a number that is not negative")
    if not isinstance(prompt, str):
        if not prompt or prompt[-1].role == "assistant":
            return Dropped("prompt ends with an assistant turn" if prompt else "no shared prompt")
        if any(isinstance(answer, str) or not _is_answer(answer) for answer in (chosen, rejected)):
            return Dropped("answer does not begin and end with an assistant turn")
    if any(
        not (answer if isinstance(answer, str) else answer[-1].content).strip()
        for answer in (chosen, rejected)
    ):
        return Dropped(EMPTY)
    if chosen == rejected:
        return Dropped(IDENTICAL)
    if weight == 0:
        return Dropped("weight 0")
    margin = 0.0 if row.get("margin") is None else number(row["margin"], "margin")
    own_id = row.get("id")
    more = {
        "id": str(own_id) if isinstance(own_id, str | int) else "",
        "tools": read_tools(row.get("tools")),
        **more,
    }
    record = Preference(prompt, chosen, rejected, weight=weight, margin=margin, **more)
    return record if all(map(is_unicode, record.texts)) else Dropped("text is not valid Unicode")


def _is_answer(turns: Turns) -> bool:
    return len(turns) > 0 and turns[0].role == turns[-1].role == "assistant"


def read_tools(value: Any) -> str:
    """A list of tools, or the JSON text of one, as JSON text; empty for none.

    Raises:
        ValueError: it is something else.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) and value else value
    except json.JSONDecodeError:
        tools = False
    if not tools and tools is not False:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("column 'tools' must be a list of objects, or its JSON text")
    return json.dumps(tools, ensure_ascii=False)
