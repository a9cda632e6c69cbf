"""Texts that are almost the same, found without comparing each with each: MinHash and locality-sensitive hashing. NumPy only.

A text is the set of its runs of three words. How alike two texts are is the share of runs that both have among those that either has
(Jaccard). Of each text HASHES numbers are kept: the least value that each of as many hash functions takes on its runs. Two
texts agree in any one of them with the probability that they are alike, so the share of agreeing ones estimates it (standard
deviation 0.04 at 0.8). Only texts that agree in all numbers of some band are compared: 99.99% of those that are 0.8 alike, 1 in 18
of those at 0.3. Everything is the same in every run and on every machine.
"""

import array
import dataclasses
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from jaxdpo.data.formats.preference import Preference, Text

BANDS, IN_BAND = 24, 5
HASHES = BANDS * IN_BAND
LEAST, USUAL = 0.6, 0.8
"""The least threshold for which enough candidates are found, and the usual one."""
EXAMPLES = 5

_ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"  # kana, Han, Hangul: no spaces between words, so each character counts as one
_WORD = re.compile(f"[{_ALONE}]|[^\\W{_ALONE}]+")
_RANDOM = np.random.Generator(np.random.PCG64(2305_18290))
_FACTORS = _RANDOM.integers(0, 2**31, HASHES, np.uint32) * np.uint32(2) + np.uint32(1)
_OFFSETS = _RANDOM.integers(0, 2**32, HASHES, np.uint32)
_SIDES = (np.uint32(0x5BD1E995), np.uint32(0x1B873593))
_MIX = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_SHIFT = np.uint64(29)
_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class Match:
    """A pair or prompt that is almost another."""

    id: str
    other: str
    alike: float
    """Share of common runs of words, 0 to 1, estimated."""


@dataclasses.dataclass(frozen=True)
class Matches:
    """How many items are almost others."""

    count: int
    same: int
    """Items that are others to the letter; not in count."""
    total: int
    """Items that were looked at."""
    examples: tuple[Match, ...] = ()
    """The first of them."""


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """What is almost the same in a data set."""

    threshold: float
    pairs: Matches
    """Training pairs whose prompt and answers are those of an earlier one."""
    prompts: Matches
    """Training prompts that are almost an earlier one."""
    leaks: Matches
    """Validation prompts that are, or almost are, training prompts."""


def runs_of_words(text: str) -> np.ndarray:
    """uint32, sorted, distinct: hashes of a text's runs of three words; of all its words if it has fewer, of the text if it has none."""
    words = _WORD.findall(text.lower()) or [text]
    hashes = np.zeros(max(len(words), 3), np.uint64)
    hashes[: len(words)] = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
    mixed = hashes[:-2] * _MIX[0] ^ hashes[1:-1] * _MIX[1] ^ hashes[2:] * _MIX[2]
    mixed = (mixed ^ mixed >> _SHIFT) * _MIX[1]
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Share of common items of two sorted sets, exactly."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)


def sketch(runs: np.ndarray) -> np.ndarray:
    """uint32 [HASHES]: the least value of each hash function. The sketch of two sets together is the lesser of theirs."""
    parts = (
        runs[start : start + _AT_ONCE, None] * _FACTORS + _OFFSETS
        for start in range(0, len(runs), _AT_ONCE)
    )
    return np.minimum.reduce([part.min(axis=0) for part in parts])


class Sketchbook:
    """What is kept of each pair's text to find its neighbours: two sketches, 1 kB."""

    def __init__(self) -> None:
        self._prompts, self._answers = array.array("I"), array.array("I")
        self._prompt_of = array.array("q")
        self._places: dict[bytes, int] = {}

    def add(self, record: Preference, chosen: np.ndarray, rejected: np.ndarray) -> None:
        """Take a pair, with the runs of words of its answers."""
        text = said(record.prompt)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if digest not in self._places:
            self._places[digest] = len(self._places)
            self._prompts.frombytes(sketch(runs_of_words(text)).tobytes())
        self._prompt_of.append(self._places[digest])
        answers = np.concatenate(
            [chosen ^ _SIDES[0], rejected ^ _SIDES[1]]
        )  # so that swapped answers are others
        self._answers.frombytes(sketch(answers).tobytes())

    def search(
        self, ids: list[str], copies: np.ndarray, held_out: np.ndarray, threshold: float = USUAL
    ) -> Neighbours:
        """What is almost the same.

        Args:
            ids: the pairs' names, in the order in which they were taken.
            copies: bool [N]: pairs that are earlier ones to the letter; counted as such, and not compared.
            held_out: bool [N]: validation pairs.
            threshold: how alike two texts are at least that count as almost the same, LEAST to 1.
        """
        prompts, answers = (
            np.frombuffer(kept, np.uint32).reshape(-1, HASHES)
            for kept in (self._prompts, self._answers)
        )
        prompt_of = np.array(self._prompt_of, np.int64)
        _, first = np.unique(prompt_of, return_index=True)
        names = [ids[int(place)] for place in first]
        train = np.flatnonzero(~held_out & ~copies)
        trained, tested = (np.unique(prompt_of[side]) for side in (~held_out, held_out))

        def alike_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            a, b = train[a], train[b]
            return np.minimum(
                agreement(prompts, prompt_of[a], prompt_of[b]), agreement(answers, a, b)
            )

        pairs = find_alike(
            np.minimum(prompts[prompt_of[train]], answers[train]), alike_pairs, threshold
        )
        return Neighbours(
            threshold,
            pairs=_matches(
                pairs, [ids[place] for place in train], same=int((copies & ~held_out).sum())
            ),
            prompts=_matches(
                _alike_prompts(prompts[trained], threshold), [names[prompt] for prompt in trained]
            ),
            leaks=_leaks(prompts, trained, tested, names, threshold),
        )


