import json
from typing import Any

import pytest

from jaxdpo.data.formats.ab import parse_ab
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.formats.ranked import parse_ranked
from jaxdpo.data.formats.trl import parse_preference
from tests.data.rows import A, B, Q, Write, assistant, collect, one, user

PAIR = {"chosen": "a", "rejected": "b"}
SAID = {"chosen": "Well, it is so.", "rejected": "Well, it is not."}
BEFORE = (Message("user", "1"), Message("assistant", "2"))


@pytest.mark.parametrize(
    "column",
    [
        "question", "query", "instruction", "input", "conversations", "conversation", "messages",
        "trajectory",
    ],
)  # fmt: skip
def test_every_name_of_a_prompt_is_a_chat(column: str) -> None:
    assert one(parse_preference, {column: "q", **PAIR}) == Preference(Q, A, B)
    assert one(parse_preference, {column: [user("q")], **PAIR}) == Preference(Q, A, B)
    with_system = one(parse_preference, {"system": "s", column: "q", **PAIR})
    assert with_system == Preference((Message("system", "s"), *Q), A, B)
    both = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert one(parse_preference, {column: "q", **both}) == Preference(Q, A, B)


def test_answers_that_begin_alike_keep_their_beginning() -> None:
    found = one(parse_preference, {"system": "s", "input": "q", **SAID})
    assert isinstance(found, Preference)
    assert found.chosen == (Message("assistant", "Well, it is so."),)


@pytest.mark.parametrize("column", ["context", "problem", "source", "user_message", "post"])
def test_no_prompt_is_made_of_the_answers_beside_other_text(column: str) -> None:
    with pytest.raises(
        ValueError, match=rf"no column holds the prompt; columns with text: {column}\. Rename"
    ):
        one(parse_preference, {column: "Is it so?", "n": 3, "pair_id": "p1", **SAID})
    with pytest.raises(ValueError, match="no column holds the prompt"):
        one(
            parse_preference,
            {column: [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None},
        {"prompt": ""},
        {"prompt": " \n"},
        {"prompt": [user(" ")]},
        {"question": ""},
        {"instruction": "", "input": None},
        {"messages": []},
        {"prompt": "", "system": "s"},
        {"input": {"messages": []}},
    ],
)
def test_an_empty_prompt_is_counted_and_never_made_of_the_answers(row: dict[str, Any]) -> None:
    assert one(parse_preference, {**row, **SAID}) == Dropped("empty prompt")
    labelled = {"response_a": "a", "response_b": "b", "label": "a"}
    assert one(parse_ab, {**row, **labelled}) == Dropped("empty prompt")
    assert one(parse_ranked, {**row, "completions": ["a", "b"]}) == Dropped("empty prompt")
    messages = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert one(parse_preference, {**row, **messages}) == Dropped("empty prompt")


def test_an_empty_column_leaves_the_prompt_to_another() -> None:
    assert one(parse_preference, {"prompt": None, "question": "q", **PAIR}) == Preference(Q, A, B)
    row = {"instruction": "", "input": "q", **PAIR}
    assert one(parse_preference, row) == Preference(Q, A, B)


@pytest.mark.parametrize(
    "history",
    [
        [["1", "2"]],
        "[['1', '2']]",
        json.dumps([["1", "2"]]),
        [user("1"), assistant("2")],
        [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}],
    ],
)
@pytest.mark.parametrize("column", ["instruction", "prompt", "query"])
def test_history_comes_before_the_prompt(history: Any, column: str) -> None:
    row = {column: "q", "history": history, **PAIR}
    assert one(parse_preference, row) == Preference((*BEFORE, *Q), A, B)
    system = Message("system", "s")
    found = one(parse_preference, {**row, "system": "s"})
    assert found == Preference((system, *BEFORE, *Q), A, B)
    turns = [{"role": "system", "content": "s"}, user("q")]
    assert one(parse_preference, {**row, column: turns}) == found


@pytest.mark.parametrize("history", [None, [], "", [[]]])
def test_an_empty_history_is_none(history: Any) -> None:
    row = {"instruction": "q", "history": history, **PAIR}
    assert one(parse_preference, row) == Preference(Q, A, B)


@pytest.mark.parametrize("history", ["User: 1", ["1", "2"], [["1"]], [["1", None]], {"user": "1"}])
def test_a_history_of_another_form_is_an_error(history: Any) -> None:
    with pytest.raises(ValueError, match=r"column 'history' must be \[\[user, assistant\], \.\.\."):
        one(parse_preference, {"instruction": "q", "history": history, **PAIR})
    with pytest.raises(ValueError, match="no column holds the prompt itself"):
        one(parse_preference, {"history": history, **PAIR})


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"question": "q", "query": "r"}, "'question' and 'query'"),
        ({"prompt": "q", "input": "a text"}, "'prompt' and 'input'"),
        ({"prompt": "q", "messages": [user("r")]}, "'prompt' and 'messages'"),
        ({"instruction": "q", "input": "1", "question": "r"}, "'question' and 'instruction'"),
    ],
)
def test_two_columns_with_different_prompts_are_an_error(row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"columns {named} both hold a prompt, and they differ"):
        one(parse_preference, {**row, **PAIR})


def test_a_column_that_repeats_prompt_or_answers_is_no_second_prompt() -> None:
    rows = [
        {"question": "q", "query": " q\n"},
        {"question": "q", "messages": [user("q"), assistant("a")]},
        {"conversations": [user("q")], "input": "q"},
    ]
    for row in rows:
        assert one(parse_preference, {**row, **PAIR}) == Preference(Q, A, B)


def test_a_prompt_column_that_the_dialogues_do_not_hold_is_counted() -> None:
    dialogues = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    found = one(parse_preference, {"prompt": "something else", **dialogues})
    assert found == Dropped("the prompt column is not in the dialogues")
    more = [assistant("so"), user("and?")]
    row = {
        "prompt": "q",
        "chosen": [*more, assistant("a")],
        "rejected": [*more, assistant("b")],
    }
    found = one(parse_preference, row)
    assert isinstance(found, Preference) and found.prompt == Q, "the answers go on after it"
    assert isinstance(found.chosen, tuple) and len(found.chosen) == 3


def test_messages_that_are_one_of_the_dialogues_are_their_beginning() -> None:
    for answer in ("a", "b"):
        row: dict[str, Any] = {"messages": [user("q"), assistant(answer)]}
        dialogues = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
        assert one(parse_preference, {**row, **dialogues}) == Preference(Q, A, B)
        assert one(parse_preference, {**row, **PAIR}) == Preference(Q, A, B)
        last = {"chosen": assistant("a"), "rejected": assistant("b")}
        assert one(parse_preference, {**row, **last}) == Preference(Q, A, B)
    other = {"messages": [user("q"), assistant("c")], **PAIR}
    assert one(parse_preference, other) == Dropped("prompt ends with an assistant turn")


def test_names_of_the_system_prompt() -> None:
    expected = Preference((Message("system", "s"), *Q), A, B)
    for column in ("system", "system_prompt", "system_message"):
        assert one(parse_preference, {column: "s", "prompt": "q", **PAIR}) == expected
    with pytest.raises(ValueError, match="'system' and 'system_prompt' hold different system"):
        one(parse_preference, {"system": "s", "system_prompt": "t", "prompt": "q", **PAIR})


def test_columns_without_a_prompt_stop_the_run_with_the_row(write: Write) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no column holds the prompt"):
        collect(write("a.jsonl", [{"topic": "rust", **SAID}]))
