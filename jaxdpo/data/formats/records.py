"""What a preference pair is before it becomes tokens, and the count of what was read and dropped."""

import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MAX_EXAMPLES = 5
_ROLES_OF_FROM = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function_response", "observation"), "tool"),
    "system": "system",
}
"""Roles of turns that are written as {from, value}."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


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


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON can spell half of a UTF-16 pair ("\\ud83d"), which no tokenizer takes."""
    return _LONE_SURROGATE.search(text) is None


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


@dataclasses.dataclass
class DataReport:
    """Counts of one data set, from the first row read to the pairs that are trained on."""

    name: str
    format: str = ""
    rows_read: int = 0
    parsed: int = 0
    """Rows that the parser turned into a preference."""
    kept: int = 0
    """Pairs that were left after encoding and truncation too."""
    special_text: int = 0
    """Rows whose text spells one of the tokenizer's special tokens."""
    verbatim: int = 0
    """Rows of plain strings, which no chat template touches."""
    ignored_columns: tuple[str, ...] = ()
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of unusable pairs per reason."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of pairs that a rule leaves out, per reason."""
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Ids of the first pairs dropped or left out for each reason."""

    def drop(self, dropped: Dropped, pair_id: str) -> None:
        """Count one pair that is not used."""
        counts = self.left_out if dropped.by_rule else self.dropped
        counts[dropped.reason] = counts.get(dropped.reason, 0) + 1
        examples = self.examples.setdefault(dropped.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(pair_id)

    @property
    def dropped_fraction(self) -> float:
        """Share of the pairs that no rule leaves out which are unusable, 0 to 1."""
        dropped = sum(self.dropped.values())
        return dropped / max(self.kept + dropped, 1)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        counts = {
            name: getattr(self, name)
            for name in ("rows_read", "parsed", "kept", "special_text", "verbatim")
        }
        lost = {"dropped": self._reasons(self.dropped), "left_out": self._reasons(self.left_out)}
        return {
            "name": self.name,
            "format": self.format,
            **counts,
            **lost,
            "ignored_columns": list(self.ignored_columns),
        }

    def _reasons(self, counts: Mapping[str, int]) -> dict[str, Any]:
        return {
            reason: {"count": count, "examples": self.examples[reason]}
            for reason, count in sorted(counts.items())
        }


def describe_counts(report: Mapping[str, Any]) -> str:
    """DataReport.to_json() as one line for the console."""
    lost = _describe_reasons("dropped", report["dropped"]) + _describe_reasons(
        "left out", report["left_out"]
    )
    ignored = (
        f"; columns not used: {printable(', '.join(report['ignored_columns']))}"
        if report["ignored_columns"]
        else ""
    )
    counts = f"{report['rows_read']} rows read, {report['parsed']} parsed, {report['kept']} kept"
    return f"{printable(report['name'])} [{report['format']}]: {counts}{lost}{ignored}"


def _describe_reasons(verb: str, reasons: Mapping[str, Any]) -> str:
    each = ", ".join(f"{item['count']} {printable(reason)}" for reason, item in reasons.items())
    return f"; {verb} {sum(item['count'] for item in reasons.values())} ({each})" if reasons else ""


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


def printable(text: str) -> str:
    """The text with everything that could steer a terminal or reorder a line written as an escape; line breaks stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(
        char if _is_harmless(char) else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def _is_harmless(char: str) -> bool:
    return char == "\n" or (unicodedata.category(char)[0] != "C" and char not in "\u2028\u2029")
