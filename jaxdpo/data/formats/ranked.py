"""Rows with a list of answers, in the order of ranks or scores.

    {"prompt": "Why?", "completions": ["So.", "No.", "Hm."], "scores": [4, 1, 3]}

Dropped, beyond what make_preference drops: null answers. Filtered: ties, and lists with fewer than
two ranked answers.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxdpo.config.data_options import ORDER, DataSection
from jaxdpo.data.formats.common import (
    OPTIONAL,
    PROMPTS,
    ROW_NUMBERS,
    TIE,
    Outcome,
    Row,
    number,
    shown_columns,
    unread,
)
from jaxdpo.data.formats.listed_text import read_list
from jaxdpo.data.formats.preference import Dropped
from jaxdpo.data.formats.prompt import prompt_columns, unfold, unfolded
from jaxdpo.data.formats.trl import has_answers, pair
from jaxdpo.utils.text import has_content, printable

T = TypeVar("T")

# Names that data sets on the hub give these columns; the first of a tuple that a row has is read.
LISTS = ("completions", "responses", "outputs", "output", "answers", "candidates", "generations")
TEXTS = ("text", "response", "completion", "output", "answer")
RANKS = ("rank", "ranks", "ranking")
SCORES = ("score", "scores", "rating", "ratings", "overall_score")

_MESSAGE = ("role", "content", "from", "value")
_SAYS_WHICH = frozenset(
    {
        "best", "better", "chosen", "correct", "selected", "accepted", "win", "wins", "winner",
        "gold", "label", "labels", "score", "scores", "rank", "ranks", "ranking", "rating",
        "ratings", "reward", "rewards", "vote", "votes", "upvotes", "grade", "grades", "quality",
        "preference", "preferences", "preferred", "annotation", "annotations", "feedback",
        "judgment", "judgments", "judgement", "judge", "verdict", "rejected", "evaluation",
        "comparison", "order", "ordering", "choice", "picked", "favorite", "favourite",
        "answer", "target", "truth", "solution", "expected",
    }
)  # fmt: skip
"""Words in the name of a column beside a list of answers that may say which of them is better."""
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_NUMBERS = re.compile(
    rf"[\[(]?\s*{_NUMBER}(?:[\s,;|]+{_NUMBER})*\s*[\])]?|true|false|yes|no|[a-z]", re.IGNORECASE
)
"""Text that is a number, some numbers, a yes or no, or the letter of an answer."""


# --- pairs of a row ---


def parse_ranked(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Parse a prompt and a list of answers.

    They are ordered by rank (0 or 1 is best) or by score (more is better); only bare texts, beside
    which nothing may say otherwise, in the order in which they are listed, the best first.
    data.pairing says which of them are paired.

    Raises:
        ValueError: there is no list, ranks or scores do not fit it, or it is not certain which
            answer is better.
    """
    column = list_column(row)
    if column is None:
        raise ValueError(
            f"no column holds a list of answers ({', '.join(LISTS)}); "
            f"columns found: {shown_columns(row)}"
        )
    answers = read_list(row[column]) or []
    ranked = []
    ranks = [*RANKS, *SCORES, section.score or ""]
    if section.score == ORDER:  # which says that numbers beside the answers do not rank them
        ranks += [name.partition(".")[2] for name in _unsure_fields(answers, column)]
    for rank, answer in zip(_ranks(row, column, answers, section.score), answers, strict=True):
        if rank is not None:
            ranked.append((rank, answer))
    for better, worse in choose_pairs(ranked, section.pairing):
        yield pair(row, _text(better, ranks), _text(worse, ranks), column, column)
    reason = no_pair(ranked)
    if reason is not None:
        yield reason


def list_column(row: Row) -> str | None:
    """The column with a list of answers, if there is one."""
    return next((name for name in LISTS if read_list(row.get(name)) is not None), None)


def unread_ranked(row: Row, section: DataSection) -> Iterator[str]:
    """Columns of a row, and fields of its answers, that are not read."""
    column = list_column(row)
    if column is None:
        return
    answers = read_list(row[column]) or []
    found: list[Ranking] = []
    if section.score != ORDER:
        found = rankings(row, column, answers, section.score)[:1]
    read = [column, *prompt_columns(unfold(row))]
    read += [ranking.name for ranking in found if ranking.in_row]
    yield from unread(row, read)
    yield from unfolded(row)
    in_answers = [ranking.name for ranking in found if not ranking.in_row]
    for name in _fields(answers):
        for answer in answers:
            if _text_field(answer) in (None, name) or name in in_answers:
                continue
            if has_content(answer.get(name)):
                yield f"{column}.{name}"
                break


def is_ranked(row: Row) -> bool:
    """Whether a row has a list of answers and no chosen one."""
    return not has_answers(row) and list_column(row) is not None


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


def _text(answer: Any, ranks: Collection[str]) -> Any:
    """An answer's text or messages: the item itself, or that of an object with other fields.

    Args:
        ranks: the names of ranks and scores.
    """
    name = _text_field(answer)
    if name is not None:
        return answer[name]
    if isinstance(answer, dict):  # a message, beside what ranks it
        return {key: item for key, item in answer.items() if key not in ranks}
    return answer


def _text_field(answer: Any) -> str | None:
    """The field of an object that is the answer; None where the item itself is."""
    if not isinstance(answer, dict) or {"role", "from"} & answer.keys():
        return None
    return next((name for name in (*TEXTS, "content") if name in answer), None)


# --- which answer is better ---


class Ranking(NamedTuple):
    """One value for each answer, from a column or from a field of the answers."""

    name: str
    in_row: bool
    """Whether it is a column with a list; else each answer has a field of this name."""
    values: list[float | None]
    """Lower is better."""


