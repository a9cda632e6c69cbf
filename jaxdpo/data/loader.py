"""Which pairs a step sees, and their packed rows, prepared ahead of time.

A step's pairs follow from (seed, step) alone, so a run's position in its data is one number, and a resumed run goes on with
exactly the pairs it would have seen.
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
"""Steps whose rows are looked at to choose the row lengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """The batches of a run. Steps are counted from 1; the last step of an epoch may hold fewer pairs."""

    table: PairTable
    packer: Packer
    batch_size: int
    seed: int
    shuffle: bool
    weights: tuple[float, ...] = ()
    """Weight of each set; empty: every pair is visited once an epoch."""
    mine: frozenset[int] | None = None
    """Rows of a microbatch that this process feeds; it reads no other pair's tokens. None: all."""
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
        """A loader for microbatches of num_rows rows, with row lengths that suit these pairs.

        Raises:
            ValueError: some pair is longer than data.packed_length, or data.weights asks for a set without training pairs.
        """
        every_size = Packer(
            share_prefix=section.share_prefix,
            num_rows=num_rows,
            packed_lengths=(section.packed_length,),
            num_places=batch_size,
        )
        weights = tuple(section.weights)
        loader = cls(
            table=table,
            packer=every_size,
            batch_size=batch_size,
            seed=seed,
            shuffle=section.shuffle,
            weights=weights,
            mine=mine,
        )
        for name, places, visits in (
            zip(section.train, loader._members, loader._visits, strict=True) if weights else ()
        ):
            logger.info(
                "data.weights: an epoch visits %d pairs of %s, which has %d",
                visits,
                printable(name),
                len(places),
            )
        packed_lengths = choose_packed_lengths(
            loader._sampled_loads(section), section.num_packed_lengths, section.packed_length
        )
        return dataclasses.replace(
            loader, packer=dataclasses.replace(every_size, packed_lengths=packed_lengths)
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that one pass over the pairs takes."""
        return -(-len(self.table) // self.batch_size)

    def epoch(self, step: int) -> float:
        """Passes over the pairs after `step`."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + rest * self.batch_size / len(self.table)

    def pairs_of(self, step: int) -> np.ndarray:
        """Places in the table of the pairs that `step` trains on; int64."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def num_tokens(self, step: int) -> int:
        """Slots of the step's rows that hold a token: each prompt once in the shared layout, twice in the separate one."""
        return int(self._sizes[self.pairs_of(step)].sum())

    def batch(self, step: int) -> Batch:
        """The packed rows of `step`."""
        return self.pack(self.table, self.pairs_of(step))

    def pack(self, table: PairTable, places: np.ndarray) -> Batch:
        """The packed rows of these pairs of a table, those of other processes left empty."""
        return self.packer([table[i] for i in places.tolist()], self.mine)

    def stream(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first to last, prepared in a thread while the devices compute."""
        batches = grain.MapDataset.range(first, last + 1).map(lambda step: self.batch(int(step)))
        return iter(
            batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        )

    def _order(self, epoch: int) -> np.ndarray:
        """Places of an epoch's pairs in the order of their visits. Kept: some steps of one epoch ask for it at a time."""
        if (order := self._orders.get(epoch)) is None:
            order = self._mixed(epoch) if self.weights else np.arange(len(self.table))
            order = (
                np.random.default_rng((self.seed, epoch)).permutation(order)
                if self.shuffle
                else order
            )
            for older in list(self._orders)[
                :-1
            ]:  # the thread that prepares batches may be an epoch ahead of the loop
                self._orders.pop(older, None)
            self._orders[epoch] = order
        return order

    def _mixed(self, epoch: int) -> np.ndarray:
        """Places of an epoch's pairs, as many as the table has, each set spread evenly.

        Each set is gone through again and again, in a new order each time, and every epoch goes on where the last one stopped.
        """
        parts = [
            self._next(number, epoch * visits, visits) for number, visits in enumerate(self._visits)
        ]
        spread = np.concatenate([(np.arange(visits) + 0.5) / visits for visits in self._visits])
        return np.concatenate(parts)[np.argsort(spread, kind="stable")]

    def _next(self, number: int, start: int, count: int) -> np.ndarray:
        """Places of the pairs of one set that are visited after `start` others of it."""
        places = self._members[number]
        first, last = start // len(places), (start + count - 1) // len(places)
        passes = [
            np.random.default_rng((self.seed, number, again)).permutation(places)
            if self.shuffle
            else places
            for again in range(first, last + 1)
        ]
        return np.concatenate(passes)[start - first * len(places) :][:count]

    @functools.cached_property
    def _members(self) -> list[np.ndarray]:
        """Places of each set's pairs."""
        return [np.flatnonzero(self.table.sources == number) for number in range(len(self.weights))]

    @functools.cached_property
    def _visits(self) -> list[int]:
        """Pairs of each set in an epoch: whole numbers in the proportions of the mix that add up to the table's length."""
        if empty := [number for number, places in enumerate(self._members) if not len(places)]:
            raise ValueError(
                f"data.weights={list(self.weights)}: set {empty[0] + 1} of data.train has no training pair. Leave it out"
            )
        edges = np.rint(np.cumsum((0, *self.weights)) / sum(self.weights) * len(self.table)).astype(
            int
        )
        return np.maximum(np.diff(edges), 1).tolist()

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """Slots of each pair."""
        again = self.table.lengths[:, 0] if not self.packer.share_prefix else 0
        return self.table.lengths.sum(axis=1) + again

    def _sampled_loads(self, section: DataSection) -> Iterator[int]:
        """Slots of the fullest row of some steps of the first epoch."""
        for step in range(1, min(self.steps_per_epoch, SAMPLED_STEPS) + 1):
            step_sizes = self._sizes[self.pairs_of(step)].tolist()
            rows = balance(step_sizes, self.packer.num_rows, section.packed_length)
            yield max(sum(step_sizes[i] for i in row) for row in rows)
