from typing import Any

import pytest

from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.formats.ranked import is_ranked, parse_ranked
from tests.data.rows import A, B, Q, assistant, one, outcomes, pairs, user


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": ["a", "b"]},
        {"question": "q", "responses": ["b", "a"], "scores": [1, 2.5]},
        {"question": "q", "responses": ["b", "a"], "ranks": [1, 0]},
        {"question": "q", "answers": ["b", "x", "a"], "ranks": [2, None, 1]},
        {
            "instruction": "q",
            "completions": [
                {"response": "b", "overall_score": 3.0},
                {"response": "a", "overall_score": 9.5},
            ],
        },
        {
            "prompt": [user("q")],
            "completions": [{"text": "a", "rank": 0}, {"text": "b", "rank": 3}],
        },
        {"prompt": [user("q")], "candidates": [[assistant("a")], [assistant("b")]]},
        {
            "prompt": [user("q")],
            "candidates": [{"role": "assistant", "content": "a"}, {"from": "gpt", "value": "b"}],
        },
    ],
)
def test_ranks_scores_or_order_say_which_answer_is_better(row: dict[str, Any]) -> None:
    assert one(parse_ranked, row) == Preference(Q, A, B) and is_ranked(row)


def test_pairs_of_four_answers() -> None:
    row = {"prompt": "q", "completions": list("wxyz"), "scores": [1, 4, 3, 4]}
    assert pairs(outcomes(parse_ranked, row)) == [("x", "w")]
    assert pairs(outcomes(parse_ranked, row, pairing="adjacent")) == [("z", "y"), ("y", "w")]
    assert pairs(outcomes(parse_ranked, row, pairing="all")) == [
        ("x", "y"),
        ("x", "w"),
        ("z", "y"),
        ("z", "w"),
        ("y", "w"),
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scores": [3, 3]}, Dropped("tie", filtered=True)),
        ({"scores": [3, None]}, Dropped("fewer than two ranked answers", filtered=True)),
        (
            {"completions": [], "scores": None},
            Dropped("fewer than two ranked answers", filtered=True),
        ),
        ({"completions": ["a", "a"]}, Dropped("identical answers")),
        ({"completions": ["a", None]}, Dropped("an answer is null")),
    ],
)
def test_answers_that_make_no_pair(change: dict[str, Any], expected: Dropped) -> None:
    assert (
        one(parse_ranked, {"prompt": "q", "completions": ["a", "b"], "scores": [2, 1], **change})
        == expected
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "completions": ["a", "b"], "scores": [1]},
            "column 'scores' has 1 values for 2 answers in column 'completions'",
        ),
        (
            {"prompt": "q", "completions": ["a", "b"], "scores": [1, True]},
            "column 'scores' is True",
        ),
        ({"prompt": "q", "completions": ["a", 3]}, "column 'completions' is int"),
        (
            {"prompt": "q", "completions": "a"},
            "no column holds a list of answers .*columns found: prompt, completions",
        ),
    ],
)
def test_lists_of_the_wrong_form_are_errors(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outcomes(parse_ranked, row)


def test_rows_of_another_form_are_not_detected() -> None:
    chosen = {"prompt": "q", "chosen": "a", "rejected": "b", "completions": ["a"]}
    assert not is_ranked(chosen)
    system = {"system": "s", "prompt": "q", "completions": ["a", "b"]}
    assert one(parse_ranked, system) == Preference((Message("system", "s"), *Q), A, B)
