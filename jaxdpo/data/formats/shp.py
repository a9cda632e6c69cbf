"""stanfordnlp/SHP: a post, two comments on it, their scores, and which one is preferred.

    {"history": "How long ...?", "human_ref_A": "Seven minutes", "human_ref_B": "Until it is done",
     "labels": 1, "score_A": 340, "score_B": 166}

Label 1 prefers comment A, 0 comment B. Dropped, beyond what make_preference drops: rows whose label
and scores disagree. Filtered: rows whose scores are closer than data.shp.min_score_ratio, and (by
sources.py) training pairs of one post beyond PAIRS_PER_POST.
"""

from collections.abc import Iterator

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import (
    Outcome,
    Row,
    make_preference,
    number,
    one_turn,
    require,
    string,
    unread,
    with_system,
)
from jaxdpo.data.formats.preference import Dropped

COLUMNS = ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")
SUBREDDITS = (
    "askacademia", "askanthropology", "askbaking", "askcarguys", "askculinary", "askdocs",
    "askengineers", "askhistorians", "askhr", "askphilosophy", "askphysics", "askscience",
    "asksciencefiction", "asksocialscience", "askvet", "changemyview", "explainlikeimfive",
    "legaladvice",
)  # fmt: skip
PAIRS_PER_POST = 5
"""A few posts have most of the pairs; the set's authors train on at most this many of each."""


def parse_shp(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Parse a row of SHP.

    Raises:
        ValueError: a column is missing or has the wrong type.
    """
    require(row, *COLUMNS)
    label = number(row["labels"], "labels")
    scores = {side: number(row[f"score_{side}"], f"score_{side}") for side in "AB"}
    if label not in (0, 1):
        raise ValueError(
            f"column 'labels' is {label:g}, must be 1 (A is preferred) or 0 (B is preferred)"
        )
    better, worse = "AB" if label == 1 else "BA"
    ratio = section.shp.min_score_ratio
    if scores[better] < scores[worse]:
        yield Dropped("label and scores disagree")
    elif not _is_clear(scores[better], scores[worse], ratio):
        yield Dropped(f"score ratio below {ratio:g}", filtered=True)
    else:
        prompt = with_system(row, one_turn("user", string(row, "history")))
        chosen = one_turn("assistant", string(row, f"human_ref_{better}"))
        rejected = one_turn("assistant", string(row, f"human_ref_{worse}"))
        post = row.get("post_id")
        group = post if isinstance(post, str) else ""
        yield make_preference(row, prompt, chosen, rejected, group=group)


def unread_shp(row: Row, section: DataSection) -> Iterator[str]:
    """Columns of a row that are not read."""
    return unread(row, (*COLUMNS, "post_id"))


def is_shp(row: Row) -> bool:
    """Whether a row looks like SHP."""
    return {"history", "human_ref_A", "human_ref_B", "labels"} <= row.keys()


def _is_clear(better: float, worse: float, ratio: float) -> bool:
    """Whether better / worse reaches the ratio."""
    # Votes can sum to 0 or less, where a ratio means nothing: any positive score beats those.
    return better > max(worse, 0) and better >= ratio * worse
