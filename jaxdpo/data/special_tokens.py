"""The special tokens of a tokenizer: bos (beginning of text), eos (end of text) and the others."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by their roles. Chat templates write their own bos and eos as text."""

    bos: list[int]
    """What the tokenizer by its own convention puts before a text: one token, or none."""
    eos: list[int]
    """The tokenizer's end-of-text token, or none."""
    by_spelling: dict[str, int]
    """All special tokens, e.g. `<|im_end|>`, with their ids."""
    ids: frozenset[int]
    """All except the token for unknown text (GPT-2 uses its eos token as that too)."""

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Those of a tokenizer of transformers."""
        # A tokenizer lists its special tokens in two places, and either list may lack some.
        by_spelling = {}
        for number, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                by_spelling[str(token)] = number
        listed = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        by_spelling.update((str(token), number) for token, number in listed)
        return cls(
            bos=_find_bos(tokenizer),
            eos=[] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)],
            by_spelling=by_spelling,
            ids=frozenset(by_spelling.values()).difference([tokenizer.unk_token_id]),
        )

    def end(self, completion: Sequence[int]) -> bool:
        """Whether an answer ends in a special token: eos, or what a chat template writes there.

        The last two tokens count, because ChatML templates write a line break after `<|im_end|>`.
        """
        return not self.ids.union(self.eos).isdisjoint(completion[-2:])


def _find_bos(tokenizer: Any) -> list[int]:
    # Not tokenizer.bos_token_id: some tokenizers define a bos token that they never add (Qwen), so
    # what counts is what encoding a text really puts before it.
    with_special = list(tokenizer("a")["input_ids"])
    without = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for i in range(len(with_special)):
        if with_special[i : i + len(without)] == without:
            return with_special[:i]
    return []
