"""What a preference pair is before it becomes tokens, and the count of what was read and dropped."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from jaxdpo.utils.text import printable

_ROLES_OF_FROM = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function_response", "observation"), "tool"),
    "system": "system",
}
"""Roles of turns that are written as {from, value}."""


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str


Turns = tuple[Message, ...]
Text = str | Turns
"""Plain text that is used verbatim, or turns that a chat template lays out."""


def strings(text: Text) -> list[str]:
    """A plain text, or what is said in each turn."""
    return [text] if isinstance(text, str) else [turn.content for turn in text]


def read_text(value: Any, column: str) -> Text:
    """A string or messages, as JSON gives them: a list of {role, content} or {from, value}, or one of them alone.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return (_message(value, f"column {column!r}"),)
    if not isinstance(value, list):
        raise ValueError(
            f"column {column!r} is {type(value).__name__}, must be a string or a list of messages"
        )
    return tuple(
        _message(item, f"message {number} of column {column!r}")
        for number, item in enumerate(value, start=1)
    )


def _message(item: Any, place: str) -> Message:
    keys = item if isinstance(item, dict) else {}
    role = (
        _ROLES_OF_FROM.get(keys["from"]) if isinstance(keys.get("from"), str) else keys.get("role")
    )
    content = _content(keys.get("value" if "from" in keys else "content"), place)
    if not isinstance(role, str) or content is None:
        shown = (
            {key: type(value).__name__ for key, value in item.items()}
            if isinstance(item, dict)
            else type(item).__name__
        )
        raise ValueError(
            f"{place} must be {{'role': string, 'content': string}}, is {printable(str(shown))}"
        )
    if keys.get("tool_calls"):
        raise ValueError(
            f"{place} calls a tool in tool_calls, which is not read. Write the call into the content, or leave such rows out"
        )
    return Message(role, content)


def _content(value: Any, place: str) -> str | None:
    """What a message says: a string, or blocks of text that follow each other."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = [
        block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None
        for block in value
    ]
    for number, (block, text) in enumerate(zip(value, texts, strict=True), start=1):
        if not isinstance(text, str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            raise ValueError(
                f"{place}: block {number} of its content is {printable(repr(kind))}; only blocks of text can be read"
            )
    return "".join(map(str, texts))


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the first preferred. The three texts are all strings, or all messages.

    An answer of messages begins and ends with a turn of the assistant; most have just this one.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    id: str = ""
    """Where it came from: file:row (rows count from 1), or the row's own id column."""
    weight: float = 1.0
    """Factor of this pair in the loss."""
    margin: float = 0.0
    """By how much the chosen answer should win, in units of the logit."""
    tools: str = ""
    """JSON list of the tools that the chat template is told of."""
    root: Text | None = None
    """The beginning of the prompt that decides on which side of a split the pair goes, so that a tree of messages stays together.
    None: the whole prompt."""

    @property
    def texts(self) -> list[str]:
        """All text that came from outside."""
        return [
            *(text for part in (self.prompt, self.chosen, self.rejected) for text in strings(part)),
            self.tools,
        ]

    @functools.cached_property
    def prompt_key(self) -> int:
        """Hash of the prompt (or of its root) that a split goes by."""
        return _hash(_plain(self.prompt if self.root is None else self.root))

    @functools.cached_property
    def pair_key(self) -> tuple[int, bool]:
        """Hash of the prompt and both answers in either order, and which order this is: contradictions share the hash alone."""
        chosen, rejected = _plain(self.chosen), _plain(self.rejected)
        first, second = sorted((chosen, rejected))
        return _hash(json.dumps([_plain(self.prompt), self.tools, first, second])), chosen == first


def _plain(text: Text) -> str:
    return (
        text if isinstance(text, str) else json.dumps([[turn.role, turn.content] for turn in text])
    )


def _hash(text: str) -> int:
    """First 64 bits of SHA-256: the same on every machine and for ever, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """A pair that is not used, and why. Those with the same reason are counted together."""

    reason: str
    by_rule: bool = False
    """Left out because an option or the set's own rule says so; else it cannot be used, which counts against
    data.max_dropped_fraction."""


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading items (characters, token ids, messages) that two sequences share."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is much faster than a loop over items
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
