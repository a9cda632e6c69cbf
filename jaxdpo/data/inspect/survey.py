"""What stands in preference data: one pass over its text, and what is worth telling of its text and its tokens."""

import array
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Preference, strings
from jaxdpo.data.inspect.near_duplicates import Neighbours, Sketchbook, jaccard, runs_of_words, said
from jaxdpo.data.prepare import Prepared
from jaxdpo.data.sources import read_set
from jaxdpo.data.splits import split_by_prompt

NEARLY_EQUAL = 0.8
"""Share of common runs of words from which the two answers of a pair count as nearly equal."""
NAMED = 5
"""Odd pairs of a kind that are named."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The training or the validation pairs."""

    name: str
    lengths: np.ndarray
    """Integers [N, 3]: of prompt, chosen and rejected, in the survey's unit."""
    prompts: int
    """Distinct ones."""
    ended: float | None = None
    """Share of answers that end in an end marker; None: unknown."""


@dataclasses.dataclass(frozen=True)
class Odd:
    """Pairs that are worth a look for the same reason."""

    kind: str
    count: int
    ids: tuple[str, ...]
    """The first, or the most extreme, of them."""
    sizes: tuple[int, ...] = ()
    """What is extreme about each."""

    @classmethod
    def of(cls, kind: str, mask: np.ndarray, ids: Sequence[str]) -> "Odd":
        """Those of the mask, bool [N]."""
        return cls(
            kind, int(mask.sum()), tuple(ids[int(place)] for place in np.flatnonzero(mask)[:NAMED])
        )


@dataclasses.dataclass(frozen=True)
class Survey:
    """All that is told of the data, but for its pairs themselves."""

    unit: str
    """tokens or characters."""
    sets: Sequence[Mapping[str, Any]]
    """What became of the rows of each set (DataReport.to_json)."""
    parts: Sequence[Part]
    """Those that have pairs."""
    odd: Sequence[Odd]
    neighbours: Neighbours | None
    limits: tuple[int, int] | None = None
    """data.max_length and data.max_prompt_length as they are set; None where lengths are not in tokens."""
    warnings: Sequence[str] = ()


# --- one pass over the text ---


