import json
from typing import Any

import pytest

from jaxdpo.data.formats.ab import parse_ab
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.formats.trl import parse_preference
from tests.data.rows import A, B, Q, assistant, one, user

NO_ANSWER = "answer does not begin and end with an assistant turn"


def test_strings_are_used_verbatim() -> None:
    found = one(
        parse_preference,
        {"prompt": " q ", "chosen": " a\n", "rejected": "b", "weight": 2, "id": "row-7"},
    )
    assert found == Preference(" q ", " a\n", "b", id="row-7", weight=2.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {
            "prompt": None,
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
        },
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
        },
        {
            "prompt": [user("q")],
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
        },
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
    ],
)
def test_every_form_of_messages_gives_the_same_record(row: dict[str, Any]) -> None:
    assert one(parse_preference, row) == Preference(Q, A, B)


def test_implicit_prompt_of_messages_keeps_system_and_earlier_turns() -> None:
    head = [{"role": "system", "content": "s"}, user("1"), assistant("2"), user("3")]
    found = one(
        parse_preference, {"chosen": [*head, assistant("a")], "rejected": [*head, assistant("b")]}
    )
    assert isinstance(found, Preference)
    assert [turn.role for turn in found.prompt if isinstance(turn, Message)] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is black.", Preference("The sky is", " blue.", " black.")),
        ("Q: why?\nA: so", "Q: why?\nA: no", Preference("Q: why?\nA:", " so", " no")),
        ("Q: why?\nA: so", "Q: why?\nA: so what", Preference("Q: why?\nA:", " so", " so what")),
        ("yes", "yesterday", Dropped("no shared prompt")),
        ("alpha", "beta", Dropped("no shared prompt")),
    ],
)
def test_implicit_prompt_of_strings_ends_at_a_word(
    chosen: str, rejected: str, expected: Preference | Dropped
) -> None:
    assert one(parse_preference, {"chosen": chosen, "rejected": rejected}) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "an answer is null"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n"}, "empty answer"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical answers"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0}, "weight 0"),
        ({"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}, "text is not valid Unicode"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
            "identical answers",
        ),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
            "no shared prompt",
        ),
        ({"prompt": [user("q")], "chosen": [], "rejected": [assistant("b")]}, NO_ANSWER),
        (
            {"prompt": [user("q")], "chosen": [user("a")], "rejected": [assistant("b")]},
            NO_ANSWER,
        ),
        (
            {
                "prompt": [user("q")],
                "chosen": [assistant("a"), user("c")],
                "rejected": [assistant("b")],
            },
            NO_ANSWER,
        ),
        (
            {"prompt": [assistant("q")], "chosen": "a", "rejected": "b"},
            "prompt ends with an assistant turn",
        ),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"chosen": [], "rejected": []}, "no shared prompt"),
    ],
)
def test_preference_drops(row: dict[str, Any], reason: str) -> None:
    assert one(parse_preference, row) == Dropped(reason)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "good": "a", "bad": "b"},
            "column 'chosen' and 'rejected' is missing; columns found: prompt, good, bad",
        ),
        ({}, "columns found: none"),
        (
            {"prompt": "q", "chosen": True, "rejected": "b"},
            "column 'chosen' is bool, must be a string or a list of messages",
        ),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "column 'prompt' is int"),
        ({"chosen": "a", "rejected": [assistant("b")]}, "'chosen' and 'rejected' differ in type"),
        ({"chosen": ["a"], "rejected": ["b"]}, "message 1 of column 'chosen' must be .* is str"),
        (
            {
                "chosen": [user("q"), {"from": "elf", "value": "a"}],
                "rejected": [user("q"), assistant("b")],
            },
            "message 2 of column 'chosen' has the role 'elf', which is none of user, human, .*"
            "Rename it",
        ),
        (
            {"chosen": [{"role": "user", "content": None}], "rejected": [user("q")]},
            "'content': 'NoneType'",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "weight": -1},
            "column 'weight' is -1, must be a number that is not negative",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "weight": float("nan")},
            "column 'weight' is nan",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": "2"}, "column 'weight' is '2'"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "weight": True},
            "column 'weight' is True",
        ),
    ],
)
def test_rows_of_the_wrong_form_are_errors(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(parse_preference, row)


SYSTEM = Message("system", "s")
TOOLS = [{"name": "add"}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "system": "", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {
            "prompt": [user("q")],
            "chosen": {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            "rejected": [assistant("b")],
        },
        {
            "prompt": " q ",
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
        },
    ],
)
def test_other_names_and_forms_of_turns_give_the_same_record(row: dict[str, Any]) -> None:
    assert one(parse_preference, row) == Preference(Q, A, B)


def test_blocks_of_a_message_follow_each_other() -> None:
    blocks = [{"type": "text", "text": "q1 "}, {"type": "text", "text": "q2", "image": None}]
    found = one(
        parse_preference,
        {"prompt": [{"role": "user", "content": blocks}], "chosen": "a", "rejected": "b"},
    )
    assert isinstance(found, Preference) and found.prompt == (Message("user", "q1 q2"),)


def test_instruction_and_input_are_one_question() -> None:
    found = one(
        parse_preference, {"instruction": "Add.", "input": "1 2", "chosen": "a", "rejected": "b"}
    )
    assert isinstance(found, Preference) and found.prompt == (Message("user", "Add.\n1 2"),)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "system", "content": "s"}, user("q")], "chosen": "a", "rejected": "b"},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    ],
)
def test_a_column_of_system_prompts_and_one_of_tools_make_a_row_a_chat(row: dict[str, Any]) -> None:
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert one(parse_preference, {**row, "system": "s", "tools": tools}) == Preference(
            (SYSTEM, *Q), A, B, tools='[{"name": "add"}]'
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"system": 3}, "column 'system' is int"),
        (
            {"prompt": [{"role": "system", "content": "t"}, user("q")], "system": "s"},
            "column 'system' and the system message .* differ",
        ),
        ({"tools": "no json"}, "column 'tools' must be a list of objects"),
        ({"tools": ["add"]}, "column 'tools' must be a list of objects"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "block 1 of its content is 'image'; only blocks of text",
        ),
        (
            {"chosen": [{**assistant("a"), "tool_calls": [7]}], "rejected": [assistant("b")]},
            "7 is no tool call",
        ),
    ],
)
def test_what_a_chat_cannot_hold_is_an_error(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(parse_preference, {"prompt": [user("q")], "chosen": "a", "rejected": "b", **more})


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("b", "a"), ("response_b", "response_a"), ("Model B", "[[A]]")]
)
def test_names_of_other_columns_are_no_answers(chosen: str, rejected: str) -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y"}
    with pytest.raises(ValueError, match="name the columns response_a and response_b"):
        one(parse_preference, {**row, "chosen": chosen, "rejected": rejected})
    verbatim = one(parse_preference, {**row, "chosen": "y", "rejected": "x"})
    assert verbatim == Preference("q", "y", "x")


