"""Token ids of pairs whose texts begin alike, with that beginning encoded once.

Byte-level BPE cuts a text into words by a pattern and encodes each word by itself. The patterns below put a cut between a line break and a
letter whatever stands around them, and look no further ahead than one character, so that a text is encoded in two parts there
exactly as in one. For tokenizers of any other kind, texts are encoded whole.
"""

import json
import string
from collections.abc import Sequence
from typing import Any

Ids = list[int]
Texts = tuple[str, str, str]
"""A prompt, and the prompt with each answer."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = (
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",  # Llama 3
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",  # Qwen 2 and 3
)
"""How texts are cut into words; besides them GPT-2's pattern, which is built into ByteLevel."""


def can_be_cut(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers encodes the two sides of a line break before a letter as if they stood alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    spec = json.loads(backend.to_str())
    words, model = spec["pre_tokenizer"] or {}, spec["model"]
    steps = words.get("pretokenizers", [words])
    by_pattern = [step for step in steps if step.get("type") == "Split"]
    as_bytes = [step for step in steps if step.get("type") == "ByteLevel"]
    known = all(step["pattern"].get("Regex") in PATTERNS and step["behavior"] == "Isolated" and not step["invert"] for step in by_pattern)
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and (spec["normalizer"] or {}).get("type", "NFC") == "NFC"
        and len(steps) == len(by_pattern) + 1
        and [(step["add_prefix_space"], step["use_regex"]) for step in as_bytes] == [(False, not by_pattern)]
        and known
        and not any(token["lstrip"] or token["rstrip"] or "\n" in token["content"] for token in spec["added_tokens"])
    )


def encode_pairs(tokenizer: Any, pairs: Sequence[Texts], special: bool) -> list[tuple[Ids, Ids, Ids]]:
    """Ids of the three texts of each pair, for a tokenizer that `can_be_cut`.

    Args:
        special: spellings of special tokens in the texts are those tokens.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not special
    cuts = [_last_cut(*texts) for texts in pairs]
    whole = backend.encode_batch([chosen for _, chosen, _ in pairs], add_special_tokens=False)
    tails = [text[cut:] for (prompt, _, rejected), cut in zip(pairs, cuts, strict=True) for text in (prompt, rejected)]
    ends = [encoding.ids for encoding in backend.encode_batch_fast(tails, add_special_tokens=False)]
    found = []
    for number, (encoding, cut) in enumerate(zip(whole, cuts, strict=True)):
        ids = encoding.ids
        start = ids[: encoding.char_to_token(cut)] if cut else []
        found.append((start + ends[2 * number], ids, start + ends[2 * number + 1]))
    return found


def _last_cut(prompt: str, chosen: str, rejected: str) -> int:
    """Where the last line begins with a letter in what the three texts share; 0: nowhere."""
    if not chosen.startswith(prompt) or not rejected.startswith(prompt):
        return 0
    end = prompt.rfind("\n", 0, len(prompt) - 1)
    while end >= 0 and prompt[end + 1] not in string.ascii_letters:
        end = prompt.rfind("\n", 0, end)
    return end + 1
