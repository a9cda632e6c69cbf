"""stanfordnlp/SHP: a post, two comments on it, their scores, and which is preferred."""

from collections.abc import Iterator

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import (
    Outcome,
    Row,
    checked,
    number,
    require,
    said,
    string,
    with_system,
)
from jaxdpo.data.formats.preference import Dropped

COLUMNS = ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")
SUBREDDITS = (
    *(
        "askacademia",
        "askanthropology",
        "askbaking",
        "askcarguys",
        "askculinary",
        "askdocs",
        "askengineers",
        "askhistorians",
        "askhr",
    ),
    *(
        "askphilosophy",
        "askphysics",
        "askscience",
        "asksciencefiction",
        "asksocialscience",
        "askvet",
        "changemyview",
    ),
    *("explainlikeimfive", "legaladvice"),
)
PAIRS_PER_POST = 5
"""A few posts have most of the pairs; the set's authors train on no more than these of each."""


def parse_shp(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Label 1 prefers comment A, 0 comment B. Pairs whose scores are closer than data.shp.min_score_ratio are left out.

    Raises:
        ValueError: a column is missing or has the wrong type.
    """
    require(row, *COLUMNS)
    label, scores = (
        number(row["labels"], "labels"),
        {side: number(row[f"score_{side}"], f"score_{side}") for side in "AB"},
    )
    if label not in (0, 1):
        raise ValueError(
            f"column 'labels' is {label:g}, must be 1 (A is preferred) or 0 (B is preferred)"
        )
    better, worse = "AB" if label == 1 else "BA"
    if scores[better] < scores[worse]:
        yield Dropped("label and scores disagree")
    elif not _is_clear(scores[better], scores[worse], section.shp.min_score_ratio):
        yield Dropped(f"score ratio below {section.shp.min_score_ratio:g}", by_rule=True)
    else:
        answers = (said("assistant", string(row, f"human_ref_{side}")) for side in (better, worse))
        yield checked(row, with_system(row, said("user", string(row, "history"))), *answers)


def is_shp(row: Row) -> bool:
    """Whether a row looks like SHP."""
    return {"history", "human_ref_A", "human_ref_B", "labels"} <= row.keys()


def _is_clear(better: float, worse: float, ratio: float) -> bool:
    """Whether better / worse reaches the ratio. Votes can sum to 0 or less: any positive score is clearly better than that."""
    return better > max(worse, 0) and better >= ratio * worse