@pytest.mark.parametrize("name", ["seed", "question_id"])
def test_text_in_a_column_for_ids_may_be_the_prompt(name: str) -> None:
    row = {"chosen": "The sky is blue", "rejected": "The sky is red"}
    with pytest.raises(ValueError, match=f"no column holds the prompt; columns with text: {name}"):
        one(parse_preference, {**row, name: "Why is the sky blue?"})
    assert one(parse_preference, {**row, name: "q-17"}) == one(parse_preference, row)


def test_a_blank_system_prompt_is_none() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert one(parse_preference, {**row, "system": " \n"}) == Preference(Q, A, B)
    row = {**row, "system": " ", "system_prompt": "Be brief."}
    assert one(parse_preference, row) == Preference((Message("system", "Be brief."), *Q), A, B)


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_lists_of_turns_in_text_are_refused(name: str) -> None:
    row = {name: '["Hi", "Why?"]', "chosen": '["Hello", null]', "rejected": "['No', 'So']"}
    with pytest.raises(ValueError, match=f"column '{name}' and both answers are .* as messages"):
        one(parse_preference, row)
    labelled = {name: '["Hi"]', "response_a": '["a"]', "response_b": '["b"]', "label": "a"}
    with pytest.raises(ValueError, match=f"column '{name}' and both answers are"):
        one(parse_ab, labelled)
    asked = {**row, name: "Two words as a JSON list!"}
    assert isinstance(one(parse_preference, asked), Preference)
