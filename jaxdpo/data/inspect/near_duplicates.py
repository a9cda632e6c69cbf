"""Near-duplicates by MinHash and locality-sensitive hashing (LSH), in NumPy.

A text is the set of its shingles: runs of three words. The similarity of two texts is the Jaccard
index of their sets: shared shingles / all shingles. Of each text a signature of NUM_HASHES numbers
is kept: the least value of each hash function over its shingles. Two signatures agree in any one
number with the probability that is the Jaccard index, so the share of equal numbers estimates it
(standard deviation 0.04 at 0.8). Only texts that agree in all numbers of some band are compared:
99.99% of those with an index of 0.8, 1 in 18 of those with 0.3. The result is the same in every
run and on every machine.

Not datasketch (2.0.0), the usual library: on the 10,000 prompts of benchmarks/near_duplicates.py it
takes 5.0 CPU seconds and 306 MB, this file 0.9 and 187 MB, for the same 100 near-duplicates
(x86-64, 2026-11-25): it makes an object per text and a dict of keys per band, where this file sorts
one array per band.

Broder, On the resemblance and containment of documents, 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, chapter 3.
"""

import array
import dataclasses
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from jaxdpo.data.formats.preference import Preference, Text, strings

NUM_BANDS, BAND_SIZE = 24, 5
"""A pair of index s shares a band with probability 1 - (1 - s^5)^24: half at 0.5, 99.99% at 0.8."""
NUM_HASHES = NUM_BANDS * BAND_SIZE
MIN_THRESHOLD = 0.6
"""Below it the bands miss more than one pair in seven."""
DEFAULT_THRESHOLD = 0.8
"""The usual choice for text, e.g. Lee et al. 2021, arXiv:2107.06499 (NearDup)."""
MAX_EXAMPLES = 5

# Kana, Han and Hangul have no spaces between words, so each character counts as one.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
# The hash functions are x * factor + offset mod 2^32 with odd factors; any fixed seed will do.
_RANDOM = np.random.Generator(np.random.PCG64(2305_18290))
_FACTORS = _RANDOM.integers(0, 2**31, NUM_HASHES, np.uint32) * np.uint32(2) + np.uint32(1)
_OFFSETS = _RANDOM.integers(0, 2**32, NUM_HASHES, np.uint32)
# Constants of MurmurHash: they keep the shingles of chosen and rejected answers apart.
_CHOSEN_SALT, _REJECTED_SALT = np.uint32(0x5BD1E995), np.uint32(0x1B873593)
# Odd multipliers, those of SplitMix64: they mix the hashes of three words, or of a band, into one.
_MIX = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_SHIFT = np.uint64(29)
_CHUNK = 1 << 14
"""Shingles, or comparisons, at a time: arrays of 8 MB."""


