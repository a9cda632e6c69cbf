"""What a preference pair is before it becomes tokens, and the count of what was read and dropped."""

import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_EXAMPLES = 5
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
    """A string or a list of {role, content}, as JSON gives them.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"column {column!r} is {type(value).__name__}, must be a string or a list of messages")
    return tuple(_message(item, f"message {number} of column {column!r}") for number, item in enumerate(value, start=1))


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or not isinstance(item.get("content"), str):
        shown = {key: type(value).__name__ for key, value in item.items()} if isinstance(item, dict) else type(item).__name__
        raise ValueError(f"{place} must be {{'role': string, 'content': string}}, is {printable(str(shown))}")
    return Message(item["role"], item["content"])


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON can spell half of a UTF-16 pair ("\\ud83d"), which no tokenizer takes."""
    return _LONE_SURROGATE.search(text) is None


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the first preferred. The three texts are all strings, or all messages with one in each answer."""

    prompt: Text
    chosen: Text
    rejected: Text
    id: str = ""
    """Where it came from: file:row (rows count from 1), or the row's own id column."""
    weight: float = 1.0
    """Factor of this pair in the loss."""

    @property
    def texts(self) -> list[str]:
        """All text that came from outside."""
        return [text for part in (self.prompt, self.chosen, self.rejected) for text in strings(part)]

    @functools.cached_property
    def prompt_key(self) -> int:
        """The prompt's first 64 bits of SHA-256: the same on every machine and for ever, unlike hash()."""
        text = self.prompt if isinstance(self.prompt, str) else json.dumps([[turn.role, turn.content] for turn in self.prompt])
        return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """A row that cannot be used, and why. Rows with the same reason are counted together."""

    reason: str


Parser = Callable[[Mapping[str, Any]], Preference | Dropped]
"""Reads one raw row. Returns Dropped for a row that is well formed but useless; raises ValueError for one of the wrong form."""


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
    """Number of unusable rows per reason."""
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Ids of the first rows dropped for each reason."""

    def drop(self, reason: str, row_id: str) -> None:
        """Count one unusable row."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(row_id)

    @property
    def dropped_fraction(self) -> float:
        """Share of the rows read that are unusable, 0 to 1."""
        return sum(self.dropped.values()) / max(self.rows_read, 1)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        dropped = {reason: {"count": count, "examples": self.examples[reason]} for reason, count in sorted(self.dropped.items())}
        counts = {name: getattr(self, name) for name in ("rows_read", "parsed", "kept", "special_text", "verbatim")}
        return {"name": self.name, "format": self.format, **counts, "dropped": dropped, "ignored_columns": list(self.ignored_columns)}


def describe_counts(report: Mapping[str, Any]) -> str:
    """DataReport.to_json() as one line for the console."""
    reasons = ", ".join(f"{drop['count']} {printable(reason)}" for reason, drop in report["dropped"].items())
    lost = f"; dropped {sum(drop['count'] for drop in report['dropped'].values())} ({reasons})" if reasons else ""
    ignored = f"; columns not used: {printable(', '.join(report['ignored_columns']))}" if report["ignored_columns"] else ""
    counts = f"{report['rows_read']} rows read, {report['parsed']} parsed, {report['kept']} kept"
    return f"{printable(report['name'])} [{report['format']}]: {counts}{lost}{ignored}"


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
    return "".join(char if _is_harmless(char) else char.encode("unicode_escape").decode("ascii") for char in text)


def _is_harmless(char: str) -> bool:
    return char == "\n" or (unicodedata.category(char)[0] != "C" and char not in "\u2028\u2029")
