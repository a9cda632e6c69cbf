"""What a chat template leaves out of a conversation: fields of messages, and text.

A field is used if the text changes without it. Templates of reasoning models cut an answer at
</think>, and some leave out system messages: such text is found by looking for it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from jaxdpo.data.formats.common import ROW_NUMBERS
from jaxdpo.data.formats.preference import Dropped, Message, Turns
from jaxdpo.data.template_limits import REFUSALS

Render = Callable[[Turns], str]
"""Writes turns by the chat template; raises TemplateError for what it refuses."""

ANSWER_TEXT = "text of an answer"
PROMPT_TEXT = "text of a prompt"
_VALUE = "jaxdpo"
"""Stands for any text in a field."""


def left_out(
    render: Render, prompt: Turns, answer: Turns, start: str, text: str
) -> set[str] | Dropped:
    """What the text of a prompt with an answer lacks, named for a report.

    Args:
        render: the chat template.
        start: the text of the prompt.
        text: of the prompt with the answer.

    Returns:
        The names; or why the pair must not be used: it lacks a field that may hold its sense.
    """
    found = set()
    for turn in prompt:
        if not _contains(start, turn.content):
            found.add(PROMPT_TEXT)
    behind = text[len(start) :] if text.startswith(start) else text
    for turn in answer:
        if not _contains(behind, turn.content):
            found.add(ANSWER_TEXT)
    for where, name in _unused_fields(render, (*prompt, *answer), text):
        turn = (*prompt, *answer)[where]
        in_prompt = where < len(prompt)
        # A tool's own name says what the call before it says; ids only number.
        is_reference = ROW_NUMBERS.fullmatch(name) or (
            name == "name" and turn.role in ("tool", "function")
        )
        # Thoughts of earlier turns are left out by templates that write those of the last one.
        is_past = in_prompt and turn.role == "assistant" and has_place(render, name)
        if not is_reference and not is_past:
            return Dropped(f"the chat template has no place for the message field {name!r}")
        found.add(f"message field {name!r}")
    for turn in answer:
        for call in turn.fields.get("tool_calls", []):
            if call.get("function", call)["name"] not in behind:
                return Dropped("the chat template leaves out a tool call")
    return found


def has_place(render: Render, name: str) -> bool:
    """Whether the template writes a field of an answer."""
    turns = (Message("user", "a"), Message("assistant", "b"))
    with_field = dataclasses.replace(turns[1], extra=json.dumps({name: _VALUE}))
    try:
        return render((turns[0], with_field)) != render(turns)
    except REFUSALS:
        return False


def _unused_fields(render: Render, turns: Turns, text: str) -> Iterator[tuple[int, str]]:
    """The number of the turn and the name of each field without which the text is the same.

    A text of which only the presence is looked at is unused too, as are the arguments of calls.
    """
    for number, turn in enumerate(turns):
        if not turn.extra:
            continue
        extra: dict[str, Any] = json.loads(turn.extra)
        for name, value in extra.items():
            if name == "content":  # null: there is nothing to write
                continue
            others = {key: item for key, item in extra.items() if key != name}
            changes: list[tuple[str, dict[str, Any]]] = [(name, others)]
            if isinstance(value, str):
                changes.append((name, {**extra, name: _VALUE}))
            if name == "tool_calls" and any(map(_arguments, extra[name])):
                calls = [_without_arguments(call) for call in extra[name]]
                changes.append((f"{name}.arguments", {**extra, name: calls}))
            for shown, changed in changes:
                without = dataclasses.replace(turn, extra=json.dumps(changed))
                try:
                    shortened = render((*turns[:number], without, *turns[number + 1 :]))
                except REFUSALS:
                    continue  # the template asks for it
                if shortened == text:
                    yield number, shown
                    break


def _arguments(call: dict[str, Any]) -> Any:
    """The arguments of a call, in either form of tool_calls."""
    return call.get("function", call).get("arguments")


def _without_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _without_arguments(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": "" if isinstance(arguments, str) else {}}


def _contains(text: str, content: str) -> bool:
    """Whether a text holds a message's content, white space apart, as text or as JSON."""
    if content in text or content.strip() in text:
        return True
    # Templates write thoughts again with other line breaks, and results of tools as JSON.
    squeezed = "".join(text.split())
    for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]):
        if "".join(form.split()) in squeezed:
            return True
    return False
