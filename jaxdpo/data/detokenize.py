"""Token ids back to text: an answer, its loss tokens marked, and a pair for the terminal."""

import itertools
import re

import numpy as np

from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.special_tokens import SpecialTokens
from jaxdpo.data.tokenizer_json import Tokenizer
from jaxdpo.utils.text import printable


def decode_answer(
    tokenizer: Tokenizer, prompt_ids: np.ndarray, answer_ids: np.ndarray, skip_special: bool = False
) -> str:
    """The answer's text as it reads after its prompt.

    Decoded alone, some tokenizers (SentencePiece) would drop its first space.
    """
    before = _decode(tokenizer, prompt_ids, skip_special)
    both = _decode(tokenizer, np.concatenate([prompt_ids, answer_ids]), skip_special)
    if both.startswith(before):
        return both[len(before) :]
    return _decode(tokenizer, answer_ids, skip_special)


def decode_shown(tokenizer: Tokenizer, before: np.ndarray, ids: np.ndarray) -> str:
    """Text to look at: a special token that characters spell out has a backslash before it.

    Args:
        before: ids before these, as the prompt of an answer.
    """
    special = SpecialTokens.of(tokenizer)
    longest_first = sorted(special.by_spelling, key=len, reverse=True)
    if not longest_first:
        return decode_answer(tokenizer, before, ids)
    spelled = re.compile("|".join(map(re.escape, longest_first)))
    numbers = set(special.by_spelling.values())
    is_special = np.array([number in numbers for number in ids.tolist()], bool)
    changes = (np.flatnonzero(np.diff(is_special)) + 1).tolist()
    text = ""
    for begin, end in itertools.pairwise([0, *changes, len(ids)]):
        if begin == end:
            continue
        piece = decode_answer(tokenizer, np.concatenate([before, ids[:begin]]), ids[begin:end])
        if not is_special[begin]:
            piece = spelled.sub(r"\\\g<0>", piece)
        text += piece
    return text


def answer_pieces(
    tokenizer: Tokenizer, prompt_ids: np.ndarray, ids: np.ndarray, mask: np.ndarray
) -> list[tuple[str, bool]]:
    """An answer's text, cut where its completion mask changes; True: a piece of loss tokens."""
    changes = (np.flatnonzero(np.diff(mask)) + 1).tolist()
    pieces = []
    for begin, end in itertools.pairwise([0, *changes, len(ids)]):
        before = np.concatenate([prompt_ids, ids[:begin]])
        text = decode_shown(tokenizer, before, ids[begin:end])
        pieces.append((text, bool(mask[begin])))
    return pieces


def describe_pair(pair: EncodedPair, tokenizer: Tokenizer) -> str:
    """The pair as the model sees it, for a terminal; loss tokens between double angle brackets."""
    prompt = decode_shown(tokenizer, pair.prompt_ids[:0], pair.prompt_ids)
    lines = [
        f"pair {printable(pair.id)}, weight {pair.weight:g}",
        f"  prompt, {len(pair.prompt_ids)} tokens{_note(pair.truncated_prompt)}",
        _indented(prompt),
    ]
    truncated = (pair.truncated_chosen, pair.truncated_rejected)
    for name, (ids, mask), is_cut in zip(
        ("chosen", "rejected"), pair.answers, truncated, strict=True
    ):
        text = ""
        for piece, has_loss in answer_pieces(tokenizer, pair.prompt_ids, ids, mask):
            text += f"<<{piece}>>" if has_loss else piece
        lines.append(f"  {name}, {mask.sum()} loss tokens{_note(is_cut)}")
        lines.append(_indented(text))
    return "\n".join(lines)


def _decode(tokenizer: Tokenizer, ids: np.ndarray, skip_special: bool = False) -> str:
    # clean_up_tokenization_spaces would remove spaces before punctuation that the text has.
    text = tokenizer.decode(
        ids.tolist(), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )
    return str(text)


def _note(truncated: bool) -> str:
    return ", truncated" if truncated else ""


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in printable(text).split("\n"))