Found = dict[int, tuple[int, float]]
"""Items that are almost an earlier one: which, and how alike they are."""


def find_alike(
    sketches: np.ndarray,
    alike: Callable[[np.ndarray, np.ndarray], np.ndarray],
    threshold: float,
    anchors: np.ndarray | None = None,
) -> Found:
    """Items that are at least `threshold` like an earlier one, and the most alike of those that they were compared with.

    Args:
        sketches: uint32 [N, HASHES].
        alike: from two int64 [C] of items to how alike they are, float [C].
        anchors: bool [N]: the items that others are compared with, and only those that are none are compared. Default: each is
            compared with those before it.
    """
    best, other = np.zeros(len(sketches)), np.full(len(sketches), -1)
    for later, earlier in _candidates(sketches, anchors):
        for start in range(0, len(later), _AT_ONCE):
            a, b = later[start : start + _AT_ONCE], earlier[start : start + _AT_ONCE]
            shares = alike(a, b)
            better = (shares >= threshold) & (shares > best[a])
            best[a[better]], other[a[better]] = shares[better], b[better]
    return {int(item): (int(other[item]), float(best[item])) for item in np.flatnonzero(other >= 0)}


def agreement(sketches: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float [C]: the share of equal numbers in the sketches of items a and b, each int64 [C]."""
    return (sketches[a] == sketches[b]).mean(axis=1)


def said(text: Text) -> str:
    """All that is said, but for system prompts: one that all rows share would make them all alike."""
    return (
        text
        if isinstance(text, str)
        else "\n".join(turn.content for turn in text if turn.role != "system")
    )


def _candidates(
    sketches: np.ndarray, anchors: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Items to compare. Of those that agree in a band, each is compared with the first and the last before it, not with all: a
    thousand rows of one template make two thousand comparisons, not half a million."""
    places, every = np.arange(len(sketches)), np.ones(len(sketches), bool)
    anchors, asking = (every, every) if anchors is None else (anchors, ~anchors)
    for band in range(0, HASHES, IN_BAND):
        keys = np.zeros(len(sketches), np.uint64)
        for column in sketches[:, band : band + IN_BAND].T:
            keys = (keys ^ column) * _MIX[0]
            keys ^= keys >> _SHIFT
        order = np.argsort(keys, kind="stable")
        fresh = np.diff(keys[order], prepend=~keys[order[:1]]) != 0
        start = np.maximum.accumulate(np.where(fresh, places, 0))
        last = np.maximum.accumulate(np.where(anchors[order], places, -1))
        before = np.concatenate([[-1], last])[:-1]
        asked = (before >= start) & asking[order]
        yield order[asked], order[before[asked]]
        asked &= (start != before) & anchors[order[start]]
        yield order[asked], order[start[asked]]


def _alike_prompts(
    sketches: np.ndarray, threshold: float, anchors: np.ndarray | None = None
) -> Found:
    return find_alike(sketches, lambda a, b: agreement(sketches, a, b), threshold, anchors)


def _leaks(
    prompts: np.ndarray, trained: np.ndarray, tested: np.ndarray, names: list[str], threshold: float
) -> Matches:
    """Those of the prompts `tested` that are, or almost are, among those `trained` (both places in `prompts`)."""
    fresh = np.setdiff1d(tested, trained)
    both = np.concatenate([trained, fresh])
    found = _alike_prompts(prompts[both], threshold, anchors=np.arange(len(both)) < len(trained))
    same = len(tested) - len(fresh)
    return dataclasses.replace(
        _matches(found, [names[prompt] for prompt in both], same), total=len(tested)
    )


def _matches(found: Found, names: list[str], same: int = 0) -> Matches:
    examples = [
        Match(names[item], names[other], alike)
        for item, (other, alike) in list(found.items())[:EXAMPLES]
    ]
    return Matches(len(found), same, len(names) + same, tuple(examples))
