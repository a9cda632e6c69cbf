"""Records to token ids: exact prompt boundaries, scored tokens, truncation.

Prompt and answer are laid out and encoded together, because encoding them apart gives other tokens; the boundary is where
the encoded prompt and the encoded prompt + answer part.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError, TemplateSyntaxError

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # it advises to install PyTorch, which nothing here needs
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.chat_template import Answered, Layout, Rendered
from jaxdpo.data.formats.preference import Dropped, Preference, Text, shared_length
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.tokens import Ids, Texts, Words
from jaxdpo.utils.text import printable

FIXED_DATE = """{%- macro strftime_now(format) -%}
{{- {"%Y-%m-%d": "2024-07-26"}.get(format, "26 Jul 2024") -}}
{%- endmacro -%}"""
"""Put before a template that writes today's date, so that a run resumed tomorrow sees the same tokens."""

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
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = printable(str(error)).strip().split("\n")[0]
        raise ValueError(
            f"model.path={path}: its tokenizer could not be loaded ({reason}). The folder needs tokenizer.json"
        ) from None


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
    all_turns: bool = True
    """Score every assistant turn of an answer of several turns, not only the last."""

    @classmethod
    def create(cls, tokenizer: Tokenizer, section: DataSection) -> "Encoder":
        """The encoder that the data options ask for.

        Raises:
            ValueError: data.chat_template cannot be read, or is no valid template.
        """
        assert section.max_length > section.max_prompt_length > 0, (
            "automatic lengths are resolved from the model first"
        )
        template = read_template(tokenizer, section.chat_template)
        return cls(
            tokenizer,
            template,
            section.max_length,
            section.max_prompt_length,
            section.loss_turns == "all",
        )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that the ids of a text depend on, by the names that users know."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = sorted(self.tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        special = sorted(
            (name, str(token)) for name, token in self.tokenizer.special_tokens_map.items()
        )
        known = {
            "tokenizer": [type(self.tokenizer).__name__, rules, special],
            "chat template": self.template,
        }
        hashes = {
            name: hashlib.sha256(json.dumps(value).encode()).hexdigest()
            for name, value in known.items()
        }
        return {
            **hashes,
            "truncation": f"{self.max_length}, {self.max_prompt_length}",
            "choice of turns": self.all_turns,
        }

    def encode(self, records: Sequence[Preference]) -> list[EncodedPair | Dropped]:
        """Encode many records at once, each to a pair or to the reason why it is of no use."""
        rendered = [self._layout.render(record) for record in records]
        results: list[EncodedPair | Dropped | None] = [
            item if isinstance(item, Dropped) else None for item in rendered
        ]
        for templated in (False, True):
            these = [
                (i, item)
                for i, item in enumerate(rendered)
                if isinstance(item, Rendered) and item.templated is templated
            ]
            texts = [(item.prompt, item.chosen.text, item.rejected.text) for _, item in these]
            for (i, item), ids in zip(these, self._pair_ids(texts, templated), strict=True):
                results[i] = self._pair(records[i], item, ids)
        return [result for result in results if result is not None]

    def spells_special(self, record: Preference) -> bool:
        """Whether the text from outside contains a special token's spelling."""
        return self._layout.spell_special(record.texts)

    @functools.cached_property
    def _layout(self) -> Layout:
        return Layout(self.tokenizer, self.template, tuple(self._special), self.all_turns)

    # --- ids ---

    def encode_prompt(self, prompt: Text) -> EncodedPrompt | Dropped:
        """What training would put before an answer to this prompt; or why there is no such thing."""
        templated = self.template is not None and not isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self._layout.prompt(prompt)
        if isinstance(text, Dropped):
            return text
        ids = ([] if templated else self._bos) + self.token_ids([text], templated)[0]
        kept = np.array(self._cut_prompt(ids), np.int32)
        return (
            EncodedPrompt(kept, truncated=len(kept) < len(ids)) if ids else Dropped("has no token")
        )

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: end of text, and the first special token that the template writes after an answer."""
        if self.template is None:
            return tuple(self._eos)
        ends = [
            token
            for token in itertools.chain(*self.token_ids([self._layout.after_answer], True))
            if token in self._special_ids
        ]
        return tuple(dict.fromkeys([*self._eos, *ends[:1]]))

    def token_ids(self, texts: list[str], templated: bool) -> list[Ids]:
        """Token ids; special tokens are read in what a template wrote, and split like any other text elsewhere."""
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
        if texts and self._words is not None:
            return self._words.encode_pairs(texts, special=templated)
        ids = self.token_ids(list(itertools.chain(*texts)), templated)
        return [ids[start : start + 3] for start in range(0, len(ids), 3)]

    @functools.cached_property
    def _words(self) -> Words | None:
        return Words.of(self.tokenizer)

    def _pair(
        self, record: Preference, item: Rendered, ids: Sequence[Ids]
    ) -> EncodedPair | Dropped:
        """The pair of a record's texts and their ids: prompt, and prompt with chosen and rejected."""
        prompt, *sides = ids
        if not item.templated and not self._special_ids.isdisjoint(itertools.chain(*sides)):
            return Dropped(
                "text spells a special token that the tokenizer cannot read as plain text"
            )
        boundary = min(shared_length(prompt, side) for side in sides)
        start, end = ([], []) if item.templated else (self._bos, self._eos)
        prompt_ids = start + prompt[:boundary]
        answers = [side[boundary:] for side in sides]
        if not prompt_ids:
            return Dropped("no prompt token before the answer")
        if not all(answers):
            return Dropped("empty answer")
        if answers[0] == answers[1]:
            return Dropped("identical answers")
        kept_prompt = self._cut_prompt(prompt_ids)
        room = max(self.max_length - len(kept_prompt), 0)
        kept = [(answer + end)[:room] for answer in answers]
        scored = [
            self._scored(text, side, item.templated)
            for text, side in zip((item.chosen, item.rejected), sides, strict=True)
        ]
        masks = [
            None if mask is None else np.array((mask[boundary:] + [True] * len(end))[:room], bool)
            for mask in scored
        ]
        if not all(kept) or any(mask is not None and not mask.any() for mask in masks):
            return Dropped("no room for an answer")
        if kept[0] == kept[1]:
            return Dropped("identical answers after truncation")
        cut = [len(answer) + len(end) > room for answer in answers]
        return EncodedPair(
            *(np.array(ids, np.int32) for ids in (kept_prompt, *kept)),
            *masks,
            id=record.id,
            weight=record.weight,
            margin=record.margin,
            truncated_prompt=len(kept_prompt) < len(prompt_ids),
            truncated_chosen=cut[0],
            truncated_rejected=cut[1],
            ended_chosen=self._ends(kept[0]),
            ended_rejected=self._ends(kept[1]),
            prompt_key=record.prompt_key,
            pair_key=record.pair_key,
        )

    def _scored(self, side: Answered, ids: Ids, templated: bool) -> list[bool] | None:
        """Which tokens of a prompt with its answer are scored; None: all behind the prompt."""
        if side.scored is None:
            return None
        mask = [False] * len(ids)
        for (
            begin,
            end,
        ) in (
            side.scored
        ):  # where they lie among the tokens: as far as the text up to there has the same tokens
            first, last = (
                shared_length(cut, ids)
                for cut in self.token_ids([side.text[:begin], side.text[:end]], templated)
            )
            last = len(ids) if end == len(side.text) else last
            mask[first:last] = [True] * (last - first)
        return mask

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
        return next(
            (
                with_special[:i]
                for i in range(len(with_special))
                if with_special[i : i + len(without)] == without
            ),
            [],
        )

    @functools.cached_property
    def _eos(self) -> Ids:
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]  # type: ignore[arg-type]

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens and their ids. Those of one tokenizer stand in two lists, of which either may lack some."""
        added = {
            str(token): number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }
        return {
            **added,
            **dict(
                zip(
                    map(str, self.tokenizer.all_special_tokens),
                    self.tokenizer.all_special_ids,
                    strict=True,
                )
            ),
        }

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        """All but the one that stands for unknown text (GPT-2 uses its end-of-text token as that too)."""
        return frozenset(self._special.values()).difference([self.tokenizer.unk_token_id])

    @functools.cached_property
    def _end_ids(self) -> frozenset[int]:
        return self._special_ids.union(self._eos)


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
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}], chat_template=template, tokenize=False
            )
    except (OSError, UnicodeDecodeError, TemplateSyntaxError) as error:
        raise ValueError(
            f"data.chat_template={path}: {printable(str(error))}. Name a Jinja chat template file"
        ) from None
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
    lines = [
        f"pair {printable(pair.id)}, weight {pair.weight:g}",
        f"  prompt, {len(pair.prompt_ids)} tokens{_cut(pair.truncated_prompt)}",
    ]
    lines.append(_indented(prompt))
    for name, (ids, scored), truncated in zip(
        ("chosen", "rejected"),
        pair.answers,
        (pair.truncated_chosen, pair.truncated_rejected),
        strict=True,
    ):
        pieces = [
            f"<<{text}>>" if counts else text
            for text, counts in answer_pieces(tokenizer, pair.prompt_ids, ids, scored)
        ]
        lines.append(f"  {name}, {scored.sum()} tokens scored{_cut(truncated)}")
        lines.append(_indented("".join(pieces)))
    return "\n".join(lines)


def answer_pieces(
    tokenizer: Tokenizer, prompt_ids: np.ndarray, ids: np.ndarray, scored: np.ndarray
) -> list[tuple[str, bool]]:
    """An answer's text, cut where scored tokens begin and end; with each piece whether it is scored."""
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(ids)]
    texts = [
        decode_answer(tokenizer, np.concatenate([prompt_ids, ids[:begin]]), ids[begin:end])
        for begin, end in itertools.pairwise(edges)
    ]
    return list(zip(texts, scored[edges[:-1]].tolist(), strict=True))


def decode_answer(
    tokenizer: Tokenizer, prompt_ids: np.ndarray, answer_ids: np.ndarray, skip_special: bool = False
) -> str:
    """The answer's text as it stands after its prompt (decoded alone, some tokenizers would drop its first space)."""
    before, whole = (
        _decode(tokenizer, ids, skip_special)
        for ids in (prompt_ids, np.concatenate([prompt_ids, answer_ids]))
    )
    return (
        whole[len(before) :]
        if whole.startswith(before)
        else _decode(tokenizer, answer_ids, skip_special)
    )


def _decode(tokenizer: Tokenizer, ids: np.ndarray, skip_special: bool = False) -> str:
    return str(
        tokenizer.decode(
            ids.tolist(), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
    )


def _cut(truncated: bool) -> str:
    return ", truncated" if truncated else ""


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in printable(text).split("\n"))
