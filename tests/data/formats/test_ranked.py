from typing import Any

import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.__main__ import main
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.formats.ranked import is_ranked, parse_ranked
from tests.data.rows import A, B, Q, Write, assistant, collect, one, outcomes, pairs, user


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


SCORED = {
    "question": "q",
    "answers": [{"id": 7, "pm": 0, "text": "b"}, {"id": 9, "pm": 5, "text": "a"}],
}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (SCORED, "answers.id, answers.pm may say so"),
        ({"question": "q", "answers": ["b", "a"], "rewards": [0.1, 0.9]}, "rewards may say so"),
        ({"question": "q", "answers": ["b", "a"], "labels": [False, True]}, "labels may say so"),
        ({"question": "q", "answers": ["b", "a"], "votes": [0, 7]}, "votes may say so"),
        ({"question": "q", "answers": ["b", "a"], "v": [0, 7]}, "v may say so"),
        ({"question": "q", "answers": ["b", "a"], "v": [{"s": 0}, {"s": 7}]}, "v may say so"),
        ({"question": "q", "answers": ["b", "a"], "best_index": 1}, "best_index may say so"),
        ({"question": "q", "answers": ["b", "a"], "preferred": "second"}, "preferred may say so"),
        ({"question": "q", "answers": ["b", "a"], "scores": {"b": 1}}, "scores may say so"),
        ({"question": "q", "answers": ["b", "a"], "score": 3}, "score may say so"),
        ({"question": "q", "answers": ["b", "a"], "bestAnswer": "a"}, "bestAnswer may say so"),
        ({"question": "q", "answers": ["b", "a"], "likes": ["0", "7"]}, "likes may say so"),
        ({"question": "q", "answers": ["b", "a"], "likes": "0,7"}, "likes may say so"),
        ({"question": "q", "answers": ["b", "a"], "likes": "[0. 7.5]"}, "likes may say so"),
        ({"question": "q", "answers": ["b", "a"], "likes": [[0, 7]]}, "likes may say so"),
        ({"question": "q", "answers": ["b", "a"], "likes": {"b": 0, "a": 7}}, "likes may say so"),
        ({"question": "q", "answers": ["b", "a"], "likes": "7"}, "likes may say so"),
        ({"question": "q", "answers": ["b", "a"], "ok": ["no", "yes"]}, "ok may say so"),
        ({"question": "q", "answers": ["b", "a"], "answer": "two"}, "answer may say so"),
        ({"question": "q", "answers": ["b", "a"], "answerKey": "B"}, "answerKey may say so"),
        ({"question": "q", "answers": ["b", "a"], "answer_index": 1}, "answer_index may say so"),
        ({"question": "q", "answers": ["b", "a"], "ground_truth": "x"}, "ground_truth may say so"),
        ({"question": "q", "answers": ["b", "a"], "right": "a"}, "right may say so"),
        ({"question": "q", "answers": ["b", "a"], "key": "B"}, "key may say so"),
        (
            {"question": "q", "answers": [{**assistant("b"), "reward": 0}, assistant("a")]},
            "answers.reward may say so",
        ),
        (
            {"question": "q", "answers": [{"text": "b", "model": "x"}, {"text": "a"}]},
            "answers.model may say so",
        ),
    ],
)
def test_order_is_a_ranking_only_of_bare_texts(row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"is not certain: {named}.*Set data\.score=<field>"):
        one(parse_ranked, row)
    flipped = {**row, "answers": row["answers"][::-1]}
    assert one(parse_ranked, flipped, score="order") == Preference(Q, A, B)


@pytest.mark.parametrize(
    ("row", "score"),
    [
        (SCORED, "pm"),
        ({"question": "q", "answers": ["b", "a"], "rewards": [0.1, 0.9]}, "rewards"),
        ({"question": "q", "answers": ["b", "a"], "labels": [False, True]}, "labels"),
        ({"question": "q", "answers": ["b", "a"], "labels": "[False, True]"}, "labels"),
        ({"question": "q", "answers": ["b", "a"], "score": [9, 1], "good": [1, 9]}, "good"),
    ],
)
def test_a_score_of_another_name_is_read_where_it_is_named(row: dict[str, Any], score: str) -> None:
    assert one(parse_ranked, row, score=score) == Preference(Q, A, B)


def test_a_score_that_a_row_does_not_have_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"data\.score=pms: neither a column .* fields: id, pm, text"
    ):
        one(parse_ranked, SCORED, score="pms")
    with pytest.raises(ValueError, match=r"data\.score=order means .* a field 'order' too"):
        one(parse_ranked, {"question": "q", "answers": ["a", "b"], "order": [1, 0]}, score="order")


def test_a_number_of_the_row_is_not_a_score_of_its_answers() -> None:
    row = {"question": "q", "answers": [{"text": "b", "score": 1}, {"text": "a", "score": 2}]}
    assert one(parse_ranked, {**row, "score": 77}) == Preference(Q, A, B)


def test_answers_without_any_value_are_not_ranked_by_their_order() -> None:
    unranked = Dropped("fewer than two ranked answers", filtered=True)
    row = {"question": "q", "answers": ["a", "b"]}
    assert one(parse_ranked, {**row, "scores": [None, None]}) == unranked
    assert one(parse_ranked, {**row, "scores": None}) == unranked
    rows = [{"text": "a", "score": None}, {"text": "b", "score": None}]
    assert one(parse_ranked, {"question": "q", "answers": rows}) == unranked


def test_ranks_and_scores_that_disagree_are_an_error() -> None:
    row = {"question": "q", "answers": ["a", "b"], "ranks": [0, 1]}
    assert one(parse_ranked, {**row, "scores": [9, 1]}) == Preference(Q, A, B)
    with pytest.raises(ValueError, match="'ranks' and 'scores' order the answers differently"):
        one(parse_ranked, {**row, "scores": [1, 9]})


def test_columns_that_number_the_rows_leave_the_order_as_it_is() -> None:
    row = {"qid": 3, "question_id": 0, "idx": 1, "question": "q", "answers": ["a", "b"]}
    assert one(parse_ranked, {**row, "source": "forum"}) == Preference(Q, A, B)
    more = {"meta": {"id": 3, "site": "x.org"}, "models": ["m1", "m2"], "outputs": ["c", "d"]}
    assert one(parse_ranked, {**row, **more, "completions": ["a", "b"]}) == Preference(Q, A, B)


@pytest.mark.parametrize("answers", ["['b', 'a']", '["b", "a"]'])
def test_lists_in_cells_of_csv_are_read(write: Write, answers: str) -> None:
    cell = answers.replace('"', '""')
    text = f'question,answers,scores\nq,"{cell}","[1, 2.5]"\n'
    _, records = collect(write("a.csv", text.encode()))
    assert [(r.prompt, r.chosen, r.rejected) for r in records] == [(Q, A, B)]


def test_a_numpy_array_of_answers_is_not_one_joined_answer(write: Write) -> None:
    with pytest.raises(ValueError, match="columns found: question, answers"):
        collect(write("a.csv", b"question,answers\nq,['b' 'a']\n"))


def test_data_score_is_refused_where_no_set_has_lists(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert main([f"data.train=[{path}]", "data.score=pm_score"]) == 1
    assert "data.score=pm_score: no set has lists of answers" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data\.score='': must name a field"):
        DataSection(score="")
