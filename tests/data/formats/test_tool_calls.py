"""Messages with other fields than role and content: tool calls, thoughts, names."""

import json
from typing import Any

import pytest

from jaxdpo.data.formats.preference import Message, read_text

CALL = {"name": "tides", "arguments": {"port": "Vigo"}}


def one_message(**fields: Any) -> Message:
    (message,) = read_text([fields], "prompt")
    assert isinstance(message, Message)
    return message


@pytest.mark.parametrize(
    "calls",
    [
        [{"type": "function", "function": CALL}],
        [{"type": "function", "function": {**CALL, "arguments": '{"port": "Vigo"}'}}],
        json.dumps([{"type": "function", "function": CALL}]),
    ],
)
def test_tool_calls_are_read_in_trls_and_openais_form(calls: Any) -> None:
    message = one_message(role="assistant", content=None, tool_calls=calls)
    assert message.fields == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": CALL}],
    }


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize("value", [CALL, [CALL]])
def test_sharegpts_function_call_is_a_tool_call(role: str, value: Any) -> None:
    call, result = read_text(
        [
            {"from": role, "value": json.dumps(value)},
            {"from": "observation", "value": "06:12"},
        ],
        "conversations",
    )
    assert isinstance(call, Message) and isinstance(result, Message)
    assert call.fields == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": CALL}],
    }
    assert result == Message("tool", "06:12")


def test_unknown_fields_are_kept_and_empty_ones_are_none() -> None:
    message = one_message(role="assistant", content="a", thinking="Hm.", name=None, tool_calls=[])
    assert message.fields == {"role": "assistant", "content": "a", "thinking": "Hm."}
    assert one_message(role="user", content="a", name=" ", images=[]) == Message("user", "a")
    assert "bytes" in one_message(role="user", content="a", images=[b"x"]).extra


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": "assistant", "content": None}, "must be {'role': string, 'content': string}"),
        ({"role": "assistant", "content": "", "tool_calls": "add"}, "'add' is no tool call"),
        ({"from": "function_call", "value": "I would call it"}, "is no tool call"),
        ({"from": "gpt", "value": "a", "content": "b"}, "has both 'from' and 'content'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "citations": ["b"]}]},
            "block 1 of its content has 'citations', which is not read",
        ),
    ],
)
def test_a_message_that_is_not_understood_is_an_error(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"message 1 of column 'prompt'.*{message}"):
        one_message(**fields)
