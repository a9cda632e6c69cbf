"""Which pairs a step sees, and their packed rows, prepared ahead of time.

A step's pairs follow from (seed, step) alone, so a run's position in its data is one number, and a resumed run goes on with
exactly the pairs it would have seen.
"""

import dataclasses
import functools
from collections.abc import Iterator

import grain
import numpy as np

from jaxdpo.config import DataSection
from jaxdpo.data.packing import Batch, Packer, balance, choose_row_sizes
from jaxdpo.data.table import PairTable

SAMPLED_STEPS = 1000
"""Steps whose rows are looked at to choose the row lengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """The batches of a run. Steps are counted from 1; the last step of an epoch may hold fewer pairs."""

    table: PairTable
    packer: Packer
    pairs_per_step: int
    seed: int
    shuffle: bool

    @classmethod
    def create(cls, table: PairTable, section: DataSection, *, pairs_per_step: int, num_rows: int, seed: int) -> "Loader":
        """A loader for microbatches of num_rows rows, with row lengths that suit these pairs.

        Raises:
            ValueError: some pair is longer than data.max_row_tokens.
        """
        every_size = Packer(layout=section.layout, num_rows=num_rows, row_sizes=(section.max_row_tokens,), num_places=pairs_per_step)
        loader = cls(table=table, packer=every_size, pairs_per_step=pairs_per_step, seed=seed, shuffle=section.shuffle)
        row_sizes = choose_row_sizes(loader._sampled_loads(section), section.row_sizes, section.max_row_tokens)
        return dataclasses.replace(loader, packer=dataclasses.replace(every_size, row_sizes=row_sizes))

    @property
    def steps_per_epoch(self) -> int:
        """Steps that one pass over the pairs takes."""
        return -(-len(self.table) // self.pairs_per_step)

    def epoch(self, step: int) -> float:
        """Passes over the pairs after `step`."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + rest * self.pairs_per_step / len(self.table)

    def pairs_of(self, step: int) -> np.ndarray:
        """Places in the table of the pairs that `step` trains on; int64."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.table)) if self.shuffle else np.arange(len(self.table))
        return order[index * self.pairs_per_step : (index + 1) * self.pairs_per_step]

    def num_tokens(self, step: int) -> int:
        """Slots of the step's rows that hold a token: each prompt once in the shared layout, twice in the separate one."""
        return int(self._sizes[self.pairs_of(step)].sum())

    def batch(self, step: int) -> Batch:
        """The packed rows of `step`."""
        return self.packer([self.table[i] for i in self.pairs_of(step)])

    def stream(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first to last, prepared in a thread while the devices compute."""
        batches = grain.MapDataset.range(first, last + 1).map(lambda step: self.batch(int(step)))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """Slots of each pair."""
        again = self.table.lengths[:, 0] if self.packer.layout == "separate" else 0
        return self.table.lengths.sum(axis=1) + again

    def _sampled_loads(self, section: DataSection) -> Iterator[int]:
        """Slots of the fullest row of some steps of the first epoch."""
        for step in range(1, min(self.steps_per_epoch, SAMPLED_STEPS) + 1):
            step_sizes = self._sizes[self.pairs_of(step)].tolist()
            rows = balance(step_sizes, self.packer.num_rows, section.max_row_tokens)
            yield max(sum(step_sizes[i] for i in row) for row in rows)
