"""Rows with two answers and a label that names the better one.

    {"prompt": "Why?", "response_a": "So.", "response_b": "No.", "label": "A"}

Dropped, beyond what make_preference drops: null answers, and rows whose label is null or says that
the judge failed. Filtered: ties.
"""

import re
from collections.abc import Iterator

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import TIE, Outcome, Row, shown_columns, unread
from jaxdpo.data.formats.labels import FailedLabel, Sides, find_sides, read_label
from jaxdpo.data.formats.preference import Dropped
from jaxdpo.data.formats.prompt import prompt_columns, unfold, unfolded
from jaxdpo.data.formats.trl import has_answers, pair

# Names that data sets on the hub give these columns; the first that a row has is read.
LABELS = (
    "label", "preference", "preferred", "winner", "better", "better_response_id", "choice",
    "verdict",
)  # fmt: skip


def parse_ab(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Parse a prompt, two answers, and a label: the better one's letter or number, A>B, or tie.

    Raises:
        ValueError: a column is missing, the label is not understood, two labels disagree, or there
            is a third answer.
    """
    sides, labels = find_sides(row), label_columns(row)
    if sides is None or not labels:
        raise ValueError(
            "it must have two columns such as response_a and response_b, and one of "
            f"{', '.join(LABELS)}; columns found: {shown_columns(row)}"
        )
    _refuse_third_answer(row, sides)
    filled = [name for name in labels if row[name] is not None]
    if not filled:
        yield Dropped("no label")
        return
    try:
        better = _read(row, filled[0], sides)
    except FailedLabel as failed:
        yield Dropped(f"the label says {failed}")
        return
    for other in filled[1:]:
        if _contradicts(row, other, sides, better):
            raise ValueError(
                f"columns {filled[0]!r} and {other!r} prefer different answers. "
                "Remove or rename the one that is no label"
            )
    if better is None:
        yield Dropped(TIE, filtered=True)
        return
    chosen, rejected = sides.columns[better], sides.columns[1 - better]
    yield pair(row, row[chosen], row[rejected], chosen, rejected)


def unread_ab(row: Row, section: DataSection) -> Iterator[str]:
    """Columns of a row that are not read."""
    sides = find_sides(row)
    if sides is not None:
        labels = [name for name in label_columns(row) if row[name] is not None]
        prompt = prompt_columns(unfold(row))
        yield from unread(row, (*sides.columns, *labels[:1], *prompt))
        yield from unfolded(row)


def is_ab(row: Row) -> bool:
    """Whether a row has two answers and a label, and no chosen answer."""
    return not has_answers(row) and find_sides(row) is not None and bool(label_columns(row))


def label_columns(row: Row) -> list[str]:
    """The columns that may hold the label, the one to read first."""
    return [name for name in LABELS if name in row]


def _read(row: Row, column: str, sides: Sides) -> int | None:
    try:
        return read_label(row[column], *sides)
    except ValueError as error:
        raise ValueError(f"column {column!r} is {error}") from None


def _contradicts(row: Row, column: str, sides: Sides, better: int | None) -> bool:
    """Whether another column is a label too, and a different one."""
    try:
        return read_label(row[column], *sides) != better
    except (ValueError, FailedLabel):
        return False  # no label: it is counted among the columns that are not used


def _refuse_third_answer(row: Row, sides: Sides) -> None:
    """Raise for response_2 beside response_0 and response_1: a label of two would not know it."""
    stem = sides.columns[0].removesuffix(sides.endings[0])
    for name in row:
        is_more = re.fullmatch(rf"{re.escape(stem)}[A-Za-z0-9]", str(name)) is not None
        if is_more and name not in sides.columns and row[name] is not None:
            raise ValueError(
                f"column {name!r} is a third answer beside {' and '.join(sides.columns)}. "
                "Write the answers as a list in a column completions, with their scores"
            )