@dataclasses.dataclass(frozen=True)
class Match:
    """A pair or prompt and the earlier one that it nearly duplicates."""

    id: str
    other: str
    similarity: float
    """Estimated Jaccard index, 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Matches:
    """How many items are near-duplicates."""

    count: int
    same: int
    """Exact copies of others; not in count."""
    total: int
    """Items that were examined."""
    examples: tuple[Match, ...] = ()
    """The first of them."""


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """The near-duplicates of a data set."""

    threshold: float
    pairs: Matches
    """Training pairs whose prompt and answers are those of an earlier one."""
    prompts: Matches
    """Training prompts that nearly duplicate an earlier one."""
    leaks: Matches
    """Validation prompts that duplicate, or nearly, training prompts."""


# --- texts ---


def content(text: Text) -> str:
    """The text without system prompts: one that all rows share would make them all alike."""
    if isinstance(text, str):
        return text
    return "\n".join(strings(tuple(turn for turn in text if turn.role != "system")))


def shingles(text: str) -> np.ndarray:
    """uint32, sorted, distinct: hashes of a text's runs of three words.

    A shorter text is one run of all its words; a text without words is one word.
    """
    words = _WORD.findall(text.lower()) or [text]
    hashes = np.zeros(max(len(words), 3), np.uint64)
    hashes[: len(words)] = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
    mixed = hashes[:-2] * _MIX[0] ^ hashes[1:-1] * _MIX[1] ^ hashes[2:] * _MIX[2]
    mixed = (mixed ^ mixed >> _SHIFT) * _MIX[1]
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two sets, exact; each sorted and distinct."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)


def minhash(items: np.ndarray) -> np.ndarray:
    """uint32 [NUM_HASHES]: the signature of a set, which is the least value of each hash function.

    The signature of the union of two sets is the elementwise minimum of theirs.
    """
    parts = []
    for start in range(0, len(items), _CHUNK):
        hashed = items[start : start + _CHUNK, None] * _FACTORS + _OFFSETS
        parts.append(hashed.min(axis=0))
    return np.minimum.reduce(parts)


def estimate_jaccard(signatures: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float [C]: the share of equal numbers in the signatures of items a and b, each int64 [C]."""
    return (signatures[a] == signatures[b]).mean(axis=1)


# --- the search ---

Found = dict[int, tuple[int, float]]
"""Items that nearly duplicate an earlier one: which, and how similar they are."""


class SignatureIndex:
    """Two signatures of each pair, of its prompt and of its answers: 1 kB a pair, and no text."""

    def __init__(self) -> None:
        self._prompts, self._answers = array.array("I"), array.array("I")
        self._prompt_of = array.array("q")
        self._numbers: dict[bytes, int] = {}  # number of a distinct prompt, by its digest

    def add(self, record: Preference, chosen: np.ndarray, rejected: np.ndarray) -> None:
        """Add a pair, with the shingles of its answers."""
        text = content(record.prompt)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if digest not in self._numbers:
            self._numbers[digest] = len(self._numbers)
            self._prompts.frombytes(minhash(shingles(text)).tobytes())
        self._prompt_of.append(self._numbers[digest])
        # Salted by side, so that a pair whose answers are swapped is no near-duplicate.
        answers = np.concatenate([chosen ^ _CHOSEN_SALT, rejected ^ _REJECTED_SALT])
        self._answers.frombytes(minhash(answers).tobytes())

    def search(
        self,
        ids: list[str],
        copies: np.ndarray,
        held_out: np.ndarray,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> NearDuplicates:
        """Find the near-duplicates.

        Args:
            ids: the pairs' names, in the order in which they were added.
            copies: bool [N]: exact copies of earlier pairs; counted as such, and not compared.
            held_out: bool [N]: validation pairs.
            threshold: least Jaccard index of near-duplicates, MIN_THRESHOLD to 1.
        """
        prompts = np.frombuffer(self._prompts, np.uint32).reshape(-1, NUM_HASHES)
        answers = np.frombuffer(self._answers, np.uint32).reshape(-1, NUM_HASHES)
        prompt_of = np.array(self._prompt_of, np.int64)
        _, first = np.unique(prompt_of, return_index=True)
        prompt_ids = [ids[int(place)] for place in first]
        train = np.flatnonzero(~held_out & ~copies)

        def pair_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            a, b = train[a], train[b]
            of_prompts = estimate_jaccard(prompts, prompt_of[a], prompt_of[b])
            return np.minimum(of_prompts, estimate_jaccard(answers, a, b))

        signatures = np.minimum(prompts[prompt_of[train]], answers[train])
        pairs = find_near_duplicates(signatures, pair_similarity, threshold)
        train_ids = [ids[place] for place in train]
        num_copies = int((copies & ~held_out).sum())
        train_prompts = np.unique(prompt_of[~held_out])
        eval_prompts = np.unique(prompt_of[held_out])
        alike = _similar_prompts(prompts[train_prompts], threshold)
        return NearDuplicates(
            threshold,
            pairs=_matches(pairs, train_ids, num_copies),
            prompts=_matches(alike, [prompt_ids[number] for number in train_prompts]),
            leaks=_leaks(prompts, train_prompts, eval_prompts, prompt_ids, threshold),
        )


def find_near_duplicates(
    signatures: np.ndarray,
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray],
    threshold: float,
    anchors: np.ndarray | None = None,
) -> Found:
    """Items that nearly duplicate an earlier one, each with the most similar of those.

    Args:
        signatures: uint32 [N, NUM_HASHES].
        similarity: from two int64 [C] of items to their Jaccard indices, float [C].
        threshold: least Jaccard index of near-duplicates.
        anchors: bool [N]: compare the other items to these, and these to none. Default: compare
            each item to earlier ones.
    """
    best, other = np.zeros(len(signatures)), np.full(len(signatures), -1)
    for later, earlier in _candidates(signatures, anchors):
        for start in range(0, len(later), _CHUNK):
            a, b = later[start : start + _CHUNK], earlier[start : start + _CHUNK]
            found = similarity(a, b)
            better = (found >= threshold) & (found > best[a])
            best[a[better]] = found[better]
            other[a[better]] = b[better]
    return {int(item): (int(other[item]), float(best[item])) for item in np.flatnonzero(other >= 0)}


