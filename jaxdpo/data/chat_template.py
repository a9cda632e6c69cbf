"""Records to text: by a chat template, or as Human: / Assistant: turns without one; and which of the text is scored."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from typing import Any

from jinja2.exceptions import TemplateError

from jaxdpo.data.formats.preference import Dropped, Message, Preference, Text, Turns, strings
from jaxdpo.utils.text import printable

PLAIN_TURNS = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
PLAIN_ANSWER = "\n\nAssistant:"
SENTINEL = "\ue000answer\ue000"
"""Stands in for a turn to find what the template writes around it; private-use characters keep it apart from real text."""

SPELLS_SPECIAL = Dropped("text spells a special token of the chat template")
NOT_FOUND = Dropped("the chat template writes a turn otherwise than it stands in its row")

Spans = tuple[tuple[int, int], ...]
"""Begin and end of pieces of a text, in characters."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """A prompt and one answer to it, as text."""

    text: str
    scored: Spans | None = None
    """The parts of the text that are scored. None: all behind the prompt."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One pair laid out as text: the prompt alone, and with each answer."""

    prompt: str
    chosen: Answered
    rejected: Answered
    templated: bool
    """Written by a chat template: special tokens are spelled in the text, and so is the end marker."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Lays records out for one tokenizer."""

    tokenizer: Any
    """A tokenizer of transformers."""
    template: str | None
    """Chat template for messages; None: plain text."""
    special: tuple[str, ...]
    """Spellings of the tokenizer's special tokens."""
    all_turns: bool = True
    """Score every assistant turn of an answer of several turns, not only the last."""

    def render(self, record: Preference) -> Rendered | Dropped:
        """Lay a record out: strings verbatim, messages by the chat template or as plain turns."""
        if record.tools and (isinstance(record.prompt, str) or self.template is None):
            return Dropped("plain text has no form for tools")
        if isinstance(record.prompt, str):
            answers = [
                self._without_end(str(answer)) for answer in (record.chosen, record.rejected)
            ]
            return Rendered(
                record.prompt,
                *(Answered(record.prompt + answer) for answer in answers),
                templated=False,
            )
        prompt, chosen, rejected = record.prompt, _turns(record.chosen), _turns(record.rejected)
        if self.template is not None:
            return (
                SPELLS_SPECIAL
                if self.spell_special(record.texts)
                else self._render_template(record.tools, prompt, chosen, rejected)
            )
        text = plain_prompt(prompt)
        sides = (
            [self._plain_answer(text, answer) for answer in (chosen, rejected)]
            if isinstance(text, str)
            else []
        )
        if (
            isinstance(text, Dropped)
            or isinstance(sides[0], Dropped)
            or isinstance(sides[1], Dropped)
        ):
            return next(item for item in (text, *sides) if isinstance(item, Dropped))
        return Rendered(text, sides[0], sides[1], templated=False)

    def prompt(self, prompt: Turns) -> str | Dropped:
        """The text that an answer to these turns is put behind."""
        if self.template is None:
            return plain_prompt(prompt)
        if self.spell_special(strings(prompt)):
            return SPELLS_SPECIAL
        try:
            return self._before_answer(prompt, self._template(prompt, add_generation_prompt=True))
        except (TemplateError, TypeError) as error:
            return _refused(error)

    @functools.cached_property
    def after_answer(self) -> str:
        """What the template writes behind an answer that ends a conversation; nothing if it wants another conversation."""
        try:
            return self._template((Message("user", "a"), Message("assistant", SENTINEL))).partition(
                SENTINEL
            )[2]
        except (TemplateError, TypeError):
            return ""

    def spell_special(self, texts: Iterable[str]) -> bool:
        """Whether text from outside contains a special token's spelling, e.g. `<|im_end|>`."""
        return self._special_pattern is not None and any(map(self._special_pattern.search, texts))

    # --- plain text ---

    def _plain_answer(self, prompt: str, answer: Turns) -> Answered | Dropped:
        *before, last = answer
        if any(turn.role not in PLAIN_TURNS for turn in before):
            return _NO_ROLE
        text, spans = prompt, []
        for number, turn in enumerate(
            (*before, Message("assistant", self._without_end(last.content)))
        ):
            start = len(text) if number == 0 else len(text) + len(PLAIN_ANSWER)
            text += f" {turn.content}" if number == 0 else PLAIN_TURNS[turn.role] + turn.content
            spans += [(start, len(text))] if turn.role == "assistant" else []
        return Answered(text, tuple(spans if self.all_turns else spans[-1:]) if before else None)

    def _without_end(self, answer: str) -> str:
        """The answer without an end-of-text token spelled at its end, which encoding adds as a token."""
        return (
            answer.removesuffix(str(self.tokenizer.eos_token))
            if self.tokenizer.eos_token
            else answer
        )

    # --- chat template ---

    def _render_template(
        self, tools: str, prompt: Turns, chosen: Turns, rejected: Turns
    ) -> Rendered | Dropped:
        try:
            start = self._template(prompt, tools, add_generation_prompt=True)
            if tools and start == self._template(prompt, add_generation_prompt=True):
                return Dropped("the chat template has no place for tools")
            texts = [self._template(prompt + answer, tools) for answer in (chosen, rejected)]
            contents = (chosen[0].content, rejected[0].content)
            if not all(
                text.startswith(start + content)
                for text, content in zip(texts, contents, strict=True)
            ):
                before = self._before_answer(prompt, start, tools)
                start = before if all(text.startswith(before) for text in texts) else start
            sides = [Answered(text) for text in texts]
            if max(len(chosen), len(rejected)) > 1:
                sides = [
                    self._scored(tools, prompt, answer, text)
                    for answer, text in zip((chosen, rejected), texts, strict=True)
                ]
        except (TemplateError, TypeError) as error:
            return _refused(error)
        return (
            NOT_FOUND
            if None in sides
            else Rendered(start, *(side for side in sides if side), templated=True)
        )

    def _scored(self, tools: str, prompt: Turns, answer: Turns, text: str) -> Answered | None:
        """The text with the places of its answer's assistant turns, each with its end marker; None where one cannot be found."""
        spans = []
        for number, turn in enumerate(answer):
            last = number == len(answer) - 1
            if turn.role == "assistant" and (last or self.all_turns):
                marked = (
                    *prompt,
                    *answer[:number],
                    Message("assistant", SENTINEL),
                    *answer[number + 1 :],
                )
                before, found, after = self._template(marked, tools).partition(SENTINEL)
                if (
                    not found
                    or not text.startswith(before)
                    or not text.endswith(after)
                    or len(before) + len(after) > len(text)
                ):
                    return None
                end = len(text) - len(after)
                marker = after if last else self.after_answer
                spans.append((len(before), end + len(marker) if after.startswith(marker) else end))
        return Answered(text, tuple(spans))

    def _before_answer(self, prompt: Turns, start: str, tools: str = "") -> str:
        """`start` and what the template writes between it and an answer (Qwen3: an empty think block): no part of the answer."""
        before, found, _ = self._template(
            (*prompt, Message("assistant", SENTINEL)), tools
        ).partition(SENTINEL)
        return before if found and before.startswith(start) else start

    def _template(
        self, messages: Turns, tools: str = "", add_generation_prompt: bool = False
    ) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        options = {"tools": json.loads(tools)} if tools else {}
        text = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
        return str(text)

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


_NO_ROLE = Dropped("plain text has no form for a role other than system, user, assistant")


def plain_prompt(prompt: Turns) -> str | Dropped:
    """Turns as Human: / Assistant: text that an answer is put behind."""
    if any(turn.role not in PLAIN_TURNS for turn in prompt):
        return _NO_ROLE
    return "".join(PLAIN_TURNS[turn.role] + turn.content for turn in prompt) + PLAIN_ANSWER


def _refused(error: Exception) -> Dropped:
    return Dropped(f"the chat template refuses it: {printable(str(error)).strip()[:80]}")


def _turns(answer: Text) -> Turns:
    if isinstance(answer, str):
        raise TypeError("a record's prompt is messages but an answer is a string")
    return answer
