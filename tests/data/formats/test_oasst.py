from pathlib import Path
from typing import Any

import pytest

from jaxdpo.config.data_options import OasstSection
from jaxdpo.data.formats.oasst import gather_trees, is_oasst, parse_oasst
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from tests.data.rows import Write, collect, outcomes, pairs


def message(
    name: str, parent: str | None, role: str, rank: int | None = None, **more: Any
) -> dict[str, Any]:
    """A row with the hub set's columns and types."""
    row = {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": f"text of {name}",
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.0004, "insult": 0.0001},
        "message_tree_id": "r",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]},
    }
    return {**row, **more}


def thread(**more: Any) -> list[dict[str, Any]]:
    """A question with three ranked answers and one without a rank; below the best answer, a
    further question with two answers."""
    return [
        message("r", None, "prompter"),
        message("a1", "r", "assistant", 1),
        message("a0", "r", "assistant", 0),
        message("a2", "r", "assistant", 2),
        message("ax", "r", "assistant", None),
        message("q", "a0", "prompter", 0, **more),
        message("b1", "q", "assistant", 1),
        message("b0", "q", "assistant", 0),
    ]


def tree(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same as the export writes it: nested, and without the keys that are null."""

    def nested(row: dict[str, Any]) -> dict[str, Any]:
        present = {
            key: value
            for key, value in row.items()
            if value is not None and key not in ("message_tree_id", "tree_state")
        }
        return {
            **present,
            "replies": [nested(other) for other in rows if other["parent_id"] == row["message_id"]],
        }

    return {"message_tree_id": "r", "tree_state": "ready_for_export", "prompt": nested(rows[0])}


def parse(rows: list[dict[str, Any]], **options: Any) -> list[Preference | Dropped]:
    (gathered,) = gather_trees((f"f:{number}", row) for number, row in enumerate(rows, start=1))
    found = outcomes(parse_oasst, dict(gathered[1]), **options)
    assert outcomes(parse_oasst, tree(rows), **options) == found or any(
        row["parent_id"] == "gone" for row in rows
    )
    return found


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("best-worst", ["a0>a2", "b0>b1"]),
        ("adjacent", ["a0>a1", "a1>a2", "b0>b1"]),
        ("all", ["a0>a1", "a0>a2", "a1>a2", "b0>b1"]),
    ],
)
def test_ranked_siblings_are_paired(rule: str, expected: list[str]) -> None:
    found = parse(thread(), pairing=rule)
    assert [pair.id for pair in found if isinstance(pair, Preference)] == expected and len(
        found
    ) == len(expected)
    first, last = found[0], found[-1]
    assert isinstance(first, Preference) and first.prompt == (Message("user", "text of r"),)
    assert isinstance(last, Preference) and [
        turn.role for turn in last.prompt if isinstance(turn, Message)
    ] == [
        "user",
        "assistant",
        "user",
    ]
    assert (
        first.chosen == (Message("assistant", "text of a0"),) and last.group == first.group == "r"
    ), "a tree stays together"


@pytest.mark.parametrize(
    ("changes", "options", "expected", "reasons"),
    [
        ({"a0": {"deleted": True}}, {}, ["a1>a2"], ["follows a deleted message"] * 0),
        ({"q": {"deleted": True}}, {}, ["a0>a2"], ["follows a deleted message"]),
        ({"r": {"deleted": True}}, {}, [], ["follows a deleted message"]),
        ({"a2": {"lang": "de"}}, {"oasst": OasstSection(languages=["en"])}, ["a0>a1", "b0>b1"], []),
        (
            {"a2": {"lang": "de"}},
            {"oasst": OasstSection(languages=["en", "de"])},
            ["a0>a2", "b0>b1"],
            [],
        ),
        (
            {"q": {"lang": "es"}},
            {"oasst": OasstSection(languages=["en"])},
            ["a0>a2"],
            ["other language"],
        ),
        (
            {"a2": {"synthetic": True}},
            {"oasst": OasstSection(synthetic=False)},
            ["a0>a1", "b0>b1"],
            [],
        ),
        ({"a2": {"synthetic": True}}, {}, ["a0>a2", "b0>b1"], []),
        ({"b0": {"rank": None}}, {}, ["a0>a2"], ["fewer than two ranked answers"]),
        ({"b0": {"rank": 1}}, {}, ["a0>a2"], ["tie"]),
        ({"b0": {"text": " "}}, {}, ["a0>a2"], ["empty answer"]),
    ],
)
def test_what_is_filtered_or_dropped(
    changes: dict[str, dict[str, Any]],
    options: dict[str, Any],
    expected: list[str],
    reasons: list[str],
) -> None:
    found = parse([{**row, **changes.get(row["message_id"], {})} for row in thread()], **options)
    assert [item.id for item in found if isinstance(item, Preference)] == expected
    assert [
        item.reason
        for item in found
        if isinstance(item, Dropped) and item.reason != "follows a deleted message"
    ] == [reason for reason in reasons if reason != "follows a deleted message"]
    if reasons:
        assert reasons[0] in [item.reason for item in found if isinstance(item, Dropped)]


def test_messages_stand_in_any_order_and_may_lack_their_parent(write: Write) -> None:
    rows = thread()
    assert pairs(parse(rows)) == pairs(parse([rows[0], *rows[:0:-1]]))
    report, found = collect(write("a.jsonl", [*rows, message("o", "gone", "assistant", 0)]))
    assert (report.format, report.rows_read, len(found)) == ("oasst", 9, 2) and is_oasst(rows[0])
    assert (
        report.dropped == {"the parent message is missing": 1}
        and "text" not in report.ignored_columns
    )


@pytest.mark.parametrize(
    ("change", "message_"),
    [
        ({"text": None}, r"a\.jsonl:1: column 'text' is NoneType"),
        ({"rank": True}, r"a\.jsonl:1: column 'rank' is True"),
        ({"role": "robot"}, r"column 'role' is 'robot', must be prompter or assistant"),
        ({"message_tree_id": 5}, r"a\.jsonl:3: column 'message_tree_id' is int"),
    ],
)
def test_wrong_types_are_errors(write: Write, change: dict[str, Any], message_: str) -> None:
    rows = thread()
    rows[2] |= change
    with pytest.raises(ValueError, match=r"^data\.train=.*a\.jsonl: .*" + message_):
        collect(write("a.jsonl", rows))


@pytest.mark.parametrize(("rule", "count"), [("best-worst", 212), ("adjacent", 429), ("all", 754)])
def test_real_trees_and_the_same_as_rows(real_data: Path, rule: str, count: int) -> None:
    nested, flat = (
        collect(str(real_data / "oasst" / name), pairing=rule)
        for name in ("en_100_tree.jsonl", "en_100_flat_hf_rows.jsonl")
    )
    assert nested[1] == flat[1] and len(flat[1]) == count
    assert (nested[0].rows_read, flat[0].rows_read) == (100, 1167) and len(
        {pair.group for pair in flat[1]}
    ) <= 100
