import re
from typing import Any

import pytest

from jaxdpo.data.formats.ab import is_ab, parse_ab
from jaxdpo.data.formats.preference import Dropped, Preference
from tests.data.rows import A, B, Q, Write, assistant, collect, one, user


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "response_a": "a", "response_b": "b", "label": "A"},
        {"question": "q", "answer_a": "b", "answer_b": "a", "preference": "answer_b"},
        {
            "question": "q",
            "response_0": "b",
            "response_1": "a",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        {"instruction": "q", "input": "", "output_1": "a", "output_2": "b", "preference": 1.0},
        {
            "conversation_a": [user("q"), assistant("b")],
            "conversation_b": [user("q"), assistant("a")],
            "winner": "model_b",
            "judge": "x",
        },
    ],
)
def test_the_label_names_the_better_column(row: dict[str, Any]) -> None:
    assert one(parse_ab, row) == Preference(Q, A, B) and is_ab(row)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("tie", Dropped("tie", filtered=True)),
        ("tie (bothbad)", Dropped("tie", filtered=True)),
        ("neither", Dropped("tie", filtered=True)),
        (None, Dropped("no label")),
    ],
)
def test_ties_are_filtered(label: Any, expected: Dropped) -> None:
    assert (
        one(parse_ab, {"prompt": "q", "response_a": "a", "response_b": "b", "label": label})
        == expected
    )


@pytest.mark.parametrize("label", [1, 0, True, "", "c", "banana"])
def test_a_label_that_does_not_name_a_column_is_not_guessed(label: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"column 'label' is .*, must be a or b "
        r"\(the better of response_a and response_b\) or tie",
    ):
        one(parse_ab, {"prompt": "q", "response_a": "a", "response_b": "b", "label": label})


def test_rows_of_another_form_are_errors_or_not_detected() -> None:
    with pytest.raises(
        ValueError, match="two columns such as response_a and response_b, and one of label"
    ):
        one(parse_ab, {"prompt": "q", "response_a": "a"})
    chosen = {
        "prompt": "q",
        "chosen": "a",
        "rejected": "b",
        "response_a": "a",
        "response_b": "b",
        "label": "a",
    }
    assert not is_ab(chosen)


OTHER = {"A": "B", "B": "A", "a": "b", "b": "a"}


def judged(label: Any, **more: Any) -> dict[str, Any]:
    return {"question": "q", "response_A": "a", "response_B": "b", "label": label, **more}


@pytest.mark.parametrize(
    "label",
    [
        "A>B", "A>>B", "A > B", "B<A", "[[A]]", "[[A>>B]]", "response_A > response_B", "(A)",
        "Model A", "assistant_a", "A is better", "Response A is slightly better than response B.",
        "The answer A is preferred over the answer B", "A wins", " a ",
    ],
)  # fmt: skip
def test_a_label_is_matched_whole(label: str) -> None:
    """The letter at its end says nothing: A>B ends in that of the worse answer."""
    assert one(parse_ab, judged(label)) == Preference(Q, A, B)
    mirrored = re.sub(r"(?<![A-Za-z])[ABab](?![A-Za-z])", lambda m: OTHER[m[0]], label)
    assert one(parse_ab, judged(mirrored)) == Preference(Q, B, A)


@pytest.mark.parametrize("label", ["B>A", "A<B", "B >> A", "model_b", "B is better than A"])
def test_a_label_of_the_second_answer(label: str) -> None:
    assert one(parse_ab, judged(label)) == Preference(Q, B, A)


@pytest.mark.parametrize(
    "label", ["A=B", "B == A", "A~B", "[[A=B]]", "Tie", "tie (both bad)", "both_bad", "bothbad"]
)
def test_equal_answers_are_ties(label: str) -> None:
    assert one(parse_ab, judged(label)) == Dropped("tie", filtered=True)


@pytest.mark.parametrize(
    "label",
    [
        "B is worse than A", "A is not better than B", "not A", "A>A", "A>B>C", "A>=B", "A->B",
        "A or B", "first", "left", "tie, but A", "both are bad but B is better", "-1", -1, 0.5,
        "Plan A", "grade A", "C>A", "A is better than C", "the last one, A", ["A"], {"A": 1},
    ],
)  # fmt: skip
def test_a_label_that_is_not_understood_for_certain_names_the_row(write: Write, label: Any) -> None:
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: column 'label' is .*, must be A or B .* or tie"
    ):
        collect(write("a.jsonl", [judged("A"), judged(label)]))


def test_a_judge_that_failed_is_counted_and_no_tie() -> None:
    assert one(parse_ab, judged("error")) == Dropped("the label says error")


def test_two_labels_that_disagree_are_an_error() -> None:
    with pytest.raises(ValueError, match="columns 'label' and 'winner' prefer different answers"):
        one(parse_ab, judged("A", winner="B>A"))
    assert one(parse_ab, judged("A", winner="a")) == Preference(Q, A, B)
    assert one(parse_ab, judged(None, winner="A")) == Preference(Q, A, B)
    assert one(parse_ab, judged("A", preferred="by three of five")) == Preference(Q, A, B)


def test_a_third_answer_is_an_error() -> None:
    row = {"question": "q", "response_0": "a", "response_1": "b", "label": 1}
    with pytest.raises(ValueError, match="column 'response_2' is a third answer beside response_0"):
        one(parse_ab, {**row, "response_2": "c"})
    assert one(parse_ab, {**row, "response_2": None}) == Preference(Q, B, A)


def test_numbers_are_those_of_the_columns() -> None:
    one_two = {"question": "q", "answer1": "a", "answer2": "b"}
    assert one(parse_ab, {**one_two, "preference": "1>2"}) == Preference(Q, A, B)
    assert one(parse_ab, {**one_two, "preference": 2.0}) == Preference(Q, B, A)
    assert one(parse_ab, {**one_two, "preference": "2.0"}) == Preference(Q, B, A)
    with pytest.raises(ValueError, match="column 'preference' is 0, must be 1 or 2"):
        one(parse_ab, {**one_two, "preference": 0})
