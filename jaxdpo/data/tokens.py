"""Token ids of many texts at once, with what recurs in them encoded once: words, and the beginning that the texts of a pair share.

Byte-level BPE cuts a text into words by a pattern and encodes each word by itself. The patterns below put a cut between a line break and a
letter whatever stands around them, and look no further ahead than one character, so that a text is encoded in two parts there
exactly as in one. For tokenizers of any other kind, texts are encoded whole.
"""

import itertools
import json
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

Ids = list[int]
Texts = tuple[str, str, str]
"""A prompt, and the prompt with each answer."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = (
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",  # Llama 3
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",  # Qwen 2 and 3
)
"""How texts are cut into words; besides them GPT2, which is built into ByteLevel."""

UNCOMMON = re.compile(r"[^\t\n\r -~¡-ž‐-‧‰-⁞]")
"""Characters outside Latin letters and punctuation: texts with them are left to the tokenizer, which knows their classes."""
_LETTERS, _NUMBERS = "A-Za-zªµºÀ-ÖØ-öø-ž", "0-9²³¹¼½¾"
MAX_KNOWN = 2**18
"""Words whose ids are kept; then it begins anew."""


class Words:
    """Encodes texts for a byte-level BPE, of which every word is encoded by the tokenizer once and then looked up."""

    def __init__(
        self, backend: Any, pattern: str, added: dict[str, int], special: frozenset[str]
    ) -> None:
        self._backend = backend
        self._words = _common_words(pattern)
        self._added = added
        self._splits = {True: _any_of(added), False: _any_of(added.keys() - special)}
        self._known = _Known(backend)

    @classmethod
    def of(cls, tokenizer: Any) -> "Words | None":
        """For a tokenizer of transformers; None if it is of another kind."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        spec = json.loads(backend.to_str())
        pattern, tokens = _pattern(spec), spec["added_tokens"]
        if pattern is None or any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or "\n" in token["content"]
            for token in tokens
        ):
            return None
        added = {token["content"]: token["id"] for token in tokens}
        return cls(
            backend,
            pattern,
            added,
            frozenset(token["content"] for token in tokens if token["special"]),
        )

    def encode_pairs(self, pairs: Sequence[Texts], special: bool) -> list[tuple[Ids, ...]]:
        """Ids of the three texts of each pair.

        Args:
            special: spellings of special tokens in the texts are those tokens.
        """
        cuts = [_last_cut(*texts) for texts in pairs]
        parts = [
            part
            for texts, cut in zip(pairs, cuts, strict=True)
            for part in (_start(texts[0], cut), *(text[cut:] for text in texts))
        ]
        ids = iter(self.encode(parts, special))
        return [
            tuple(start[:-1] + end for end in ends) for start, *ends in zip(*[ids] * 4, strict=True)
        ]

    def encode(self, texts: Sequence[str], special: bool) -> list[Ids]:
        """Ids of each text."""
        uncommon = [UNCOMMON.search(text) is not None for text in texts]
        self._backend.no_truncation()  # which a tokenizer.json may ask for, as well as padding
        self._backend.no_padding()
        self._backend.encode_special_tokens = not special
        whole = iter(
            self._backend.encode_batch_fast(
                list(itertools.compress(texts, uncommon)), add_special_tokens=False
            )
        )
        self._backend.encode_special_tokens = (
            True  # single words are none, however they are spelled
        )
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        return [
            next(whole).ids if rare else self._look_up(text, special)
            for text, rare in zip(texts, uncommon, strict=True)
        ]

    def _look_up(self, text: str, special: bool) -> Ids:
        ids: Ids = []
        for number, part in enumerate(self._splits[special].split(text)):
            if number % 2:
                ids.append(self._added[part])
            else:
                ids.extend(
                    itertools.chain.from_iterable(
                        map(self._known.__getitem__, self._words.findall(part))
                    )
                )
        return ids


class _Known(dict[str, Ids]):
    """Ids by word."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __missing__(self, word: str) -> Ids:
        self[word] = ids = self._backend.encode(word, add_special_tokens=False).ids
        return ids


def _pattern(spec: Any) -> str | None:
    """How a tokenizer (its tokenizer.json) cuts texts into words, if that is all it does and in a way known here."""
    words, model = spec["pre_tokenizer"] or {}, spec["model"]
    steps = words.get("pretokenizers", [words])
    by_pattern = [step for step in steps if step.get("type") == "Split"]
    as_bytes = [step for step in steps if step.get("type") == "ByteLevel"]
    known = all(
        step["pattern"].get("Regex") in PATTERNS
        and step["behavior"] == "Isolated"
        and not step["invert"]
        for step in by_pattern
    )
    if (
        model["type"] == "BPE"
        and not model.get("dropout")
        and (spec["normalizer"] or {}).get("type", "NFC") == "NFC"
        and len(steps) == len(by_pattern) + 1 <= 2
        and [(step["add_prefix_space"], step["use_regex"]) for step in as_bytes]
        == [(False, not by_pattern)]
        and known
    ):
        return by_pattern[0]["pattern"]["Regex"] if by_pattern else GPT2
    return None


def _common_words(pattern: str) -> re.Pattern[str]:
    """The pattern for texts without uncommon characters."""
    for name, members in (("L", _LETTERS), ("N", _NUMBERS)):
        within = re.sub(
            r"\[[^]]*\]",
            lambda found, name=name, members=members: found[0].replace(rf"\p{{{name}}}", members),
            pattern,
        )
        pattern = within.replace(rf"\p{{{name}}}", f"[{members}]")
    return re.compile(pattern, re.ASCII)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the texts that stands at a place, as a group; nothing if there are none."""
    return re.compile(
        f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'})"
    )


def _last_cut(prompt: str, chosen: str, rejected: str) -> int:
    """Where the last line begins with a letter in what the three texts share; 0: nowhere."""
    if not chosen.startswith(prompt) or not rejected.startswith(prompt):
        return 0
    end = prompt.rfind("\n", 0, len(prompt) - 1)
    while end >= 0 and prompt[end + 1] not in string.ascii_letters:
        end = prompt.rfind("\n", 0, end)
    return end + 1


def _start(prompt: str, cut: int) -> str:
    """What stands before the cut and the letter behind it, one token to be taken off: the pattern looks ahead as far as that."""
    return prompt[: cut + 1] if cut else ""