class Texts:
    """What is kept of the text of each pair: names, lengths, keys and sketches, and no text."""

    def __init__(
        self, threshold: float, spells_special: Callable[[Preference], bool] | None = None
    ):
        """Begin.

        Args:
            threshold: how alike two texts are that count as almost the same (neighbours.py); 0: none are searched.
            spells_special: whether a record spells a special token of the tokenizer, if there is one.
        """
        self._threshold, self._spells_special = threshold, spells_special
        self._book = Sketchbook()
        self._lengths, self._alike, self._special = (
            array.array("q"),
            array.array("f"),
            array.array("B"),
        )
        self._keys, self._pair_keys, self._orders = (
            array.array("Q"),
            array.array("Q"),
            array.array("B"),
        )
        self.ids: list[str] = []

    def add(self, record: Preference) -> None:
        """Take the next pair: all of data.train come first, then those of data.eval."""
        answers = [runs_of_words(said(text)) for text in (record.chosen, record.rejected)]
        self.ids.append(record.id)
        self._lengths.extend(
            sum(map(len, strings(text))) for text in (record.prompt, record.chosen, record.rejected)
        )
        self._alike.append(jaccard(*answers))
        self._special.append(self._spells_special is not None and self._spells_special(record))
        self._keys.append(record.prompt_key)
        self._pair_keys.append(record.pair_key[0])
        self._orders.append(record.pair_key[1])
        if self._threshold:
            self._book.add(record, *answers)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N, 3]: characters of prompt, chosen and rejected."""
        return np.array(self._lengths, np.int64).reshape(-1, 3)

    def held_out(self, trained: int, section: DataSection) -> np.ndarray:
        """bool [N]: validation pairs, where the first `trained` pairs are those of data.train."""
        if section.eval:
            return np.arange(len(self.ids)) >= trained
        return split_by_prompt(np.array(self._keys, np.uint64), section.eval_fraction)

    def parts(self, held_out: np.ndarray) -> list[Part]:
        """Training and validation pairs, by their characters."""
        keys, lengths = np.array(self._keys, np.uint64), self.lengths
        named = (("train", ~held_out), ("eval", held_out))
        return [
            Part(name, lengths[these], len(np.unique(keys[these])))
            for name, these in named
            if these.any()
        ]

    def odd(self) -> list[Odd]:
        """Pairs that stand out by their text."""
        return [*_extremes(self.lengths, self.ids), *self.odd_by_words()]

    def odd_by_words(self) -> list[Odd]:
        """Pairs whose answers say nearly the same, and such that spell special tokens."""
        equal = Odd.of(
            "answers that are nearly equal", np.array(self._alike) >= NEARLY_EQUAL, self.ids
        )
        if self._spells_special is None:
            return [equal]
        return [
            equal,
            Odd.of("text that spells a special token", np.array(self._special, bool), self.ids),
        ]

    def neighbours(self, held_out: np.ndarray) -> Neighbours | None:
        """Pairs and prompts that are almost the same, if they are to be searched."""
        if not self._threshold or not self.ids:
            return None
        whole = np.stack(
            [np.array(column, np.uint64) for column in (self._pair_keys, self._orders, held_out)],
            axis=1,
        )
        copies = np.ones(len(whole), bool)
        copies[np.unique(whole, axis=0, return_index=True)[1]] = False
        return self._book.search(self.ids, copies, held_out, self._threshold)


def read_texts(section: DataSection, texts: Texts, out: Callable[[Preference], None]) -> Survey:
    """Read all sets as text into `texts`; each record of data.train goes to `out` too.

    Raises:
        ValueError: a set cannot be read.
    """
    reports, sizes = [], []
    for option, names in (("data.train", section.train), ("data.eval", section.eval)):
        opened = [read_set(name, section, option) for name in names]
        for record in itertools.chain.from_iterable(records for _, records in opened):
            texts.add(record)
            if option == "data.train":
                out(record)
        reports += [
            dataclasses.replace(report, kept=report.parsed).to_json() for report, _ in opened
        ]
        sizes.append(len(texts.ids))
    held_out = texts.held_out(sizes[0], section)
    return Survey(
        "characters", reports, texts.parts(held_out), texts.odd(), texts.neighbours(held_out)
    )


def survey_tokens(
    texts: Survey, words: Sequence[Odd], done: Prepared, limits: tuple[int, int]
) -> Survey:
    """The survey of texts with what is known once they are tokens.

    Args:
        words: what is odd about the text (Texts.odd_by_words).
        done: the pairs, encoded without being cut.
        limits: data.max_length and data.max_prompt_length as they are set.
    """
    tables = (("train", done.train), ("eval", done.eval))
    parts = [
        Part(name, table.lengths, done.report[name]["prompts"], done.report[name]["ended"])
        for name, table in tables
        if len(table)
    ]
    ids = [name for _, table in tables for name in table.ids]
    lengths = np.concatenate([table.lengths for _, table in tables])
    unended = [
        not (table[i].ended_chosen and table[i].ended_rejected)
        for _, table in tables
        for i in range(len(table))
    ]
    prompts, answers, _ = cuts(lengths, *limits)
    odd = [
        *_extremes(lengths, ids),
        Odd.of(f"cut by data.max_length={limits[0]}", prompts | answers, ids),
        Odd.of("an answer without an end marker", np.array(unended, bool), ids),
        *words,
    ]
    sets = (*done.report["sets"]["train"], *done.report["sets"]["eval"])
    return Survey(
        "tokens", sets, parts, odd, texts.neighbours, limits, tuple(done.report["warnings"])
    )


def cuts(
    lengths: np.ndarray, max_length: int, max_prompt_length: int
) -> tuple[np.ndarray, Any, int]:
    """What truncation does to pairs of these lengths, integers [N, 3]: bool [N] prompts that are cut, bool [N] pairs with an answer
    that is, and the number of tokens that are left."""
    lengths = lengths.astype(np.int64)  # as wide as the limits, of which any may be given
    prompts = np.minimum(lengths[:, 0], max_prompt_length)
    answers = np.minimum(lengths[:, 1:], (max_length - prompts)[:, None])
    return (
        prompts < lengths[:, 0],
        np.any(answers < lengths[:, 1:], axis=1),
        int(prompts.sum() + answers.sum()),
    )


def _extremes(lengths: np.ndarray, ids: list[str]) -> list[Odd]:
    """The longest pairs, and those with the shortest answers."""
    longest, shortest = (
        lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0),
        lengths[:, 1:].min(axis=1, initial=np.iinfo(lengths.dtype).max),
    )
    found = []
    for kind, sizes, order in (
        ("the longest, prompt and answer", longest, np.argsort(-longest, kind="stable")),
        ("the shortest answers", shortest, np.argsort(shortest, kind="stable")),
    ):
        first = order[:NAMED].tolist()
        found.append(
            Odd(kind, len(first), tuple(ids[i] for i in first), tuple(int(sizes[i]) for i in first))
        )
    return found
