"""Text from outside, made safe to print; whether it can be encoded."""

import re
import unicodedata

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON can spell half of a UTF-16 pair ("\\ud83d"), which no tokenizer takes."""
    return _LONE_SURROGATE.search(text) is None


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


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Text without control characters (but newline and tab), which could drive or disguise what a terminal shows.

    >>> clean("a\\x1b[31mb\\nc")
    'a[31mb\\nc'
    """
    return _CONTROL.sub("", text)
