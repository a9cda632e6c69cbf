"""Rows of other trainers and services: read, or refused with the form and the remedy."""

from typing import Any

import pytest

from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.formats.roles import KNOWN_ROLES
from jaxdpo.data.formats.trl import parse_preference
from tests.data.rows import A, B, Q, Write, assistant, collect, one, user

SYSTEM = {"role": "system", "content": "s"}


def block(role: str, text: str) -> dict[str, Any]:
    """A message of LLaMA-Factory v1."""
    return {"role": role, "content": [{"type": "text", "value": text}]}


@pytest.mark.parametrize(
    ("form", "row"),
    [
        (
            "OpenAI, Fireworks",
            {
                "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [assistant("a")],
                "non_preferred_output": [assistant("b")],
            },
        ),
        (
            "axolotl",
            {"messages": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")},
        ),
        ("axolotl chatml.icr", {"system": "", "input": "q", "chosen": "a", "rejected": "b"}),
        (
            "argilla",
            {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
        ),
        (
            "NeMo",
            {"prompt": [user("q")], "chosen_response": "a", "rejected_response": "b"},
        ),
        (
            "LLaMA-Factory sharegpt",
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
        ),
        (
            "LLaMA-Factory v1",
            {
                "chosen_messages": [user("q"), assistant("a")],
                "rejected_messages": [user("q"), assistant("b")],
            },
        ),
        (
            "LLaMA-Factory v1, blocks",
            {
                "chosen_messages": [block("user", "q"), block("assistant", "a")],
                "rejected_messages": [block("user", "q"), block("assistant", "b")],
            },
        ),
        ("ms-swift", {"messages": [user("q"), assistant("a")], "rejected_response": "b"}),
        (
            "ms-swift, messages",
            {"messages": [user("q"), assistant("a")], "rejected_response": [assistant("b")]},
        ),
        (
            "ms-swift, dialogues",
            {
                "messages": [user("q"), assistant("a")],
                "rejected_messages": [user("q"), assistant("b")],
            },
        ),
        ("ms-swift, query", {"query": "q", "response": "a", "rejected_response": "b"}),
        (
            "UltraInteract",
            {"trajectory": [{"from": "user", "value": "q"}], "chosen": "a", "rejected": "b"},
        ),
    ],
)
def test_rows_of_other_trainers_and_services(write: Write, form: str, row: dict[str, Any]) -> None:
    report, (record,) = collect(write("a.jsonl", [row]))
    assert (record.prompt, record.chosen, record.rejected) == (Q, A, B), form
    unread = {"input.parallel_tool_calls": 1} if form.startswith("OpenAI") else {}
    assert report.format == "preference" and report.ignored_columns == unread


def test_tools_of_an_openai_row_are_those_of_the_row() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    answers = {"preferred_output": [assistant("a")], "non_preferred_output": [assistant("b")]}
    row = {"input": {"messages": [user("q")], "tools": tools}, **answers}
    found = one(parse_preference, row)
    assert isinstance(found, Preference) and '"name": "add"' in found.tools
    with pytest.raises(ValueError, match="column 'tools' and the tools of column 'input' differ"):
        one(parse_preference, {**row, "tools": [{"name": "sub"}]})


def test_several_turns_and_the_system_prompt_of_an_ms_swift_row() -> None:
    turns = [SYSTEM, user("1"), assistant("2"), user("q"), assistant("a")]
    found = one(parse_preference, {"messages": turns, "rejected_response": "b"})
    assert isinstance(found, Preference) and found.chosen == A and found.rejected == B
    assert [turn.role for turn in found.prompt if isinstance(turn, Message)] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    ends_with_user = {"messages": [user("q")], "rejected_response": "b"}
    assert one(parse_preference, ends_with_user) == Dropped("no shared prompt")


@pytest.mark.parametrize(
    ("human", "machine"),
    [
        ("Human", "Assistant"), ("USER", "ASSISTANT"), ("human", "gpt"), ("user", "bot"),
        ("User", "Chatbot"), ("prompter", "assistant"), ("HUMAN", "AI"), ("user", "model"),
        (" user ", "ChatGPT"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
def test_roles_in_other_letters(human: str, machine: str, role: str, content: str) -> None:
    def turn(name: str, text: str) -> dict[str, str]:
        return {role: name, content: text}

    row = {
        "chosen": [turn(human, "q"), turn(machine, "a")],
        "rejected": [turn(human, "q"), turn(machine, "b")],
    }
    assert one(parse_preference, row) == Preference(Q, A, B)


def test_unknown_roles_are_refused_with_their_place() -> None:
    row = {"prompt": [{"role": "narrator", "content": "q"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(
        ValueError, match=r"message 1 of column 'prompt' has the role 'narrator', .*\. Rename it"
    ):
        one(parse_preference, row)
    assert {"developer", "tool", "ipython"} <= KNOWN_ROLES


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "good": "a", "bad": "b"}, "Rename good to chosen and bad to rejected"),
        ({"prompt": "q", "y_w": "a", "y_l": "b"}, "Rename y_w to chosen and y_l to rejected"),
        (
            {"prompt": "q", "completion": "a", "label": True},
            r"unpaired rows \(KTO\): a pair needs two answers",
        ),
        ({"messages": [user("q"), assistant("a")]}, "rows for fine-tuning, with one answer"),
        ({"instruction": "q", "output": "a"}, r"fine-tuning, .* \(instruction, output\)"),
        ({"text": "q a"}, "rows for fine-tuning"),
        ({"prompt": "q", "chosen": "a"}, "A pair needs both answers"),
        (
            {"prompt": "q", "response1": "a", "response2": "b", "overall_preference": -2},
            "HelpSteer's rows: make a column label",
        ),
        (
            {"contents": [{"role": "user", "parts": [{"text": "q"}]}], "completions": "x"},
            "Gemini's rows: write contents as messages",
        ),
        (
            {"prompt": "q", "score_a": 1, "score_b": 2, "response_a": "a", "response_b": "b"},
            "The answers response_a and response_b need a column label .* a, b or tie",
        ),
        (
            {
                "prompt": "q",
                "response_a": "a",
                "response_b": "b",
                "winner_model_a": 1,
                "winner_model_b": 0,
            },
            "Chatbot Arena's rows .* make a column winner",
        ),
        ({"q": "q", "x": "x"}, "Rename the columns to prompt, chosen and rejected"),
    ],
)
def test_forms_that_are_not_read_name_the_remedy(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"columns found: .*{message}"):
        one(parse_preference, row)
