"""Records to token ids: chat template or plain text, exact prompt boundaries, truncation.

Prompt and answer are laid out and encoded together, because encoding them apart gives other tokens; the boundary is where
the encoded prompt and the encoded prompt + answer part.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError, TemplateSyntaxError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch, which nothing here needs
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxdpo.config import DataSection
from jaxdpo.data.records import Dropped, Message, Preference, Text, Turns, printable, shared_length, strings
from jaxdpo.data.table import EncodedPair

PLAIN_TURNS = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
PLAIN_ANSWER = "\n\nAssistant:"
SENTINEL = "\ue000answer\ue000"
"""Stands in for an answer to find what the template writes before it; private-use characters keep it apart from real text."""

FIXED_DATE = """{%- macro strftime_now(format) -%}
{{- {"%Y-%m-%d": "2024-07-26"}.get(format, "26 Jul 2024") -}}
{%- endmacro -%}"""
"""Put before a template that writes today's date, so that a run resumed tomorrow sees the same tokens."""

SPELLS_SPECIAL = Dropped("text spells a special token of the chat template")

Ids = list[int]
Tokenizer = PreTrainedTokenizerBase


def load_tokenizer(path: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or hub id. Code that comes with a model is never run.

    Raises:
        ValueError: there is none, or it needs such code.
    """
    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not folder.is_dir():
        raise ValueError(f"model.path={path}: no such folder")
    path = str(folder) if folder.is_dir() else path
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = printable(str(error)).strip().split("\n")[0]
        raise ValueError(f"model.path={path}: its tokenizer could not be loaded ({reason}). The folder needs tokenizer.json") from None


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One pair laid out as text: the prompt alone, and with each answer."""

    prompt: str
    chosen: str
    rejected: str
    templated: bool
    """Written by a chat template: special tokens are spelled in the text, and so is the end marker."""


class EncodedPrompt(NamedTuple):
    """A prompt that is to be answered."""

    ids: np.ndarray
    """int32, at least one."""
    truncated: bool
    """Whether its beginning was cut off."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns records into token ids for one tokenizer and one set of data options."""

    tokenizer: Tokenizer
    template: str | None
    """Chat template for messages; None: plain text."""
    max_length: int
    max_prompt_length: int

    @classmethod
    def create(cls, tokenizer: Tokenizer, section: DataSection) -> "Encoder":
        """The encoder that the data options ask for.

        Raises:
            ValueError: data.chat_template cannot be read, or is no valid template.
        """
        assert section.max_length > section.max_prompt_length > 0, "automatic lengths are resolved from the model first"
        template = read_template(tokenizer, section.chat_template)
        return cls(tokenizer, template, section.max_length, section.max_prompt_length)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """All that the ids of a text depend on, by the names that users know."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = sorted(self.tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        special = sorted((name, str(token)) for name, token in self.tokenizer.special_tokens_map.items())
        known = {"tokenizer": [type(self.tokenizer).__name__, rules, special], "chat template": self.template}
        hashes = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in known.items()}
        return {**hashes, "truncation": f"{self.max_length}, {self.max_prompt_length}"}

    def encode(self, records: Sequence[Preference]) -> list[EncodedPair | Dropped]:
        """Encode many records at once, each to a pair or to the reason why it is of no use."""
        rendered = [self.render(record) for record in records]
        results: list[EncodedPair | Dropped | None] = [item if isinstance(item, Dropped) else None for item in rendered]
        for templated in (False, True):
            these = [(i, item) for i, item in enumerate(rendered) if isinstance(item, Rendered) and item.templated is templated]
            ids = self.token_ids([text for _, item in these for text in (item.prompt, item.chosen, item.rejected)], templated)
            for slot, (i, _) in enumerate(these):
                prompt, chosen, rejected = ids[3 * slot : 3 * slot + 3]
                results[i] = self._pair(records[i], prompt, chosen, rejected, templated)
        return [result for result in results if result is not None]

    # --- text ---

    def render(self, record: Preference) -> Rendered | Dropped:
        """Lay a record out: strings verbatim; messages by the chat template, or as Human: / Assistant: turns without one."""
        if record.tools and (isinstance(record.prompt, str) or self.template is None):
            return Dropped("plain text has no form for tools")
        if isinstance(record.prompt, str):
            answers = [_without_end(str(answer), self.tokenizer.eos_token) for answer in (record.chosen, record.rejected)]
            return Rendered(record.prompt, record.prompt + answers[0], record.prompt + answers[1], templated=False)
        prompt, chosen, rejected = record.prompt, _turns(record.chosen), _turns(record.rejected)
        if self.template is not None:
            return SPELLS_SPECIAL if self.spells_special(record) else self._render_template(record.tools, prompt, chosen, rejected)
        text = _plain_prompt(prompt)
        if isinstance(text, Dropped):
            return text
        answers = [_without_end(answer[0].content, self.tokenizer.eos_token) for answer in (chosen, rejected)]
        return Rendered(text, f"{text} {answers[0]}", f"{text} {answers[1]}", templated=False)

    def _render_template(self, tools: str, prompt: Turns, chosen: Turns, rejected: Turns) -> Rendered | Dropped:
        try:
            start = self._template(prompt, tools, add_generation_prompt=True)
            if tools and start == self._template(prompt, add_generation_prompt=True):
                return Dropped("the chat template has no place for tools")
            texts = [self._template(prompt + answer, tools) for answer in (chosen, rejected)]
            contents = (chosen[0].content, rejected[0].content)
            if not all(text.startswith(start + content) for text, content in zip(texts, contents, strict=True)):
                before = self._before_answer(prompt, start, tools)
                start = before if all(text.startswith(before) for text in texts) else start
        except (TemplateError, TypeError) as error:
            return _refused(error)
        return Rendered(start, texts[0], texts[1], templated=True)

    def _before_answer(self, prompt: Turns, start: str, tools: str = "") -> str:
        """`start` and what the template writes between it and an answer (Qwen3: an empty think block): no part of the answer."""
        before, found, _ = self._template((*prompt, Message("assistant", SENTINEL)), tools).partition(SENTINEL)
        return before if found and before.startswith(start) else start

    def _template(self, messages: Turns, tools: str = "", add_generation_prompt: bool = False) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        options = {"tools": json.loads(tools)} if tools else {}
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        return str(text)

    def spells_special(self, record: Preference) -> bool:
        """Whether the text from outside contains a special token's spelling, e.g. `<|im_end|>`."""
        return self._spell_special(record.texts)

    def _spell_special(self, texts: Iterable[str]) -> bool:
        return self._special_pattern is not None and any(map(self._special_pattern.search, texts))

    # --- ids ---

    def encode_prompt(self, prompt: Text) -> EncodedPrompt | Dropped:
        """What training would put before an answer to this prompt; or why there is no such thing."""
        templated = self.template is not None and not isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self._templated_prompt(prompt) if templated else _plain_prompt(prompt)
        if isinstance(text, Dropped):
            return text
        ids = ([] if templated else self._bos) + self.token_ids([text], templated)[0]
        kept = np.array(self._cut_prompt(ids), np.int32)
        return EncodedPrompt(kept, truncated=len(kept) < len(ids)) if ids else Dropped("has no token")

    def _templated_prompt(self, prompt: Turns) -> str | Dropped:
        if self._spell_special(strings(prompt)):
            return SPELLS_SPECIAL
        try:
            return self._before_answer(prompt, self._template(prompt, add_generation_prompt=True))
        except (TemplateError, TypeError) as error:
            return _refused(error)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: end of text, and the first special token that the template writes after an answer."""
        if self.template is None:
            return tuple(self._eos)
        try:
            after = self._template((Message("user", "a"), Message("assistant", SENTINEL))).partition(SENTINEL)[2]
        except (TemplateError, TypeError):  # a template that wants another conversation
            after = ""
        ends = [token for token in itertools.chain(*self.token_ids([after], True)) if token in self._special_ids]
        return tuple(dict.fromkeys([*self._eos, *ends[:1]]))

    def token_ids(self, texts: list[str], templated: bool) -> list[Ids]:
        """Token ids; special tokens are read in what a template wrote, and split like any other text elsewhere."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=not templated, return_attention_mask=False, verbose=False
        )
        return list(encoded["input_ids"])  # type: ignore[arg-type]

    def _pair(self, record: Preference, prompt: Ids, chosen: Ids, rejected: Ids, templated: bool) -> EncodedPair | Dropped:
        if not templated and not self._special_ids.isdisjoint(itertools.chain(chosen, rejected)):
            return Dropped("text spells a special token that the tokenizer cannot read as plain text")
        boundary = min(shared_length(prompt, chosen), shared_length(prompt, rejected))
        start, end = ([], []) if templated else (self._bos, self._eos)
        prompt_ids = start + prompt[:boundary]
        answers = [ids[boundary:] for ids in (chosen, rejected)]
        if not prompt_ids:
            return Dropped("no prompt token before the answer")
        if not all(answers):
            return Dropped("empty answer")
        if answers[0] == answers[1]:
            return Dropped("identical answers")
        kept_prompt = self._cut_prompt(prompt_ids)
        room = max(self.max_length - len(kept_prompt), 0)
        kept = [(ids + end)[:room] for ids in answers]
        if not all(kept):
            return Dropped("no room for an answer")
        if kept[0] == kept[1]:
            return Dropped("identical answers after truncation")
        cut = [len(ids) + len(end) > room for ids in answers]
        return EncodedPair(
            *(np.array(ids, np.int32) for ids in (kept_prompt, *kept)),
            id=record.id,
            weight=record.weight,
            truncated_prompt=len(kept_prompt) < len(prompt_ids),
            truncated_chosen=cut[0],
            truncated_rejected=cut[1],
            ended_chosen=self._ends(kept[0]),
            ended_rejected=self._ends(kept[1]),
            prompt_key=record.prompt_key,
            pair_key=record.pair_key,
        )

    def _cut_prompt(self, ids: Ids) -> Ids:
        """The end of the prompt; a beginning-of-text token stays in front."""
        if len(ids) <= self.max_prompt_length:
            return ids
        first = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return first + ids[len(ids) - (self.max_prompt_length - len(first)) :]

    def _ends(self, ids: Ids) -> bool:
        """Whether an answer ends in a special token, or in one and a line break (as ChatML templates write)."""
        return not self._end_ids.isdisjoint(ids[-2:])

    @functools.cached_property
    def _bos(self) -> Ids:
        """What the tokenizer by its own convention puts before a text."""
        with_special = list(self.tokenizer("a")["input_ids"])  # type: ignore[arg-type]
        without = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        return next((with_special[:i] for i in range(len(with_special)) if with_special[i : i + len(without)] == without), [])

    @functools.cached_property
    def _eos(self) -> Ids:
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]  # type: ignore[arg-type]

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens and their ids. Those of one tokenizer stand in two lists, of which either may lack some."""
        added = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return {**added, **dict(zip(map(str, self.tokenizer.all_special_tokens), self.tokenizer.all_special_ids, strict=True))}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        """All but the one that stands for unknown text (GPT-2 uses its end-of-text token as that too)."""
        return frozenset(self._special.values()).difference([self.tokenizer.unk_token_id])

    @functools.cached_property
    def _end_ids(self) -> frozenset[int]:
        return self._special_ids.union(self._eos)

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def read_template(tokenizer: Tokenizer, path: str | None) -> str | None:
    """The chat template to use: the one in the file at `path`, else the tokenizer's own, else None.

    Raises:
        ValueError: the file cannot be read, or the template does not compile.
    """
    try:
        template = None if path is None else Path(path).expanduser().read_text(encoding="utf-8")
        if template is None and tokenizer.chat_template:
            template = str(tokenizer.get_chat_template())
        if template is not None:
            template = FIXED_DATE + template if "strftime_now" in template else template
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except (OSError, UnicodeDecodeError, TemplateSyntaxError) as error:
        raise ValueError(f"data.chat_template={path}: {printable(str(error))}. Name a Jinja chat template file") from None
    except (TemplateError, TypeError):
        pass  # it compiles; what it asks of a conversation is found out row by row
    return template


def check_vocabulary(largest: int, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that the model has a row for every token id, of which this is the largest.

    Raises:
        ValueError: it is not below vocab_size; names the token, the tokenizer and the model's size.
    """
    if largest >= vocab_size:
        token = printable(str(tokenizer.convert_ids_to_tokens(largest)))
        raise ValueError(
            f"model.path: the tokenizer {tokenizer.name_or_path} gives the id {largest} ({token!r}), but the model's vocab_size is "
            f"{vocab_size}. Use the tokenizer that the model was trained with"
        )


