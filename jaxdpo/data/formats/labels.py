"""Labels that say which of two answers is the better one: A, response_b, A>B, [[B>>A]], tie.

A label is matched as a whole: "A>B" and "B is worse than A" hold both letters, so neither the first
nor the last of them says anything. What is not in the tables below is an error, not a guess.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxdpo.data.formats.common import Row
from jaxdpo.utils.text import printable

TIES = frozenset(
    {
        "tie", "tied", "draw", "equal", "same", "the same", "about the same", "both", "neither",
        "none", "both good", "both bad", "bothgood", "bothbad", "tie (both good)",
        "tie (both bad)", "tie (bothgood)", "tie (bothbad)", "no preference",
    }
)  # fmt: skip
"""Labels of a tie, in lower case and with spaces for underscores and hyphens."""
FAILURES = frozenset({"error", "invalid", "failed"})
"""What judges write in place of a label where they came to none."""

_NOUNS = "model|assistant|response|answer|completion|output|candidate|option|choice|generation|text"
_BRACKETS = re.compile(r"\[\[(.*)\]\]|\[(.*)\]|\((.*)\)|\"(.*)\"|'(.*)'", re.DOTALL)
_COMPARISON = re.compile(
    r"(?P<left>[^<>=~≈]+?)\s*(?P<sign>>{1,3}|<{1,3}|={1,2}|[~≈])\s*(?P<right>[^<>=~≈]+)"
)
_DEGREE = r"(?:(?:much|far|clearly|significantly|slightly|marginally|somewhat|a bit|a lot) )?"
_SENTENCE = re.compile(
    rf"(?:the )?(?P<better>.+?) (?:is|was) {_DEGREE}(?:better|preferred|the better one|the winner)"
    r"(?: (?:than|over|to) (?:the )?(?P<worse>.+?))?\.?"
)
_VICTORY = re.compile(r"(?P<better>.+?) (?:wins|won)\.?")


STEMS = (
    "response", "answer", "completion", "output", "conversation", "candidate", "generation", "text"
)  # fmt: skip
ENDINGS = (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))


class Sides(NamedTuple):
    """The columns of two answers."""

    columns: tuple[str, str]
    """E.g. response_a and response_b."""
    endings: tuple[str, str]
    """The letter or number of each: a and b."""


def _all_sides() -> Iterator[Sides]:
    for stem in STEMS:
        for first, second in ENDINGS:
            for mark in ("_", ""):
                columns = (f"{stem}{mark}{first}", f"{stem}{mark}{second}")
                yield Sides(columns, (first, second))


SIDES = tuple(_all_sides())
"""Names of the columns of two answers."""


class FailedLabel(Exception):
    """The label says that the judge came to no verdict."""


def find_sides(row: Row) -> Sides | None:
    """The columns of the two answers, if the row has such."""
    return next((sides for sides in SIDES if row.keys() >= set(sides.columns)), None)


def refuse_labels(row: Row, chosen: Any, rejected: Any) -> None:
    """Check that the answers are texts, and do not name other columns with the answers.

    Raises:
        ValueError: they do: {"response_a": "So.", "response_b": "No.", "chosen": "a", ...}.
    """
    sides = find_sides(row)
    if sides is None or not isinstance(chosen, str) or not isinstance(rejected, str):
        return
    try:
        named = {read_label(chosen, *sides), read_label(rejected, *sides)}
    except (ValueError, FailedLabel):
        return
    if named == {0, 1}:
        raise ValueError(
            f"{printable(repr(chosen))} and {printable(repr(rejected))} are no answers but name "
            f"the columns {' and '.join(sides.columns)}. Remove the column of the rejected one, "
            "and rename the other to label"
        )


def read_label(value: Any, columns: tuple[str, str], endings: tuple[str, str]) -> int | None:
    """Which column a label prefers: 0 or 1, or None for a tie.

    Args:
        value: the label.
        columns: the names of the two columns of answers, e.g. response_a and response_b.
        endings: the letter or number of each, e.g. a and b.

    Raises:
        ValueError: it is none of the labels that are understood.
        FailedLabel: it says that there is none.

    >>> read_label("[[A>>B]]", ("response_a", "response_b"), ("a", "b"))
    0
    >>> read_label("Model B is better", ("response_a", "response_b"), ("a", "b"))
    1
    """
    text = _plain(value)
    if text in FAILURES:
        raise FailedLabel(text)
    if text in TIES:
        return None
    names = {}
    for side in (0, 1):
        names[_spaced(columns[side].lower())] = side
        names[endings[side].lower()] = side
    side = _side(text, names)
    if side is not None:
        return side
    found = _COMPARISON.fullmatch(text)
    if found:
        left, right = _side(found["left"], names), _side(found["right"], names)
        if left is not None and right is not None and left != right:
            if found["sign"][0] == ">":
                return left
            return right if found["sign"][0] == "<" else None
    for pattern in (_SENTENCE, _VICTORY):
        found = pattern.fullmatch(text)
        if found:
            better, other = _side(found["better"], names), found.groupdict().get("worse")
            if better is not None and (other is None or _side(other, names) == 1 - better):
                return better
    raise ValueError(
        f"{printable(repr(value)[:80])}, must be {endings[0]} or {endings[1]} "
        f"(the better of {columns[0]} and {columns[1]}) or tie"
    )


def _side(text: str, names: dict[str, int]) -> int | None:
    """0 or 1 for the name of a side, e.g. b, response b, model b; None for anything else."""
    text = text.strip()
    if text in names:
        return names[text]
    named = re.fullmatch(rf"(?:the )?(?:{_NOUNS}) ?(\w+)", text)
    return names.get(named[1]) if named else None


def _plain(value: Any) -> str:
    """A label in lower case, without brackets and quotes around it; 1.0 is the number 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        return ""  # of a list or an object nothing is a label
    text = str(value).strip()
    while found := _BRACKETS.fullmatch(text):
        text = next(group for group in found.groups() if group is not None).strip()
    text = re.sub(r"(?<=\d)\.0\Z", "", text)  # a number that went through a column of floats
    return _spaced(text.lower())


def _spaced(text: str) -> str:
    """Text with one space for each run of spaces, underscores and hyphens between words."""
    # Between words only: the hyphen of -1 is a sign.
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", text).strip()
