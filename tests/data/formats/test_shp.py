from typing import Any

import pytest

from jaxdpo.config.data_options import ShpSection
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.formats.shp import is_shp, parse_shp
from tests.data.rows import Write, collect, one


def shp(label: int, score_a: int, score_b: int, post: str = "p1", ref: str = "A") -> dict[str, Any]:
    """A row with the set's columns and types; the label is 1 where A is preferred."""
    return {
        "post_id": post,
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": f"How long do I boil an egg? ({post})",
        "c_root_id_A": "hkh25sc",
        "c_root_id_B": "hkh25lp",
        "created_at_utc_A": 1636822112,
        "created_at_utc_B": 1636822110,
        "score_A": score_a,
        "score_B": score_b,
        "human_ref_A": f"{ref}: seven minutes",
        "human_ref_B": "B: until it is done",
        "labels": label,
        "seconds_difference": 2.0,
        "score_ratio": 2.0,
    }


def test_label_1_prefers_a_and_label_0_prefers_b() -> None:
    for label, scores, chosen in [
        (1, (340, 166), "A: seven minutes"),
        (0, (3, 30), "B: until it is done"),
    ]:
        found = one(parse_shp, shp(label, *scores))
        assert isinstance(found, Preference) and found.prompt == (
            Message("user", "How long do I boil an egg? (p1)"),
        )
        assert found.chosen == (Message("assistant", chosen),) and found.rejected != found.chosen


@pytest.mark.parametrize(
    ("label", "scores", "outcome"),
    [
        (1, (4, 2), None),
        (1, (3, 2), Dropped("score ratio below 2", filtered=True)),
        (0, (1, 1), Dropped("score ratio below 2", filtered=True)),
        (1, (1, 0), None),
        (0, (-4, 1), None),
        (1, (0, 0), Dropped("score ratio below 2", filtered=True)),
        (1, (0, -3), Dropped("score ratio below 2", filtered=True)),
        (1, (2, 8), Dropped("label and scores disagree")),
        (0, (0, -1), Dropped("label and scores disagree")),
    ],
)
def test_close_scores_are_filtered_without_division_by_zero(
    label: int, scores: tuple[int, int], outcome: Dropped | None
) -> None:
    found = one(parse_shp, shp(label, *scores))
    assert found == outcome if outcome else isinstance(found, Preference)
    assert isinstance(one(parse_shp, shp(1, 3, 2), shp=ShpSection(min_score_ratio=1.5)), Preference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": True}, "column 'labels' is True, must be a number"),
        ({"labels": 2}, "column 'labels' is 2, must be 1 .A is preferred. or 0"),
        ({"score_A": None}, "column 'score_A' is None"),
        ({"history": 7}, "column 'history' is int"),
    ],
)
def test_wrong_types_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(parse_shp, {**shp(1, 9, 1), **change})
    with pytest.raises(ValueError, match="column 'score_B' is missing"):
        one(parse_shp, {key: value for key, value in shp(1, 9, 1).items() if key != "score_B"})


def test_five_pairs_of_a_post_are_trained_on_and_all_are_validated_on(write: Write) -> None:
    path = write(
        "train.jsonl",
        [*(shp(1, 9, 1, ref=f"A{i}") for i in range(7)), shp(1, 9, 1, post="p2"), shp(1, 3, 2)],
    )
    report, records = collect(path)
    assert (report.format, len(records), report.rows_read) == ("shp", 6, 9) and is_shp(shp(1, 1, 1))
    assert (
        report.filtered == {"more than 5 pairs of one prompt": 2, "score ratio below 2": 1}
        and report.dropped == {}
    )
    assert len(collect(path, "data.eval")[1]) == 8
    assert [len(collect(path, max_pairs_per_prompt=limit)[1]) for limit in (0, 1, 2)] == [8, 2, 3]
    assert len({record.prompt_key for record in records}) == 2, (
        "a post's pairs stay on one side of a split"
    )