def describe_pair(pair: EncodedPair, tokenizer: Tokenizer) -> str:
    """The pair as the model sees it, for a terminal: the prompt, and each answer's scored text between double angle brackets."""
    prompt = _decode(tokenizer, pair.prompt_ids)
    lines = [f"pair {printable(pair.id)}, weight {pair.weight:g}", f"  prompt, {len(pair.prompt_ids)} tokens{_cut(pair.truncated_prompt)}"]
    lines.append(_indented(prompt))
    sides = (("chosen", pair.chosen_ids, pair.truncated_chosen), ("rejected", pair.rejected_ids, pair.truncated_rejected))
    for name, ids, truncated in sides:
        lines.append(f"  {name}, {len(ids)} tokens scored{_cut(truncated)}")
        lines.append(_indented(f"<<{decode_answer(tokenizer, pair.prompt_ids, ids)}>>"))
    return "\n".join(lines)


def decode_answer(tokenizer: Tokenizer, prompt_ids: np.ndarray, answer_ids: np.ndarray, skip_special: bool = False) -> str:
    """The answer's text as it stands after its prompt (decoded alone, some tokenizers would drop its first space)."""
    before, whole = (_decode(tokenizer, ids, skip_special) for ids in (prompt_ids, np.concatenate([prompt_ids, answer_ids])))
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, answer_ids, skip_special)


def _decode(tokenizer: Tokenizer, ids: np.ndarray, skip_special: bool = False) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))


def _cut(truncated: bool) -> str:
    return ", truncated" if truncated else ""


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in printable(text).split("\n"))


def _plain_prompt(prompt: Turns) -> str | Dropped:
    if any(turn.role not in PLAIN_TURNS for turn in prompt):
        return Dropped("plain text has no form for a role other than system, user, assistant")
    return "".join(PLAIN_TURNS[turn.role] + turn.content for turn in prompt) + PLAIN_ANSWER


def _refused(error: Exception) -> Dropped:
    return Dropped(f"the chat template refuses it: {printable(str(error)).strip()[:80]}")


def _without_end(answer: str, eos_token: Any) -> str:
    """The answer without an end-of-text token spelled at its end, which encoding adds as a token."""
    return answer.removesuffix(str(eos_token)) if eos_token else answer


def _turns(answer: Text) -> Turns:
    if isinstance(answer, str):
        raise TypeError("a record's prompt is messages but an answer is a string")
    return answer
