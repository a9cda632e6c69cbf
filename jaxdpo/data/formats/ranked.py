"""Rows with a list of answers, in the order of ranks or scores.

    {"prompt": "Why?", "completions": ["So.", "No.", "Hm."], "scores": [4, 1, 3]}

Dropped, beyond what make_preference drops: null answers. Filtered: ties, and lists with fewer than
two ranked answers.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import PROMPTS, TIE, Outcome, Row, number, shown_columns
from jaxdpo.data.formats.preference import Dropped
from jaxdpo.data.formats.trl import pair

T = TypeVar("T")

# Names that data sets on the hub give these columns; the first of a tuple that a row has is read.
LISTS = ("completions", "responses", "outputs", "output", "answers", "candidates", "generations")
TEXTS = ("text", "response", "completion", "output", "answer")
RANKS = ("rank", "ranks", "ranking")
SCORES = ("score", "scores", "rating", "ratings", "overall_score")
RANKED_COLUMNS = (*PROMPTS, *LISTS, *RANKS, *SCORES)


def parse_ranked(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Parse a prompt and a list of answers.

    They are ordered by rank (0 or 1 is best), by score (more is better), or, without either, as
    they are listed, the best first; data.pairing says which of them are paired.

    Raises:
        ValueError: there is no list, or ranks or scores do not fit it.
    """
    column = list_column(row)
    if column is None:
        raise ValueError(
            f"no column holds a list of answers ({', '.join(LISTS)}); "
            f"columns found: {shown_columns(row)}"
        )
    ranked = []
    for rank, answer in zip(_ranks(row, column), row[column], strict=True):
        if rank is not None:
            ranked.append((rank, answer))
    for better, worse in choose_pairs(ranked, section.pairing):
        yield pair(row, _text(better), _text(worse), column, column)
    reason = no_pair(ranked)
    if reason is not None:
        yield reason


def list_column(row: Row) -> str | None:
    """The column with a list of answers, if there is one."""
    return next((name for name in LISTS if isinstance(row.get(name), list)), None)


def is_ranked(row: Row) -> bool:
    """Whether a row has a list of answers and no chosen one."""
    return row.get("chosen") is None and list_column(row) is not None


def choose_pairs(ranked: Sequence[tuple[float, T]], rule: str) -> Iterator[tuple[T, T]]:
    """(better, worse) answers of one prompt; equal ranks make no pair.

    Args:
        ranked: (rank, answer), a lower rank being better.
        rule: data.pairing: best-worst, adjacent or all.
    """
    ordered = sorted(ranked, key=lambda item: item[0])
    if rule == "adjacent":
        candidates = itertools.pairwise(ordered)
    elif rule == "all":
        candidates = itertools.combinations(ordered, 2)
    else:
        candidates = zip(ordered[:1], ordered[-1:], strict=True)
    for (first, better), (second, worse) in candidates:
        if first < second:
            yield better, worse


def no_pair(ranked: Sequence[tuple[float, Any]]) -> Dropped | None:
    """Why these answers make no pair; None if they make one."""
    if len(ranked) < 2:
        return Dropped("fewer than two ranked answers", filtered=True)
    ranks = {rank for rank, _ in ranked}
    return Dropped(TIE, filtered=True) if len(ranks) == 1 else None


def _ranks(row: Row, column: str) -> list[float | None]:
    """The rank of each answer, lower being better; None for one without a rank or score."""
    answers = row[column]
    for name in (*RANKS, *SCORES):
        sign = 1.0 if name in RANKS else -1.0
        if isinstance(row.get(name), list):
            values = row[name]
        else:
            values = [answer.get(name) if isinstance(answer, dict) else None for answer in answers]
        if all(value is None for value in values):
            continue
        if len(values) != len(answers):
            raise ValueError(
                f"column {name!r} has {len(values)} values for {len(answers)} answers "
                f"in column {column!r}"
            )
        return [None if value is None else sign * number(value, name) for value in values]
    return [float(position) for position in range(len(answers))]


def _text(answer: Any) -> Any:
    """An answer's text or messages: the item itself, or that of an object with other fields."""
    if not isinstance(answer, dict) or {"role", "from"} & answer.keys():
        return answer
    for name in TEXTS:
        if name in answer:
            return answer[name]
    return answer.get("content", answer)
