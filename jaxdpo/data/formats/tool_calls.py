"""Tool calls of messages: OpenAI's and TRL's form, and ShareGPT's."""

import json
from typing import Any

from jaxdpo.utils.text import printable

CALL_ROLES = frozenset({"function_call", "tool_call"})
"""Roles of messages whose content is the JSON text of a call, or of a list of calls (ShareGPT)."""


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a field tool_calls, as chat templates take them.

    Args:
        value: a list of {"function": {"name": ..., "arguments": ...}}, or of {"name": ...,
            "arguments": ...}; or the JSON text of one. Arguments may be JSON text too (OpenAI).
        where: the message, for errors.

    Raises:
        ValueError: it is something else.

    >>> read_calls([{"function": {"name": "add", "arguments": '{"a": 1}'}}], "message 1")
    [{'function': {'name': 'add', 'arguments': {'a': 1}}}]
    """
    calls = _parsed(value)
    if not isinstance(calls, list):
        calls = [calls]
    return [_call(call, where) for call in calls]


def calls_in(text: Any, where: str) -> list[dict[str, Any]]:
    """The calls that the content of a message of CALL_ROLES holds, in the form of tool_calls.

    Raises:
        ValueError: it is no call.
    """
    calls = []
    for call in read_calls(text, where):
        if "function" not in call:
            call = {"type": "function", "function": call}
        calls.append(call)
    return calls


def _call(value: Any, where: str) -> dict[str, Any]:
    call = dict(value) if isinstance(value, dict) else {}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"{where}: {printable(repr(value))[:80]} is no tool call. Write "
            '{"function": {"name": "...", "arguments": {...}}}'
        )
    # As inference servers do: a template would write JSON text as a string, quoted once more.
    arguments = _parsed(function.get("arguments"))
    if isinstance(arguments, dict):
        function = {**function, "arguments": arguments}
    if "function" in call:
        return {**call, "function": function}
    return function


def _parsed(value: Any) -> Any:
    """What JSON text holds; any other value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass  # text of another kind, which the caller judges
    return value
