"""Tokenization: preference records to token ids, with exact prompt boundaries.

One pair on its way through `Encoder.encode`:

1. `chat_template.py` writes the prompt and the prompt with each answer (completion) as text;
2. the three texts are tokenized. Prompt and answer are tokenized together, because apart they give
   other tokens; the boundary is where the ids of the prompt and of prompt + answer part;
3. bos is put before and eos behind, unless a chat template wrote them (`special_tokens.py`);
4. the loss spans become a completion mask (`_completion_mask`);
5. the prompt, then the answers are truncated (`truncate.py`).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.chat_template import Layout
from jaxdpo.data.formats.preference import Dropped, Message, Preference, Text, shared_length
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.pair_text import AnswerText, PairText
from jaxdpo.data.special_tokens import SpecialTokens
from jaxdpo.data.template_source import check_kwargs, find_template
from jaxdpo.data.tokenizer_json import Tokenizer
from jaxdpo.data.truncate import prompt_limit, truncate_completion, truncate_prompt
from jaxdpo.data.word_cache import Ids, Texts, WordCache
from jaxdpo.utils.text import printable


def check_vocabulary(largest: int, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that the model has an embedding for every token id, the largest of which is given.

    Raises:
        ValueError: it is not below vocab_size; names the token, the tokenizer and the model's size.
    """
    if largest >= vocab_size:
        token = printable(str(tokenizer.convert_ids_to_tokens(largest)))
        raise ValueError(
            f"model.path: the tokenizer {tokenizer.name_or_path} gives the id {largest} "
            f"({token!r}), but the model's vocab_size is {vocab_size}. "
            "Use the tokenizer that the model was trained with"
        )


class EncodedPrompt(NamedTuple):
    """A prompt to generate an answer to."""

    ids: np.ndarray
    """int32, at least one."""
    truncated: bool
    """Whether its beginning was cut off."""


