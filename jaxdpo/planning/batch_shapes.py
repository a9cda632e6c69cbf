"""The packed rows of a step, known by their sizes alone."""

import dataclasses

import jax
import numpy as np

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.loader import Loader
from jaxdpo.data.packing import SLOT_MULTIPLE, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What a step computes on."""

    microbatches: int
    rows: int
    """Rows of a microbatch, one for each group of devices that sees its own."""
    longest: int
    """Slots of the longest row that the run may meet: what memory must hold."""
    slots: int
    """Slots of a usual row: what time is spent on."""
    lengths: np.ndarray
    """int [pairs, 3]: tokens of prompt, chosen and rejected of a usual step's pairs."""

    @classmethod
    def filled(
        cls, section: DataSection, pair_tokens: tuple[int, int, int], pairs: int, num_rows: int
    ) -> "Rows":
        """Without data: pairs that all have these lengths, in rows up to data.packed_length."""
        prompt, chosen, rejected = pair_tokens
        size = prompt * (1 if section.share_prefix else 2) + chosen + rejected
        each = (
            -(-pairs // (num_rows * max(1, section.packed_length // size)))
            if size <= section.packed_length
            else pairs
        )
        used = -(-pairs // (each * num_rows)) * size
        slots = min(-(-used // SLOT_MULTIPLE) * SLOT_MULTIPLE, section.packed_length)
        lengths = np.tile(np.asarray(pair_tokens), (pairs, 1))
        return cls(
            microbatches=each,
            rows=num_rows,
            longest=section.packed_length,
            slots=slots,
            lengths=lengths,
        )

    @classmethod
    def of(cls, loader: Loader, steps: int = 20) -> "Rows":
        """The rows of a run's first steps."""
        batches = [
            loader.batch(step).tokens_MBT.shape
            for step in range(1, min(steps, loader.steps_per_epoch) + 1)
        ]
        usual = sorted(batches, key=lambda shape: shape[0] * shape[2])[len(batches) // 2]
        return cls(
            microbatches=usual[0],
            rows=usual[1],
            longest=max(shape[2] for shape in batches),
            slots=usual[2],
            lengths=loader.table.lengths[loader.pairs_of(1)],
        )

    @property
    def batch(self) -> Batch:
        """Shapes and types of the step's arrays, with the longest rows."""
        rows, pairs = (self.microbatches, self.rows), len(self.lengths)

        def numbers(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*rows, *dims), np.int32)

        return Batch(
            *(numbers(self.longest) for _ in range(8)),
            lengths_MBP2=numbers(pairs, 2),
            weights_MBP=jax.ShapeDtypeStruct((*rows, pairs), np.float32),
            margins_MBP=jax.ShapeDtypeStruct((*rows, pairs), np.float32),
            index_MBP=numbers(pairs),
        )