def _ranks(row: Row, column: str, answers: list[Any], score: str | None) -> list[float | None]:
    """The rank of each answer, lower being better; None for one without a rank or score."""
    if score != ORDER:
        found = rankings(row, column, answers, score)
        if found:
            _refuse_disagreement(found)
            return found[0].values
        if score is not None:
            raise ValueError(
                f"data.score={printable(score)}: neither a column of that name nor a field of the "
                f"answers in column {column!r}; columns found: {shown_columns(row)}, "
                f"fields: {', '.join(_fields(answers)) or 'none'}"
            )
        unsure = [*_unsure_fields(answers, column), *_unsure_columns(row, column, answers)]
        if unsure:
            raise ValueError(
                f"which answer of column {column!r} is better is not certain: "
                f"{printable(', '.join(unsure))} may say so, under no known name "
                f"({', '.join((*RANKS, *SCORES))}). Set data.score=<field> (more is better), or "
                f"data.score={ORDER} if the answers are listed best first"
            )
    elif ORDER in row or ORDER in _fields(answers):
        raise ValueError(
            f"data.score={ORDER} means the order in which answers are listed, and the row has a "
            f"field {ORDER!r} too. Rename the field"
        )
    return [float(position) for position in range(len(answers))]


def rankings(row: Row, column: str, answers: list[Any], score: str | None) -> list[Ranking]:
    """What orders the answers, the first to be used: that with values, if any has some.

    Raises:
        ValueError: there are more or fewer values than answers, or a value is no number.
    """
    names = (*RANKS, *SCORES) if score is None else (score,)
    empty, filled = [], []
    for name in names:
        values = read_list(row.get(name))
        is_column = values is not None
        if values is None:  # a number beside the answers' own is not one of theirs
            values = [answer.get(name) if isinstance(answer, dict) else None for answer in answers]
            is_null = name in row and row[name] is None
            if name not in _fields(answers) and not is_null:
                continue
        if len(values) != len(answers):
            raise ValueError(
                f"column {name!r} has {len(values)} values for {len(answers)} answers "
                f"in column {column!r}"
            )
        sign = 1.0 if name in RANKS and score is None else -1.0
        numbers = [None if value is None else sign * _score(value, name, score) for value in values]
        kind = empty if all(value is None for value in numbers) else filled
        kind.append(Ranking(name, is_column, numbers))
    return filled or empty


def _score(value: Any, name: str, score: str | None) -> float:
    # Where the user names the field, true is better than false.
    if score is not None and isinstance(value, bool):
        return float(value)
    return number(value, name)


def _refuse_disagreement(found: list[Ranking]) -> None:
    """Raise where two fields order two answers in opposite ways."""
    first = found[0]
    for other in found[1:]:
        known = []
        for a, b in zip(first.values, other.values, strict=True):
            if a is not None and b is not None:
                known.append((a, b))
        for (a, b), (c, d) in itertools.combinations(known, 2):
            if (a - c) * (b - d) < 0:
                raise ValueError(
                    f"{first.name!r} and {other.name!r} order the answers differently. "
                    f"Set data.score={other.name} or another, or remove one"
                )


def _fields(answers: list[Any]) -> list[str]:
    """The fields of the answers that are objects."""
    names: dict[str, None] = {}
    for answer in answers:
        if isinstance(answer, Mapping):
            names.update(dict.fromkeys(map(str, answer)))
    return list(names)


def _unsure_fields(answers: list[Any], column: str) -> Iterator[str]:
    """Fields of answers beside their text: of a message those that are numbers, else all."""
    for name in _fields(answers):
        for answer in answers:
            if not isinstance(answer, Mapping) or name in (_text_field(answer), *_MESSAGE):
                continue
            value = answer.get(name)
            is_number = isinstance(value, bool | int | float)
            if is_number or (_text_field(answer) is not None and has_content(value)):
                yield f"{column}.{name}"
                break


def _unsure_columns(row: Row, column: str, answers: list[Any]) -> Iterator[str]:
    """Columns beside the answers that may say which is better.

    They are numbers, also as text or in objects; telling names; and text that is one of the answers
    (or its letter).
    """
    texts = {answer.strip() for answer in answers if isinstance(answer, str)}
    for name, value in row.items():
        if name in (column, *PROMPTS, *OPTIONAL) or not has_content(value):
            continue
        values = read_list(value)
        if name in LISTS and values is not None:
            continue  # another list of answers
        words = re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", str(name))
        is_telling = not _SAYS_WHICH.isdisjoint(word.lower() for word in words)
        if values is not None:
            is_unsure = is_telling or _may_rank(values, len(answers))
        elif is_telling or (isinstance(value, str) and value.strip() in texts):
            is_unsure = True
        else:
            is_unsure = _says_number(value) and not ROW_NUMBERS.fullmatch(str(name))
        if is_unsure:
            yield str(name)


def _may_rank(values: list[Any], count: int) -> bool:
    """Whether a list has something beside plain text for each answer."""
    if any(isinstance(item, list) and _may_rank(item, count) for item in values):
        return True
    return len(values) == count and any(
        not isinstance(item, str) or _says_number(item) for item in values
    )


def _says_number(value: Any) -> bool:
    """Whether a value is a number or holds one, as text too."""
    if isinstance(value, str):
        return _NUMBERS.fullmatch(value.strip()) is not None
    if isinstance(value, Mapping):
        for name, item in value.items():
            if _says_number(item) and not ROW_NUMBERS.fullmatch(str(name)):
                return True
        return False
    return isinstance(value, bool | int | float)