def _candidates(
    signatures: np.ndarray, anchors: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Items to compare, (later, earlier), each int64 [C], for each band.

    Of the items that agree in a band, each is compared to the first and to the last before it, not
    to all: a thousand rows of one template make two thousand comparisons, not half a million.
    """
    places = np.arange(len(signatures))
    everything = np.ones(len(signatures), bool)
    compared = everything if anchors is None else ~anchors
    anchors = everything if anchors is None else anchors
    for band in range(0, NUM_HASHES, BAND_SIZE):
        keys = np.zeros(len(signatures), np.uint64)
        for column in signatures[:, band : band + BAND_SIZE].T:
            keys = (keys ^ column) * _MIX[0]
            keys ^= keys >> _SHIFT
        # Sorted by key, items that agree in the band follow each other, in their own order.
        order = np.argsort(keys, kind="stable")
        is_first = np.diff(keys[order], prepend=~keys[order[:1]]) != 0
        first = np.maximum.accumulate(np.where(is_first, places, 0))
        newest_anchor = np.maximum.accumulate(np.where(anchors[order], places, -1))
        previous = np.concatenate([[-1], newest_anchor])[:-1]
        asked = (previous >= first) & compared[order]
        yield order[asked], order[previous[asked]]
        asked &= (first != previous) & anchors[order[first]]
        yield order[asked], order[first[asked]]


def _similar_prompts(
    signatures: np.ndarray, threshold: float, anchors: np.ndarray | None = None
) -> Found:
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return estimate_jaccard(signatures, a, b)

    return find_near_duplicates(signatures, similarity, threshold, anchors)


def _leaks(
    prompts: np.ndarray, train: np.ndarray, held_out: np.ndarray, ids: list[str], threshold: float
) -> Matches:
    """Prompts `held_out` that duplicate, or nearly, those of `train` (both index `prompts`)."""
    fresh = np.setdiff1d(held_out, train)
    both = np.concatenate([train, fresh])
    anchors = np.arange(len(both)) < len(train)
    found = _similar_prompts(prompts[both], threshold, anchors)
    matches = _matches(found, [ids[number] for number in both], len(held_out) - len(fresh))
    return dataclasses.replace(matches, total=len(held_out))


def _matches(found: Found, ids: list[str], same: int = 0) -> Matches:
    """The count and the first examples of what was found among items of these names."""
    examples = []
    for item, (other, similarity) in list(found.items())[:MAX_EXAMPLES]:
        examples.append(Match(ids[item], ids[other], similarity))
    return Matches(len(found), same, len(ids) + same, tuple(examples))
