"""Which pairs a step sees, and their packed sequences, prepared ahead of time.

A step's pairs follow from (seed, step) alone, so a run's position in its data is one number, and a
resumed run goes on with exactly the pairs that it would have seen.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator

import grain
import numpy as np

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.packing import Batch, Packer, balance, choose_packed_lengths
from jaxdpo.data.pair_table import PairTable
from jaxdpo.utils.text import printable

logger = logging.getLogger(__name__)

SAMPLED_STEPS = 1000
"""Steps that are sampled to choose the packed lengths: 0.05 s for steps of 64 pairs, 1.1 s for 512
(CPU seconds, `balance` alone)."""

PREFETCHED_BATCHES = 4
"""Batches prepared ahead. Packing 64 pairs takes 5 ms, a step longer; some absorb a slow disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """The batches of a run. Steps count from 1; the last step of an epoch may have fewer pairs."""

    table: PairTable
    packer: Packer
    batch_size: int
    """Pairs of an optimizer step, over all devices (train.batch_size)."""
    seed: int
    shuffle: bool
    weights: tuple[float, ...] = ()
    """Weight of each data set; empty: every pair is visited once an epoch."""
    mine: frozenset[int] | None = None
    """Sequences of a microbatch that this process feeds; of other pairs it reads no tokens.
    None: all."""
    _orders: dict[int, np.ndarray] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def create(
        cls,
        table: PairTable,
        section: DataSection,
        *,
        batch_size: int,
        num_rows: int,
        seed: int,
        mine: frozenset[int] | None = None,
    ) -> "Loader":
        """A loader for microbatches of num_rows sequences, with lengths that suit these pairs.

        Raises:
            ValueError: a pair is longer than data.packed_length, or data.weights asks for a set
                without training pairs.
        """
        one_length = Packer(
            share_prefix=section.share_prefix,
            num_rows=num_rows,
            packed_lengths=(section.packed_length,),
            max_pairs=batch_size,
        )
        loader = cls(
            table=table,
            packer=one_length,
            batch_size=batch_size,
            seed=seed,
            shuffle=section.shuffle,
            weights=tuple(section.weights),
            mine=mine,
        )
        if loader.weights:
            sets = zip(section.train, loader._visits, loader._members, strict=True)
            for name, visits, members in sets:
                logger.info(
                    "data.weights: an epoch visits %d pairs of %s, which has %d",
                    visits,
                    printable(name),
                    len(members),
                )
        packed_lengths = choose_packed_lengths(
            loader._sampled_loads(section), section.num_packed_lengths, section.packed_length
        )
        packer = dataclasses.replace(one_length, packed_lengths=packed_lengths)
        return dataclasses.replace(loader, packer=packer)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the pairs."""
        return -(-len(self.table) // self.batch_size)

    def epoch(self, step: int) -> float:
        """Passes over the pairs after `step`."""
        passes, steps = divmod(step, self.steps_per_epoch)
        return passes + steps * self.batch_size / len(self.table)

    def pairs_of(self, step: int) -> np.ndarray:
        """Indices in the table of the pairs that `step` trains on; int64."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def visited(self, last_step: int) -> list[np.ndarray]:
        """Indices of all pairs that steps 1 to last_step train on: each once, by first visit.

        In groups that pack like a step. Without data.weights these are the steps of the first
        epoch; with them, later epochs visit pairs that the first one did not.
        """
        seen = np.zeros(len(self.table), bool)
        first_visits = []
        for step in range(1, last_step + 1):
            if seen.all():
                break
            for pair in self.pairs_of(step).tolist():
                if not seen[pair]:
                    seen[pair] = True
                    first_visits.append(pair)
        groups = []
        for first in range(0, len(first_visits), self.batch_size):
            groups.append(np.array(first_visits[first : first + self.batch_size], np.int64))
        return groups

    def num_tokens(self, step: int) -> int:
        """Tokens that the step computes: each prompt once with prefix sharing, twice without."""
        return int(self._sizes[self.pairs_of(step)].sum())

    def batch(self, step: int) -> Batch:
        """The packed sequences of `step`."""
        return self.pack(self.table, self.pairs_of(step))

    def pack(self, table: PairTable, indices: np.ndarray) -> Batch:
        """These pairs of a table, packed; sequences of other processes stay empty."""
        return self.packer([table[i] for i in indices.tolist()], self.mine)

    def stream(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first to last, prepared in a thread while the devices compute."""
        batches = grain.MapDataset.range(first, last + 1).map(lambda step: self.batch(int(step)))
        # One thread: packing is NumPy under the GIL, and batches have to come in order.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_BATCHES)
        return iter(batches.to_iter_dataset(options))

    def _order(self, epoch: int) -> np.ndarray:
        """Indices of an epoch's pairs in the order of their visits."""
        if epoch not in self._orders:
            order = self._mixed(epoch) if self.weights else np.arange(len(self.table))
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch)).permutation(order)
            # Two epochs are cached: the thread that prepares batches may be one ahead of the loop.
            for older in list(self._orders)[:-1]:
                self._orders.pop(older, None)
            self._orders[epoch] = order
            return order
        return self._orders[epoch]

    def _mixed(self, epoch: int) -> np.ndarray:
        """Indices of an epoch's pairs, as many as the table has, each data set spread evenly.

        Each set is visited again and again, in a new order each time, and every epoch goes on
        where the last one stopped.
        """
        members, spread = [], []
        for number, visits in enumerate(self._visits):
            members.append(self._next(number, epoch * visits, visits))
            spread.append((np.arange(visits) + 0.5) / visits)
        return np.concatenate(members)[np.argsort(np.concatenate(spread), kind="stable")]

    def _next(self, number: int, start: int, count: int) -> np.ndarray:
        """Indices of `count` pairs of one set, after `start` earlier visits to it."""
        members = self._members[number]
        first, last = start // len(members), (start + count - 1) // len(members)
        passes = []
        for number_of_pass in range(first, last + 1):
            order = members
            if self.shuffle:
                rng = np.random.default_rng((self.seed, number, number_of_pass))
                order = rng.permutation(members)
            passes.append(order)
        return np.concatenate(passes)[start - first * len(members) :][:count]

    @functools.cached_property
    def _members(self) -> list[np.ndarray]:
        """Indices of each set's pairs."""
        return [np.flatnonzero(self.table.sources == number) for number in range(len(self.weights))]

    @functools.cached_property
    def _visits(self) -> list[int]:
        """Pairs of each set in an epoch: integers in the proportions of data.weights.

        They add up to the table's length, except that every set gets at least one.
        """
        for number, members in enumerate(self._members, start=1):
            if not len(members):
                raise ValueError(
                    f"data.weights={list(self.weights)}: set {number} of data.train has no "
                    "training pair. Leave it out"
                )
        shares = np.cumsum((0, *self.weights)) / sum(self.weights)
        edges = np.rint(shares * len(self.table)).astype(int)
        return np.maximum(np.diff(edges), 1).tolist()

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """Tokens of each pair in a packed sequence."""
        sizes = self.table.lengths.sum(axis=1)
        if not self.packer.share_prefix:
            sizes = sizes + self.table.lengths[:, 0]
        return sizes

    def _sampled_loads(self, section: DataSection) -> Iterator[int]:
        """Tokens of the fullest sequence of some steps of the first epoch."""
        for step in range(1, min(self.steps_per_epoch, SAMPLED_STEPS) + 1):
            step_sizes = self._sizes[self.pairs_of(step)].tolist()
            rows = balance(step_sizes, self.packer.num_rows, section.packed_length)
            yield max(sum(step_sizes[i] for i in row) for row in rows)
