"""The prompt of a row: which columns hold it, and what comes before it.

{"prompt": "2 + 2 ="}                                        verbatim text
{"system": "Be brief.", "question": "2 + 2?"}                a chat
{"instruction": "Add.", "input": "2 2", "history": [["Hi", "Hello"]]}   a chat of four turns
{"input": {"messages": [...], "tools": [...]}}               OpenAI's preference rows
"""

from collections.abc import Iterator
from typing import Any

from jaxdpo.data.formats.common import (
    OPTIONAL,
    PROMPTS,
    ROW_NUMBERS,
    SYSTEMS,
    Row,
    one_turn,
    string,
    with_system,
)
from jaxdpo.data.formats.listed_text import messages_in, read_list
from jaxdpo.data.formats.preference import Message, Text, Turns, read_text
from jaxdpo.utils.text import has_content, printable

HISTORY = "history"
"""Column of the turns before the prompt, in LLaMA-Factory's alpaca rows."""


def unfold(row: Row) -> Row:
    """The row with the messages and tools of {"input": {"messages": ..., "tools": ...}} as columns.

    Raises:
        ValueError: the row has other tools too.
    """
    for name in PROMPTS:
        value = row.get(name)
        if isinstance(value, str):
            value = messages_in(value, name)
        if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
            continue
        row = {**row, name: value["messages"]}
        if value.get("tools"):
            if row.get("tools") and row["tools"] != value["tools"]:
                raise ValueError(
                    f"column 'tools' and the tools of column {name!r} differ: keep one"
                )
            row["tools"] = value["tools"]
    return row


def unfolded(row: Row) -> Iterator[str]:
    """Fields beside the messages and tools of a column that `unfold` takes apart: column.field."""
    for name in PROMPTS:
        value = row.get(name)
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            for field, item in value.items():
                if field not in ("messages", "tools") and has_content(item):
                    yield f"{name}.{field}"


def prompt_columns(row: Row) -> tuple[str, ...]:
    """The columns that become the prompt, system prompt apart; none if they hold no text."""
    names = [name for name in PROMPTS if has_content(row.get(name))]
    if not names:
        return ()
    used = names[:1]
    if names[0] == "instruction" and isinstance(row.get("input"), str) and "input" in names:
        used.append("input")  # Alpaca's pair of columns
    if has_content(row.get(HISTORY)):
        used.append(HISTORY)
    return tuple(used)


def read_prompt(row: Row, *answers: Any) -> Text | None:
    """The prompt, under one of its names, after the system prompt and the history if there are any.

    A string is used verbatim only if it is named prompt and the row has neither a column for a
    system prompt nor tools or a history: those exist in conversations only. None if there is no
    prompt.

    Args:
        answers: the values of the row's answers, which may repeat the prompt.

    Raises:
        ValueError: another column holds a prompt too, or a column has the wrong type.
    """
    columns = prompt_columns(row)
    if not columns:
        if has_content(row.get(HISTORY)):
            raise ValueError(
                f"column {HISTORY!r} holds the turns before a prompt, and no column holds the "
                "prompt itself. If it is the prompt, rename it to prompt"
            )
        return None
    name = columns[0]
    _refuse_other_prompts(row, columns, answers)
    prompt = read_text(row[name], name)
    if isinstance(prompt, str):
        if "input" in columns[1:]:
            prompt = f"{prompt}\n{string(row, 'input')}"
        is_chat = any(column in row for column in SYSTEMS) or bool(row.get("tools"))
        if name == "prompt" and HISTORY not in columns and not is_chat:
            return prompt
        prompt = one_turn("user", prompt)
    history = read_history(row)
    if history and prompt[:1] and prompt[0].role == "system":
        return with_system(row, prompt[:1] + history + prompt[1:])
    return with_system(row, history + prompt)


def read_history(row: Row) -> Turns:
    """The turns of the column history: [[user, assistant], ...] or messages.

    Raises:
        ValueError: it is something else.
    """
    value = row.get(HISTORY)
    if not has_content(value):
        return ()
    items = read_list(value)
    if items is not None and all(isinstance(item, dict) for item in items):
        turns = read_text(items, HISTORY)
        assert not isinstance(turns, str), "a list holds messages"
        return turns
    turns = []
    for item in items or [None]:
        if not isinstance(item, list) or [type(text) for text in item] != [str, str]:
            raise ValueError(
                f"column {HISTORY!r} must be [[user, assistant], ...] or a list of messages, "
                f"is {printable(repr(value)[:80])}"
            )
        turns += [Message("user", item[0]), Message("assistant", item[1])]
    return tuple(turns)


def refuse_other_texts(row: Row, *answers: str) -> None:
    """Check that no text of a row without prompt is left out, before the answers' beginning is.

    Args:
        answers: the columns of the answers.

    Raises:
        ValueError: other columns hold text, of which one may be the prompt.
    """
    others = []
    for name, value in row.items():
        texts = [text.strip() for text in _texts(value)]
        if ROW_NUMBERS.fullmatch(str(name)):  # an id has no spaces: "seed" may be a task
            texts = [text for text in texts if len(text.split()) > 1]
        if name not in (*answers, *OPTIONAL) and any(texts):
            others.append(printable(str(name)))
    if others:
        raise ValueError(
            f"no column holds the prompt; columns with text: {', '.join(others)}. Rename the one "
            "with the prompt to prompt; if the answers begin with it, remove these columns"
        )


def _refuse_other_prompts(row: Row, columns: tuple[str, ...], answers: tuple[Any, ...]) -> None:
    """Raise where another column for a prompt holds text that neither prompt nor answers hold."""
    others = []
    for name in PROMPTS:
        if name not in columns and has_content(row.get(name)):
            others.append(name)
    if not others:
        return
    known = "\n".join(_texts([*(row[name] for name in columns), *answers]))
    words = ""
    for name in others:
        for text in _texts(row[name]):
            if text in known:
                continue
            words = words or " ".join(known.split())  # white space apart, where it comes to that
            if " ".join(text.split()) not in words:
                raise ValueError(
                    f"columns {columns[0]!r} and {name!r} both hold a prompt, and they differ. "
                    "Join them in one column, or remove or rename the one that is none"
                )


def contains(text: str, turns: Turns) -> bool:
    """Whether messages hold a text, white space apart."""
    known = "\n".join(turn.content for turn in turns)
    return text in known or " ".join(text.split()) in " ".join(known.split())


def _texts(value: Any) -> Iterator[str]:
    """Every text of a value; of a message its content."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("role", "from", "type"):
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
