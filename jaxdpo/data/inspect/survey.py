"""A survey of preference data: one pass over its text, then what is notable of text and tokens."""

import array
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Preference, strings
from jaxdpo.data.inspect.near_duplicates import (
    NearDuplicates,
    SignatureIndex,
    content,
    jaccard,
    shingles,
)
from jaxdpo.data.prepare import Prepared
from jaxdpo.data.sources import check_score, read_set
from jaxdpo.data.splits import joined_keys, split_by_prompt
from jaxdpo.data.truncate import prompt_limit

NEARLY_EQUAL = 0.8
"""Jaccard index from which the answers of a pair count as nearly equal, as for near-duplicates."""
MAX_NAMED = 5
"""Odd pairs of a kind that are named: as many as a line of a terminal has room for."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The training or the validation pairs."""

    name: str
    lengths: np.ndarray
    """Integers [N, 3]: of prompt, chosen and rejected, in the survey's unit."""
    prompts: int
    """Distinct prompts."""
    ended: float | None = None
    """Share of answers that end with eos (or an end-of-turn token); None: unknown."""


@dataclasses.dataclass(frozen=True)
class Odd:
    """Pairs that are worth a look for the same reason."""

    kind: str
    count: int
    ids: tuple[str, ...]
    """The first, or the most extreme, of them."""
    sizes: tuple[int, ...] = ()
    """Lengths of each, in the survey's unit, where those are the reason."""

    @classmethod
    def of(cls, kind: str, mask: np.ndarray, ids: Sequence[str]) -> "Odd":
        """The pairs of a mask, bool [N]."""
        first = np.flatnonzero(mask)[:MAX_NAMED]
        return cls(kind, int(mask.sum()), tuple(ids[int(place)] for place in first))


@dataclasses.dataclass(frozen=True)
class Survey:
    """All that is reported of the data, except the pairs themselves."""

    unit: str
    """tokens or characters."""
    sets: Sequence[Mapping[str, Any]]
    """What became of the rows of each set (DataReport.to_json)."""
    parts: Sequence[Part]
    """Those that have pairs."""
    odd: Sequence[Odd]
    near_duplicates: NearDuplicates | None
    limits: tuple[int, int] | None = None
    """data.max_length and data.max_prompt_length, tokens; None where lengths are characters."""
    warnings: Sequence[str] = ()


# --- one pass over the text ---


