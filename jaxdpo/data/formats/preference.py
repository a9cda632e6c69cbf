"""The record of a preference pair before it becomes tokens, and of a pair that is not used.

A row such as {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "weight": 2} becomes
Preference("Why?", "So.", "No.", id="pairs.jsonl:1", weight=2.0).
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdpo.data.formats.listed_text import messages_in, turned
from jaxdpo.data.formats.roles import ROLES, read_role
from jaxdpo.data.formats.tool_calls import CALL_ROLES, calls_in, read_calls
from jaxdpo.utils.text import has_content, printable


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    extra: str = ""
    """The other fields, as the JSON text of an object: tool_calls, reasoning_content, name, ...;
    "content": null where the row has no content. Empty: none. Chat templates are given all."""

    @property
    def fields(self) -> dict[str, Any]:
        """The message as a chat template is given it."""
        own = {"role": self.role, "content": self.content}
        return {**own, **json.loads(self.extra)} if self.extra else own


Turns = tuple[Message, ...]
Text = str | Turns
"""Plain text, which is used verbatim, or the messages that a chat template formats."""


def strings(text: Text) -> list[str]:
    """The text itself in a list, or the content (and the other fields) of each message."""
    if isinstance(text, str):
        return [text]
    found = []
    for turn in text:
        found.append(turn.content)
        if turn.extra:
            found.append(turn.extra)
    return found


def _contents(text: Text) -> list[str]:
    """The text itself in a list, or the content of each message without its other fields."""
    return [text] if isinstance(text, str) else [turn.content for turn in text]


def read_text(value: Any, column: str) -> Text:
    """A string or messages, as JSON gives them.

    Args:
        value: a string, a list of {role, content} or {from, value}, or one such message; also as
            text that is such a list for certain.
        column: where it is from, for messages.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        value = messages_in(value, column)
        if isinstance(value, str):
            return value
    if isinstance(value, dict):
        value = turned(value)
    if isinstance(value, dict):
        return (_message(value, f"column {column!r}"),)
    if not isinstance(value, list):
        raise ValueError(
            f"column {column!r} is {type(value).__name__}, must be a string or a list of messages"
        )
    turns = []
    for number, item in enumerate(value, start=1):
        turns.append(_message(item, f"message {number} of column {column!r}"))
    return tuple(turns)


def _message(item: Any, where: str) -> Message:
    keys: Mapping[str, Any] = item if isinstance(item, dict) else {}
    own = ("from", "value") if "from" in keys else ("role", "content")
    role, content = keys.get(own[0]), keys.get(own[1])
    extra = _other_fields(keys, own, where)
    if isinstance(role, str) and role.strip().lower() in CALL_ROLES:
        extra["tool_calls"] = calls_in(content, where) + extra.get("tool_calls", [])
        role, content = "assistant", None
    text = _content(content, where)
    if content is None and extra:
        text, extra["content"] = "", None
    if not isinstance(role, str) or text is None:
        shown: Any = type(item).__name__
        if isinstance(item, dict):
            shown = {key: type(value).__name__ for key, value in item.items()}
        raise ValueError(
            f"{where} must be {{'role': string, 'content': string}}, is {printable(str(shown))}"
        )
    known = read_role(role)
    if known is None:
        raise ValueError(
            f"{where} has the role {printable(repr(role))}, which is none of "
            f"{', '.join(ROLES)}. Rename it"
        )
    if not extra:
        return Message(known, text)
    # What JSON cannot hold (the bytes of an image) is named, so that it is refused by its field.
    return Message(
        known,
        text,
        json.dumps(extra, ensure_ascii=False, default=lambda value: type(value).__name__),
    )


def _other_fields(keys: Mapping[str, Any], own: tuple[str, str], where: str) -> dict[str, Any]:
    """The fields of a message beside role and content; tables fill absent ones with null."""
    extra = {}
    for name, value in keys.items():
        if name in own or not has_content(value):
            continue
        if name in ("role", "content"):
            raise ValueError(f"{where} has both {own[0]!r} and {name!r}. Keep one form")
        if name == "tool_calls":
            value = read_calls(value, where)
        extra[str(name)] = value
    return extra


