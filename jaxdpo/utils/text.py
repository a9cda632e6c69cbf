"""Text from outside, made safe to show; whether it can be encoded.

Two functions, for two readers. `printable` is for text that is inspected (data, file names,
errors): every character that cannot be seen is written out. `clean` is for text that is read, such
as a model's answer: it removes only what drives a terminal or reorders a line, since escapes would
spoil emoji and the joiners of Persian or Hindi.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# C0 and C1 controls but tab and newline, and what changes a line's direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def has_content(value: Any) -> bool:
    """Whether a value says something: not null, no empty or blank text, nothing made of such.

    >>> has_content([{"bytes": None, "path": ""}]), has_content(0), has_content(False)
    (False, True, True)
    """
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(has_content(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(has_content(item) for item in value)
    return value is not None


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON can spell half of a UTF-16 pair ("\\ud83d"), which no
    tokenizer accepts."""
    return _LONE_SURROGATE.search(text) is None


def printable(text: str) -> str:
    """The text with all invisible characters but newlines as escapes.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    shown = ""
    for char in text:
        # Category C: control, format, surrogate, private, unassigned. Then two line separators.
        hidden = unicodedata.category(char).startswith("C") or char in "\u2028\u2029"
        if hidden and char != "\n":
            char = char.encode("unicode_escape").decode("ascii")
        shown += char
    return shown


def clean(text: str) -> str:
    """The text without control characters (tabs and newlines stay), which could drive a terminal or
    disguise a line.

    >>> clean("a\\x1b[31mb\\nc")
    'a[31mb\\nc'
    """
    return _CONTROL.sub("", text)
