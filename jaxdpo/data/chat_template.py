"""Records to text: by a chat template, or as Human: / Assistant: turns without one.

Also which part of the text has loss (`loss_spans`, characters), from which tokenize.py makes the
completion mask.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxdpo.data.formats.preference import Dropped, Message, Preference, Text, Turns, strings
from jaxdpo.data.left_out import left_out
from jaxdpo.data.pair_text import AnswerText, PairText, Spans
from jaxdpo.data.template_limits import REFUSALS, limited
from jaxdpo.utils.text import printable

PLAIN_TURNS = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
"""What is written before a turn without a chat template: the form of Anthropic's hh-rlhf."""
PLAIN_ANSWER = "\n\nAssistant:"
SENTINEL = "\ue000answer\ue000"
"""Stands in for a turn to find what the template writes around it. Private-use characters keep it
apart from real text."""

SPELLS_SPECIAL = Dropped("text spells a special token of the chat template")
NOT_FOUND = Dropped("the chat template rewrites a turn, so its tokens cannot be found")
NO_PLAIN_ROLE = Dropped("plain text has no form for a role other than system, user, assistant")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Writes records as text for one tokenizer."""

    tokenizer: Any
    """A tokenizer of transformers."""
    template: str | None
    """Chat template for messages; None: plain text."""
    special: tuple[str, ...]
    """Spellings of the tokenizer's special tokens."""
    all_turns: bool = True
    """Loss on every assistant turn of an answer of several turns, not only on the last."""
    strings: str | None = None
    """data.strings."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of the template's own variables (data.chat_template_kwargs)."""
    for_tools: str | None = None
    """Chat template for messages with tools, if it is another one."""

    def render(self, record: Preference) -> PairText | Dropped:
        """Write a record: strings verbatim, messages by the chat template or as plain turns."""
        record = self.as_messages(record)
        if record.tools and (isinstance(record.prompt, str) or self.template is None):
            return Dropped("plain text has no form for tools")
        if isinstance(record.prompt, str):
            return self._render_strings(record.prompt, str(record.chosen), str(record.rejected))
        prompt, chosen, rejected = record.prompt, _turns(record.chosen), _turns(record.rejected)
        if self.template is None:
            for turn in (*prompt, *chosen, *rejected):
                if turn.extra:
                    return _no_field(turn)
            return self._render_plain(prompt, chosen, rejected)
        if self.spell_special(record.texts):
            return SPELLS_SPECIAL
        try:
            return self._render_template(record.tools, prompt, chosen, rejected)
        except REFUSALS as error:
            return _refused(error)

    def as_messages(self, record: Preference) -> Preference:
        """The record, with messages in place of strings if data.strings says so."""
        texts = (record.prompt, record.chosen, record.rejected)
        if self.strings != "message" or not isinstance(record.prompt, str):
            return record
        prompt, chosen, rejected = map(str, texts)
        return dataclasses.replace(
            record,
            prompt=(Message("user", prompt),),
            chosen=(Message("assistant", chosen),),
            rejected=(Message("assistant", rejected),),
        )

    def prompt(self, prompt: Turns, tools: str = "", thinking: bool | None = None) -> str | Dropped:
        """The text that an answer to these turns is put behind.

        Args:
            thinking: True: the template's generation prompt, behind which an answer begins with
                its thoughts. False: what the template writes before an answer without any. None:
                the latter where it only adds to the former (Qwen3's empty think block).
        """
        if self.template is None:
            return Dropped("plain text has no form for tools") if tools else plain_prompt(prompt)
        if self.spell_special([*strings(prompt), tools]):
            return SPELLS_SPECIAL
        try:
            start = self._generation_prompt(prompt, tools)
            if isinstance(start, Dropped):
                return start
            before = self._before_answer(prompt, start, tools)
        except REFUSALS as error:
            return _refused(error)
        if thinking or (thinking is None and not before.startswith(start)):
            return start
        return before

    @functools.cached_property
    def after_answer(self) -> str:
        """What the template writes after an answer that ends a conversation (its eos).

        Empty if the template refuses such a conversation.
        """
        conversation = (Message("user", "a"), Message("assistant", SENTINEL))
        try:
            return self._template(conversation).partition(SENTINEL)[2]
        except REFUSALS:
            return ""

    def strings_spell_special(self, record: Preference) -> bool:
        """Whether strings spell special tokens, so that they may be what a chat template wrote.

        An eos at the end of an answer does not count: it can mean nothing else.
        """
        if not isinstance(record.prompt, str):
            return False
        answers = [self._without_eos(str(text)) for text in (record.chosen, record.rejected)]
        return self.spell_special([record.prompt, *answers])

    @functools.cached_property
    def knows_thoughts(self) -> bool:
        """Whether the template writes other text before an answer without thoughts than before one
        with them, which begins behind the generation prompt."""
        turns = (Message("user", "a"),)
        return self.prompt(turns, thinking=True) != self.prompt(turns, thinking=False)

    def spell_special(self, texts: Iterable[str]) -> bool:
        """Whether text from outside contains a special token's spelling, e.g. `<|im_end|>`."""
        pattern = self._special_pattern
        return pattern is not None and any(pattern.search(text) for text in texts)

    # --- plain text ---

    def _render_strings(self, prompt: str, chosen: str, rejected: str) -> PairText:
        if self.strings == "templated":
            # Trainers that add bos themselves are given what a template wrote without it.
            writes_bos = self.spells_bos(prompt)
            answers = AnswerText(prompt + chosen), AnswerText(prompt + rejected)
            return PairText(prompt, *answers, templated=True, writes_bos=writes_bos)
        return PairText(
            prompt,
            AnswerText(prompt + self._without_eos(chosen)),
            AnswerText(prompt + self._without_eos(rejected)),
            templated=False,
            writes_bos=False,
        )

    def spells_bos(self, text: str) -> bool:
        """Whether a text begins with the spelling of bos."""
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(str(bos))

    def _render_plain(self, prompt: Turns, chosen: Turns, rejected: Turns) -> PairText | Dropped:
        text = plain_prompt(prompt)
        if isinstance(text, Dropped):
            return text
        sides = []
        for answer in (chosen, rejected):
            side = self._plain_answer(text, answer)
            if isinstance(side, Dropped):
                return side
            sides.append(side)
        return PairText(text, sides[0], sides[1], templated=False, writes_bos=False)

    def _plain_answer(self, prompt: str, answer: Turns) -> AnswerText | Dropped:
        *before, last = answer
        if any(turn.role not in PLAIN_TURNS for turn in before):
            return NO_PLAIN_ROLE
        last = Message("assistant", self._without_eos(last.content))
        text, spans = prompt, []
        for number, turn in enumerate((*before, last)):
            start = len(text)
            if number == 0:
                text += f" {turn.content}"  # the prompt ends in PLAIN_ANSWER
            else:
                start += len(PLAIN_ANSWER)  # which has no loss
                text += PLAIN_TURNS[turn.role] + turn.content
            if turn.role == "assistant":
                spans.append((start, len(text)))
        if not before:
            return AnswerText(text)
        if not self.all_turns:
            spans = spans[-1:]
        return AnswerText(text, tuple(spans))

    def _without_eos(self, answer: str) -> str:
        """The answer without an eos spelled at its end, because encoding adds eos as a token."""
        if self.tokenizer.eos_token:
            return answer.removesuffix(str(self.tokenizer.eos_token))
        return answer

    # --- chat template ---

    def _render_template(
        self, tools: str, prompt: Turns, chosen: Turns, rejected: Turns
    ) -> PairText | Dropped:
        start = self._generation_prompt(prompt, tools)
        if isinstance(start, Dropped):
            return start
        answers = (chosen, rejected)
        texts = [self._template(prompt + answer, tools) for answer in answers]
        # Usually a text is the generation prompt, the answer and an end. If not, the template may
        # write more before an answer than the generation prompt has.
        is_usual = all(
            text.startswith(start + answer[0].content)
            for text, answer in zip(texts, answers, strict=True)
        )
        generation_prompt = start
        if not is_usual:
            before = self._before_answer(prompt, start, tools)
            is_before = _all_begin(texts, before)
            # Of two beginnings that both answers have, the longer one.
            if is_before and not (start.startswith(before) and _all_begin(texts, start)):
                start = before
        sides, missing = [], set()
        for text, answer in zip(texts, answers, strict=True):
            found = left_out(
                lambda turns: self._template(turns, tools), prompt, answer, start, text
            )
            if isinstance(found, Dropped):
                return found
            missing |= found
            spans = None
            if max(len(chosen), len(rejected)) > 1:
                spans = self._loss_spans(tools, prompt, answer, text)
                if spans is None:
                    return NOT_FOUND
            sides.append(AnswerText(text, spans))
        return PairText(
            start,
            sides[0],
            sides[1],
            templated=True,
            writes_bos=True,
            left_out=frozenset(missing),
            is_open=self.knows_thoughts and start == generation_prompt,
        )

    def _loss_spans(self, tools: str, prompt: Turns, answer: Turns, text: str) -> Spans | None:
        """Where the answer's assistant turns are in the text, each with its end marker.

        A turn is found by writing the conversation again with a sentinel in its place: what is
        before and after the sentinel must be the beginning and the end of the text.

        Returns:
            None if a turn cannot be found in this way.
        """
        # Not return_assistant_tokens_mask of transformers, because its mask is 0 everywhere unless
        # the template marks turns with {% generation %}, which those of Qwen3 and Codestral do not.
        spans = []
        for number, turn in enumerate(answer):
            is_last = number == len(answer) - 1
            if turn.role != "assistant" or not (is_last or self.all_turns):
                continue
            edges = self._edges(tools, (*prompt, *answer), len(prompt) + number, text)
            if edges is None:
                return None
            before, after = edges
            end = len(text) - len(after)
            marker = after if is_last else self.after_answer
            if after.startswith(marker):
                end += len(marker)
            spans.append((len(before), end))
        return tuple(spans)

    def _edges(self, tools: str, turns: Turns, number: int, text: str) -> tuple[str, str] | None:
        """What the text has before and after a turn, each as short as a sentinel shows it.

        The sentinel stands for the complete turn, and for its content and each field of text:
        thoughts are written before the content, tool calls behind it.
        """
        turn = turns[number]
        marked = [Message("assistant", SENTINEL)]
        if turn.extra:
            marked.append(
                dataclasses.replace(turn, content=SENTINEL, extra=_content_of(turn.extra))
            )
            for name, value in json.loads(turn.extra).items():
                if isinstance(value, str):
                    extra = {**json.loads(turn.extra), name: SENTINEL}
                    marked.append(dataclasses.replace(turn, extra=json.dumps(extra)))
        befores, afters = [], []
        for sentinel in marked:
            conversation = (*turns[:number], sentinel, *turns[number + 1 :])
            before, found, after = self._template(conversation, tools).partition(SENTINEL)
            if found and text.startswith(before):
                befores.append(before)
            if found and text.endswith(after):
                afters.append(after)
        if not befores or not afters:
            return None
        before, after = min(befores, key=len), min(afters, key=len)
        if len(before) + len(after) > len(text):  # they overlap
            return None
        return before, after

    def _generation_prompt(self, prompt: Turns, tools: str) -> str | Dropped:
        """What the template writes for a prompt that is to be answered."""
        start = self._template(prompt, tools, add_generation_prompt=True)
        if tools and start == self._template(prompt, add_generation_prompt=True):
            return Dropped("the chat template has no place for tools")
        return start

    def _before_answer(self, prompt: Turns, start: str, tools: str = "") -> str:
        """What the template writes before an answer without thoughts, which is not the answer's.

        Mostly that is `start`, the generation prompt. Qwen3 adds an empty think block; the template
        of DeepSeek-R1 ends the generation prompt in <think>, which it does not write here.
        """
        conversation = (*prompt, Message("assistant", SENTINEL))
        before, found, _ = self._template(conversation, tools).partition(SENTINEL)
        # Where a template writes something else in its place, the texts part before it.
        is_other = not before.startswith(start) and not start.startswith(before)
        return start if not found or is_other else before

    def _template(
        self, messages: Turns, tools: str = "", add_generation_prompt: bool = False
    ) -> str:
        options: dict[str, Any] = {}
        template = self.template
        if tools:
            options["tools"] = json.loads(tools)
            template = self.for_tools or template
        assert template is not None
        text = self.tokenizer.apply_chat_template(
            [turn.fields for turn in messages],
            chat_template=limited(template),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
            **self.kwargs,
        )
        return str(text)

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        if not self.special:
            return None
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))


def _all_begin(texts: Iterable[str], start: str) -> bool:
    return all(text.startswith(start) for text in texts)


def plain_prompt(prompt: Turns) -> str | Dropped:
    """Turns as Human: / Assistant: text that an answer is put behind."""
    for turn in prompt:
        if turn.extra:
            return _no_field(turn)
    if any(turn.role not in PLAIN_TURNS for turn in prompt):
        return NO_PLAIN_ROLE
    return "".join(PLAIN_TURNS[turn.role] + turn.content for turn in prompt) + PLAIN_ANSWER


def _content_of(extra: str) -> str:
    """The other fields of a message that has content after all."""
    fields = json.loads(extra)
    fields.pop("content", None)
    return json.dumps(fields)


def _no_field(turn: Message) -> Dropped:
    names = [name for name in turn.fields if name not in ("role", "content")]
    return Dropped(f"plain text has no form for the message field {names[0]!r}")


def _refused(error: Exception) -> Dropped:
    return Dropped(f"the chat template refuses it: {printable(str(error)).strip()[:80]}")


def _turns(answer: Text) -> Turns:
    if isinstance(answer, str):
        raise TypeError("a record's prompt is messages but an answer is a string")
    return answer