class _Completion(NamedTuple):
    """An answer as it is trained on: with its eos, and truncated."""

    ids: Ids
    mask: np.ndarray | None
    """Its completion mask. None: every token has loss."""
    truncated: bool
    """Whether its end was cut off."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns records into token ids for one tokenizer and one set of data options."""

    tokenizer: Tokenizer
    template: str | None
    """Chat template for messages; None: plain text."""
    max_length: int
    """Most tokens of prompt + answer."""
    max_prompt_length: int
    """Most tokens of a prompt. 0: what the longer answer leaves of max_length, at least half."""
    all_turns: bool = True
    """Loss on every assistant turn of an answer of several turns, not only on the last."""
    strings: str | None = None
    """data.strings."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """data.chat_template_kwargs."""
    for_tools: str | None = None
    """Chat template for rows with tools, if it is another one."""
    template_note: str = ""
    """Which template it is, for the log."""

    @classmethod
    def create(cls, tokenizer: Tokenizer, section: DataSection) -> "Encoder":
        """The encoder that the data options ask for.

        Raises:
            ValueError: data.chat_template cannot be read, or is not a valid template.
        """
        assert section.max_length > section.max_prompt_length, (
            "automatic lengths are resolved from the model first"
        )
        found = find_template(tokenizer, section.chat_template)
        check_kwargs("data.chat_template_kwargs", section.chat_template_kwargs, found)
        return cls(
            tokenizer,
            template=found.text,
            for_tools=found.for_tools,
            template_note=found.note,
            max_length=section.max_length,
            max_prompt_length=section.max_prompt_length,
            all_turns=section.loss_turns == "all",
            strings=section.strings,
            kwargs=section.chat_template_kwargs,
        )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that the ids of a text depend on, by the names that users know. JSON values."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            rules = sorted(self.tokenizer.get_vocab().items())
        else:
            rules = backend.to_str()
        special = sorted(
            (name, str(token)) for name, token in self.tokenizer.special_tokens_map.items()
        )
        return {
            "tokenizer": _sha256([type(self.tokenizer).__name__, rules, special]),
            "chat template": _sha256([self.template, self.for_tools]),
            "truncation": f"{self.max_length}, {self.max_prompt_length}",
            "choice of turns": self.all_turns,
            "strings": self.strings,
            "chat_template_kwargs": dict(self.kwargs),
        }

    # --- pairs ---

    def encode(self, records: Sequence[Preference]) -> list[EncodedPair | Dropped]:
        """Encode many records at once, each to a pair or to the reason why it is dropped."""
        texts = [self._layout.render(record) for record in records]
        results: dict[int, EncodedPair | Dropped] = {}
        # Two calls of the tokenizer: in what a chat template wrote, special tokens are parsed.
        for templated in (False, True):
            batch = []
            for i, text in enumerate(texts):
                if isinstance(text, Dropped):
                    results[i] = text
                elif text.templated is templated:
                    batch.append((i, text))
            triples = [(text.prompt, text.chosen.text, text.rejected.text) for _, text in batch]
            for (i, text), ids in zip(batch, self._pair_ids(triples, templated), strict=True):
                results[i] = self._pair(records[i], text, ids)
        return [results[i] for i in range(len(records))]

    def spells_special(self, record: Preference) -> bool:
        """Whether the text from outside contains a special token's spelling."""
        return self._layout.spell_special(record.texts)

    def strings_spell_special(self, record: Preference) -> bool:
        """Whether a record of strings spells special tokens, an eos at its end apart."""
        return self._layout.strings_spell_special(record)

    def _pair(
        self, record: Preference, text: PairText, ids: Sequence[Ids]
    ) -> EncodedPair | Dropped:
        """The pair of a record, from the ids of its prompt and of its prompt with each answer."""
        prompt, with_chosen, with_rejected = ids
        used = itertools.chain(with_chosen, with_rejected)
        if not text.templated and not self.special.ids.isdisjoint(used):
            return Dropped(
                "text spells a special token that the tokenizer cannot read as plain text"
            )
        # One boundary for both answers, so that they answer the same prompt: a token that spans the
        # end of the prompt belongs to the answers.
        boundary = min(shared_length(prompt, with_chosen), shared_length(prompt, with_rejected))
        prompt_ids = prompt[:boundary]
        if not text.writes_bos:
            prompt_ids = self.special.bos + prompt_ids
        chosen_ids = with_chosen[boundary:]
        rejected_ids = with_rejected[boundary:]
        if not prompt_ids:
            return Dropped("no prompt token before the answer")
        if not chosen_ids or not rejected_ids:
            return Dropped("empty answer")
        if chosen_ids == rejected_ids:
            return Dropped("identical answers")

        num_eos = 0 if text.templated else len(self.special.eos)
        longer_answer = max(len(chosen_ids), len(rejected_ids)) + num_eos
        kept_prompt = self._truncate_prompt(prompt_ids, longer_answer)
        length = len(kept_prompt)
        chosen = self._completion(text.chosen, with_chosen, boundary, length, text.templated)
        rejected = self._completion(text.rejected, with_rejected, boundary, length, text.templated)
        for completion in (chosen, rejected):
            has_loss = completion.mask is None or completion.mask.any()
            if not completion.ids or not has_loss:
                return Dropped("no room for an answer")
        if chosen.ids == rejected.ids:
            return Dropped("identical answers after truncation")
        return EncodedPair(
            prompt_ids=np.array(kept_prompt, np.int32),
            chosen_ids=np.array(chosen.ids, np.int32),
            rejected_ids=np.array(rejected.ids, np.int32),
            chosen_mask=chosen.mask,
            rejected_mask=rejected.mask,
            id=record.id,
            weight=record.weight,
            margin=record.margin,
            truncated_prompt=len(kept_prompt) < len(prompt_ids),
            truncated_chosen=chosen.truncated,
            truncated_rejected=rejected.truncated,
            ended_chosen=self.special.end(chosen.ids),
            ended_rejected=self.special.end(rejected.ids),
            prompt_key=record.prompt_key,
            group_key=record.group_key,
            pair_key=record.pair_key,
            left_out=text.left_out,
            is_open=text.is_open,
        )

    def _completion(
        self, answer: AnswerText, ids: Ids, boundary: int, prompt_length: int, templated: bool
    ) -> _Completion:
        """The answer with its eos and completion mask, truncated.

        Args:
            ids: of the prompt with the answer, which begins at `boundary`.
            prompt_length: tokens of the truncated prompt, bos included.
        """
        eos = []
        if not templated:
            eos = self.special.eos
        complete = ids[boundary:] + eos
        kept = truncate_completion(complete, prompt_length, self.max_length)
        mask = self._completion_mask(answer, ids, templated)
        if mask is not None:
            mask = mask[boundary:] + [True] * len(eos)
            mask = truncate_completion(mask, prompt_length, self.max_length)
            mask = np.array(mask, bool)
        return _Completion(kept, mask, truncated=len(kept) < len(complete))

    def _completion_mask(self, answer: AnswerText, ids: Ids, templated: bool) -> list[bool] | None:
        """Which tokens of a prompt with its answer have loss. None: all after the prompt."""
        if answer.loss_spans is None:
            return None
        mask = [False] * len(ids)
        for begin, end in answer.loss_spans:
            # Spans are in characters. The tokens before a character are those that the text up to
            # there shares with the complete text: a token across the edge belongs to what follows.
            before_begin, before_end = self.token_ids(
                [answer.text[:begin], answer.text[:end]], templated
            )
            first = shared_length(before_begin, ids)
            stop = shared_length(before_end, ids)
            if end == len(answer.text):
                stop = len(ids)
            mask[first:stop] = [True] * (stop - first)
        return mask

    def _truncate_prompt(self, ids: Ids, longer_answer: int) -> Ids:
        limit = int(prompt_limit(self.max_length, self.max_prompt_length, longer_answer))
        bos_id = self.tokenizer.bos_token_id
        return truncate_prompt(ids, limit, bos_id)  # type: ignore[arg-type]

    # --- prompts for generation ---

    def starts(self) -> tuple[str, str] | None:
        """How a prompt ends with and without thinking, where the two differ; None if not."""
        if self.template is None:
            return None
        turns = (Message("user", "a"),)
        with_, without = (self._layout.prompt(turns, thinking=thinks) for thinks in (True, False))
        if isinstance(with_, Dropped) or isinstance(without, Dropped) or with_ == without:
            return None
        shared = shared_length(with_, without)
        line = with_.rfind("\n", 0, shared - 1) + 1  # the last line of what they share
        return with_[line:], without[line:]

    def encode_prompt(
        self, prompt: Text, tools: str = "", thinking: bool | None = None
    ) -> EncodedPrompt | Dropped:
        """What training would put before an answer to this prompt; or why that does not exist.

        Args:
            tools: JSON text of the tools that the chat template is given.
            thinking: which of the template's prompts (Layout.prompt).
        """
        if isinstance(prompt, str) and self.strings == "message":
            prompt = (Message("user", prompt),)
        if isinstance(prompt, str):
            text, templated = prompt, self.strings == "templated"
            writes_bos = templated and self._layout.spells_bos(text)
        else:
            text = self._layout.prompt(prompt, tools, thinking)
            templated = writes_bos = self.template is not None
        if isinstance(text, Dropped):
            return text
        (ids,) = self.token_ids([text], templated)
        if not writes_bos:
            ids = self.special.bos + ids
        if not ids:
            return Dropped("has no token")
        kept = self._truncate_prompt(ids, self.max_length // 2)  # an answer of unknown length
        return EncodedPrompt(np.array(kept, np.int32), truncated=len(kept) < len(ids))

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer.

        They are eos and, with a chat template, the first special token that it writes after an
        answer (`<|im_end|>`, which for many base models is not the eos token).
        """
        stop = list(self.special.eos)
        if self.template is not None:
            (after_answer,) = self.token_ids([self._layout.after_answer], True)
            ends = [token for token in after_answer if token in self.special.ids]
            stop += ends[:1]
        return tuple(dict.fromkeys(stop))

    # --- ids ---

    @functools.cached_property
    def special(self) -> SpecialTokens:
        """The tokenizer's bos, eos and other special tokens."""
        return SpecialTokens.of(self.tokenizer)

    def token_ids(self, texts: list[str], templated: bool) -> list[Ids]:
        """Token ids of each text, without bos and eos.

        Args:
            templated: a chat template wrote the texts. Only then the spelling of a special token is
                that token; in text from outside it is split like any other text, so that data
                cannot end a turn or a document.
        """
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not templated,
            return_attention_mask=False,
            verbose=False,
        )
        return list(encoded["input_ids"])  # type: ignore[arg-type]

    def _pair_ids(self, texts: Sequence[Texts], templated: bool) -> Sequence[Sequence[Ids]]:
        """The ids of the three texts of each pair."""
        if texts and self._word_cache is not None:
            return self._word_cache.encode_pairs(texts, special=templated)
        ids = self.token_ids(list(itertools.chain(*texts)), templated)
        return [ids[start : start + 3] for start in range(0, len(ids), 3)]

    @functools.cached_property
    def _word_cache(self) -> WordCache | None:
        return WordCache.of(self.tokenizer)

    @functools.cached_property
    def _layout(self) -> Layout:
        spellings = tuple(self.special.by_spelling)
        return Layout(
            self.tokenizer,
            self.template,
            spellings,
            self.all_turns,
            self.strings,
            self.kwargs,
            self.for_tools,
        )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