def _content(value: Any, where: str) -> str | None:
    """The text of a message: a string, or blocks of text that are joined; None if neither."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    texts = []
    for number, block in enumerate(value, start=1):
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        field = "text"
        if isinstance(block, dict) and block.get("text") is None and "value" in block:
            field = "value"  # LLaMA-Factory v1
        text = block.get(field) if kind == "text" and isinstance(block, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: block {number} of its content is {printable(repr(kind))}; "
                "only blocks of text can be read"
            )
        more = [str(key) for key in block if key not in ("type", field) and has_content(block[key])]
        if more:
            raise ValueError(
                f"{where}: block {number} of its content has {', '.join(map(repr, more))}, which "
                "is not read. Remove it"
            )
        texts.append(text)
    return "".join(texts)


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers (TRL: completions) to one prompt, the first preferred.

    The three texts are all strings, or all messages. An answer of messages begins and ends with a
    turn of the assistant; most have just this one.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    id: str = ""
    """Where it came from: file:row (rows count from 1), or the row's own id column."""
    weight: float = 1.0
    """Factor of this pair in the loss."""
    margin: float = 0.0
    """By how much the chosen answer should win, in nats (units of the logit)."""
    tools: str = ""
    """JSON list of the tools that the chat template is given."""
    group: str = ""
    """What the pair belongs to, e.g. a tree of messages or a post: all of a group are on one side
    of a split into train and eval. Empty: a split goes by the prompt alone."""

    @property
    def texts(self) -> list[str]:
        """Every string of the record that came from the row."""
        return [
            *strings(self.prompt),
            *strings(self.chosen),
            *strings(self.rejected),
            self.tools,
        ]

    @property
    def repeats_prompt(self) -> bool:
        """Whether both answers begin with the text of the prompt's last turn, as generated text
        does that was not cut."""
        begin = _contents(self.prompt)[-1].strip()
        answers = [_contents(answer)[0].lstrip() for answer in (self.chosen, self.rejected)]
        return bool(begin) and all(text.startswith(begin) for text in answers)

    @functools.cached_property
    def prompt_key(self) -> int:
        """64-bit hash of the prompt, by which pairs are split and counted."""
        return _hash(_plain(self.prompt))

    @functools.cached_property
    def group_key(self) -> int:
        """64-bit hash of the group; the prompt's where there is none."""
        if not self.group:
            return self.prompt_key
        return _hash(f"group {self.group}")

    @functools.cached_property
    def pair_key(self) -> tuple[int, bool]:
        """64-bit hash of the prompt and both answers in either order, and which order this is.

        Copies share both; a pair and its contradiction share the hash alone.
        """
        chosen, rejected = _plain(self.chosen), _plain(self.rejected)
        first, second = sorted((chosen, rejected))
        text = json.dumps([_plain(self.prompt), self.tools, first, second])
        return _hash(text), chosen == first


def _plain(text: Text) -> str:
    if isinstance(text, str):
        return text
    turns = []
    for turn in text:
        fields = [turn.role, turn.content]
        if turn.extra:
            fields.append(turn.extra)
        turns.append(fields)
    return json.dumps(turns)


def _hash(text: str) -> int:
    """First 64 bits of SHA-256."""
    # Not hash(): it differs between processes, and a split must be the same on every machine.
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """A pair that is not used, and why. Those with the same reason are counted together."""

    reason: str
    filtered: bool = False
    """Whether an option or the data set's own rule excludes it. Otherwise it is invalid, which
    counts against data.max_dropped_fraction."""


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading items (characters, token ids, messages) that two sequences share."""
    # Bisection, not a loop over the items: comparing slices runs in C.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