class Texts:
    """What is kept of each pair's text: id, lengths, hashes and signatures, but not the text.

    100,000 pairs take 270 MB, the search included (benchmarks/near_duplicates.py).
    """

    def __init__(
        self, threshold: float, spells_special: Callable[[Preference], bool] | None = None
    ):
        """Start without pairs.

        Args:
            threshold: least Jaccard index of near-duplicates; 0: do not search.
            spells_special: whether a record spells a special token of the tokenizer, if there is
                one.
        """
        self.ids: list[str] = []
        self._threshold, self._spells_special = threshold, spells_special
        self._signatures = SignatureIndex()
        # Python's arrays, not lists: eight bytes a value, not an object each.
        self._lengths = array.array("q")
        self._similarity = array.array("f")
        self._special = array.array("B")
        self._prompt_keys = array.array("Q")
        self._group_keys = array.array("Q")
        self._pair_keys = array.array("Q")
        self._orders = array.array("B")

    def add(self, record: Preference) -> None:
        """Add the next pair: all of data.train come first, then those of data.eval."""
        chosen, rejected = shingles(content(record.chosen)), shingles(content(record.rejected))
        self.ids.append(record.id)
        for text in (record.prompt, record.chosen, record.rejected):
            self._lengths.append(sum(map(len, strings(text))))
        self._similarity.append(jaccard(chosen, rejected))
        self._special.append(self._spells_special is not None and self._spells_special(record))
        self._prompt_keys.append(record.prompt_key)
        self._group_keys.append(record.group_key)
        pair_key, order = record.pair_key
        self._pair_keys.append(pair_key)
        self._orders.append(order)
        if self._threshold:
            self._signatures.add(record, chosen, rejected)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N, 3]: characters of prompt, chosen and rejected."""
        return np.array(self._lengths, np.int64).reshape(-1, 3)

    def held_out(self, num_train: int, section: DataSection) -> np.ndarray:
        """bool [N]: validation pairs, where the first `num_train` pairs are those of data.train."""
        if section.eval:
            return np.arange(len(self.ids)) >= num_train
        prompt_keys = np.array(self._prompt_keys, np.uint64)
        keys = joined_keys(prompt_keys, np.array(self._group_keys, np.uint64))
        return split_by_prompt(keys, section.eval_fraction)

    def parts(self, held_out: np.ndarray) -> list[Part]:
        """Training and validation pairs, with lengths in characters."""
        keys, lengths = np.array(self._prompt_keys, np.uint64), self.lengths
        parts = []
        for name, mask in (("train", ~held_out), ("eval", held_out)):
            if mask.any():
                parts.append(Part(name, lengths[mask], len(np.unique(keys[mask]))))
        return parts

    def odd(self) -> list[Odd]:
        """Pairs that are odd by their text."""
        return [*_extremes(self.lengths, self.ids), *self.odd_by_words()]

    def odd_by_words(self) -> list[Odd]:
        """Pairs with nearly equal answers, and pairs that spell special tokens."""
        equal = np.array(self._similarity) >= NEARLY_EQUAL
        found = [Odd.of("answers that are nearly equal", equal, self.ids)]
        if self._spells_special is not None:
            special = np.array(self._special, bool)
            found.append(Odd.of("text that spells a special token", special, self.ids))
        return found

    def near_duplicates(self, held_out: np.ndarray) -> NearDuplicates | None:
        """Near-duplicates among pairs and prompts, if they are searched for."""
        if not self._threshold or not self.ids:
            return None
        # Copies have equal hashes, and are on the same side of the split.
        columns = (self._pair_keys, self._orders, held_out)
        keys = np.stack([np.array(column, np.uint64) for column in columns], axis=1)
        copies = np.ones(len(keys), bool)
        copies[np.unique(keys, axis=0, return_index=True)[1]] = False
        return self._signatures.search(self.ids, copies, held_out, self._threshold)


def read_texts(section: DataSection, texts: Texts, out: Callable[[Preference], None]) -> Survey:
    """Read all sets as text into `texts`; each record of data.train goes to `out` too.

    Raises:
        ValueError: a set cannot be read.
    """
    reports, found_reports, sizes = [], [], []
    for option, names in (("data.train", section.train), ("data.eval", section.eval)):
        opened = [read_set(name, section, option) for name in names]
        for record in itertools.chain.from_iterable(records for _, records in opened):
            texts.add(record)
            if option == "data.train":
                out(record)
        for report, _ in opened:
            found_reports.append(report)
            reports.append(dataclasses.replace(report, kept=report.parsed).to_json())
        sizes.append(len(texts.ids))
    check_score(section, found_reports)
    held_out = texts.held_out(sizes[0], section)
    found = texts.near_duplicates(held_out)
    return Survey("characters", reports, texts.parts(held_out), texts.odd(), found)


# --- tokens ---


def survey_tokens(
    texts: Survey, words: Sequence[Odd], done: Prepared, limits: tuple[int, int]
) -> Survey:
    """The survey of texts with what is known once they are tokens.

    Args:
        words: the pairs that are odd by their words (Texts.odd_by_words).
        done: the pairs, encoded without truncation.
        limits: data.max_length and data.max_prompt_length, tokens.
    """
    parts, ids, no_eos = [], [], []
    for name, table in (("train", done.train), ("eval", done.eval)):
        ids += table.ids
        for pair in (table[i] for i in range(len(table))):
            no_eos.append(not (pair.ended_chosen and pair.ended_rejected))
        if len(table):
            counts = done.report[name]
            parts.append(Part(name, table.lengths, counts["prompts"], counts["ended"]))
    lengths = np.concatenate([done.train.lengths, done.eval.lengths])
    cut_prompts, cut_answers, _ = cuts(lengths, *limits)
    odd = [
        *_extremes(lengths, ids),
        Odd.of(f"truncated by data.max_length={limits[0]}", cut_prompts | cut_answers, ids),
        Odd.of("an answer without eos", np.array(no_eos, bool), ids),
        *words,
    ]
    sets = (*done.report["sets"]["train"], *done.report["sets"]["eval"])
    warnings = tuple(done.report["warnings"])
    return Survey("tokens", sets, parts, odd, texts.near_duplicates, limits, warnings)


def cuts(
    lengths: np.ndarray, max_length: int, max_prompt_length: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """What truncation does to pairs of these lengths.

    Args:
        lengths: integers [N, 3]: tokens of prompt, chosen and rejected.
        max_length: most tokens of prompt and answer.
        max_prompt_length: most tokens of a prompt, or 0 (`truncate.prompt_limit`).

    Returns:
        bool [N] whether the prompt is cut, bool [N] whether an answer is, and the number of tokens
        that are left.
    """
    lengths = lengths.astype(np.int64)  # as wide as the limits, of which any may be given
    longer_answers = lengths[:, 1:].max(axis=1)
    prompts = np.minimum(lengths[:, 0], prompt_limit(max_length, max_prompt_length, longer_answers))
    answers = np.minimum(lengths[:, 1:], (max_length - prompts)[:, None])
    cut_prompts = prompts < lengths[:, 0]
    cut_answers = np.any(answers < lengths[:, 1:], axis=1)
    return cut_prompts, cut_answers, int(prompts.sum() + answers.sum())


def _extremes(lengths: np.ndarray, ids: list[str]) -> list[Odd]:
    """The longest pairs, and those with the shortest answers."""
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)
    shortest = lengths[:, 1:].min(axis=1, initial=np.iinfo(lengths.dtype).max)
    found = []
    for kind, sizes, order in (
        ("the longest, prompt and answer", longest, np.argsort(-longest, kind="stable")),
        ("the shortest answers", shortest, np.argsort(shortest, kind="stable")),
    ):
        first = order[:MAX_NAMED].tolist()
        names = tuple(ids[i] for i in first)
        found.append(Odd(kind, len(first), names, tuple(int(sizes[i]) for i in first)))
    return found
