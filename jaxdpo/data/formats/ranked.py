"""Rows with several answers: a list of them in order or with ranks or scores, or two with a label that names the better one."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import PROMPTS, TIE, Outcome, Row, number, shown_columns
from jaxdpo.data.formats.preference import Dropped
from jaxdpo.data.formats.trl import pair
from jaxdpo.utils.text import printable

T = TypeVar("T")

LISTS = ("completions", "responses", "outputs", "output", "answers", "candidates", "generations")
TEXTS = ("text", "response", "completion", "output", "answer")
RANKS = ("rank", "ranks", "ranking")
SCORES = ("score", "scores", "rating", "ratings", "overall_score")
RANKED_COLUMNS = (*PROMPTS, *LISTS, *RANKS, *SCORES)

LABELS = ("label", "preference", "preferred", "winner", "better", "better_response_id", "choice")
SIDES = tuple(
    (stem + first, stem + second)
    for stem in (
        "response",
        "answer",
        "completion",
        "output",
        "conversation",
        "candidate",
        "generation",
        "text",
    )
    for first, second in (("_a", "_b"), ("_A", "_B"), ("_0", "_1"), ("_1", "_2"))
)
AB_COLUMNS = (*PROMPTS, *LABELS, *itertools.chain(*SIDES))
TIES = re.compile(r"(tie|draw|both|neither|none|same)\b")


# --- a list of answers ---


def parse_ranked(row: Row, section: DataSection) -> Iterator[Outcome]:
    """A prompt and a list of answers: by rank (0 or 1 is best), by score (more is better), or from best to worst as they stand.

    Raises:
        ValueError: there is no list, or ranks or scores do not fit it.
    """
    column = list_column(row)
    if column is None:
        raise ValueError(
            f"no column holds a list of answers ({', '.join(LISTS)}); columns found: {shown_columns(row)}"
        )
    answers = row[column]
    standings = _standings(row, column)
    ranked = [
        (standing, answer)
        for standing, answer in zip(standings, answers, strict=True)
        if standing is not None
    ]
    for better, worse in choose_pairs(ranked, section.pairing):
        yield pair(row, _text(better), _text(worse), column, column)
    if (reason := no_pair(ranked)) is not None:
        yield reason


def list_column(row: Row) -> str | None:
    """The column with a list of answers, if there is one."""
    return next((name for name in LISTS if isinstance(row.get(name), list)), None)


def is_ranked(row: Row) -> bool:
    """Whether a row has a list of answers and no chosen one."""
    return row.get("chosen") is None and list_column(row) is not None


def choose_pairs(ranked: Sequence[tuple[float, T]], rule: str) -> Iterator[tuple[T, T]]:
    """(better, worse) answers of one prompt from (standing, answer), less being better; equal standings make no pair."""
    ordered = sorted(ranked, key=lambda item: item[0])
    if rule == "best-worst":
        places = [(ordered[0], ordered[-1])] if ordered else []
    else:
        places = (
            itertools.pairwise(ordered)
            if rule == "adjacent"
            else itertools.combinations(ordered, 2)
        )
    yield from ((better, worse) for (first, better), (second, worse) in places if first < second)


def no_pair(ranked: Sequence[tuple[float, Any]]) -> Dropped | None:
    """Why these answers make no pair, if they make none."""
    if len(ranked) < 2:
        return Dropped("fewer than two ranked answers", by_rule=True)
    return Dropped(TIE, by_rule=True) if len({standing for standing, _ in ranked}) == 1 else None


def _standings(row: Row, column: str) -> list[float | None]:
    """Where each answer stands, less being better; None for one that has no rank or score."""
    answers = row[column]
    for names, sign in ((RANKS, 1.0), (SCORES, -1.0)):
        for name in names:
            inner = [answer.get(name) if isinstance(answer, dict) else None for answer in answers]
            values = row[name] if isinstance(row.get(name), list) else inner
            if any(value is not None for value in values):
                if len(values) != len(answers):
                    raise ValueError(
                        f"column {name!r} has {len(values)} values for {len(answers)} answers in column {column!r}"
                    )
                return [None if value is None else sign * number(value, name) for value in values]
    return [float(place) for place in range(len(answers))]


def _text(answer: Any) -> Any:
    """What an answer says: itself, or the text in an object that holds it beside its score."""
    if not isinstance(answer, dict) or {"role", "from"} & answer.keys():
        return answer
    return next((answer[name] for name in TEXTS if name in answer), answer.get("content", answer))


# --- two answers and a label ---


def parse_ab(row: Row, section: DataSection) -> Iterator[Outcome]:
    """A prompt, two answers in columns such as response_a and response_b, and the better one's letter or number, or tie.

    Raises:
        ValueError: a column is missing, or the label is not the letter or number of one of the two columns.
    """
    sides, label = _sides(row), _label_column(row)
    if sides is None or label is None:
        wanted = f"two columns such as response_a and response_b, and one of {', '.join(LABELS)}"
        raise ValueError(f"it must have {wanted}; columns found: {shown_columns(row)}")
    if row[label] is None:
        yield Dropped("no label")
        return
    text = _label(row[label])
    winners = [
        side for side in sides if re.search(rf"(^|[\W_]){side.rpartition('_')[2].lower()}$", text)
    ]
    if winners:
        better, worse = sides if winners == [sides[0]] else sides[::-1]
        yield pair(row, row[better], row[worse], better, worse)
    elif TIES.match(text):
        yield Dropped(TIE, by_rule=True)
    else:
        letters = " or ".join(side.rpartition("_")[2] for side in sides)
        raise ValueError(
            f"column {label!r} is {printable(repr(row[label]))}, must be {letters} (the better of {' and '.join(sides)}) or tie"
        )


def is_ab(row: Row) -> bool:
    """Whether a row has two answers and a label, and no chosen answer."""
    return row.get("chosen") is None and _sides(row) is not None and _label_column(row) is not None


def _sides(row: Row) -> tuple[str, str] | None:
    return next((sides for sides in SIDES if row.keys() >= set(sides)), None)


def _label_column(row: Row) -> str | None:
    return next((name for name in LABELS if name in row), None)


def _label(value: Any) -> str:
    """The label as text; 1 and 1.0 are the number of a column."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()
