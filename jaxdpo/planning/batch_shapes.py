"""The batches of a run by their shapes alone."""

import dataclasses

import jax
import numpy as np

from jaxdpo.config.data_options import LENGTH_MULTIPLE, DataSection
from jaxdpo.data.loader import Loader
from jaxdpo.data.packing import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShapes:
    """Shapes of the packed batch of one optimizer step."""

    microbatches: int
    """Gradient accumulation: microbatches of a step."""
    rows: int
    """Packed sequences of a microbatch, one for each data-parallel shard of the mesh."""
    longest: int
    """Token positions of the longest packed sequence that may occur; memory is estimated for it."""
    typical: int
    """Token positions of a typical packed sequence; time is estimated for it."""
    lengths: np.ndarray
    """int [pairs, 3]: tokens of prompt, chosen and rejected in a typical step."""

    @classmethod
    def uniform(
        cls, section: DataSection, pair_tokens: tuple[int, int, int], pairs: int, num_rows: int
    ) -> "BatchShapes":
        """Shapes without data: all pairs have the same lengths.

        Args:
            section: with numbers for the lengths that may be automatic.
            pair_tokens: tokens of prompt, chosen and rejected.
            pairs: pairs of a step.
            num_rows: packed sequences of a microbatch.
        """
        prompt, chosen, rejected = pair_tokens
        num_prompts = 1 if section.share_prefix else 2
        pair_size = prompt * num_prompts + chosen + rejected
        if pair_size <= section.packed_length:
            pairs_per_row = max(1, section.packed_length // pair_size)
            microbatches = -(-pairs // (num_rows * pairs_per_row))
        else:
            microbatches = pairs
        used = -(-pairs // (microbatches * num_rows)) * pair_size
        typical = min(-(-used // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, section.packed_length)
        return cls(
            microbatches=microbatches,
            rows=num_rows,
            longest=section.packed_length,
            typical=typical,
            lengths=np.tile(np.asarray(pair_tokens), (pairs, 1)),
        )

    @classmethod
    def from_loader(cls, loader: Loader, steps: int = 20) -> "BatchShapes":
        """Shapes of a run's first steps; the typical one has the median number of positions."""
        shapes = []
        for step in range(1, min(steps, loader.steps_per_epoch) + 1):
            shapes.append(loader.batch(step).tokens_MBT.shape)
        by_tokens = sorted(shapes, key=lambda shape: shape[0] * shape[2])
        microbatches, rows, typical = by_tokens[len(by_tokens) // 2]
        return cls(
            microbatches=microbatches,
            rows=rows,
            longest=max(shape[2] for shape in shapes),
            typical=typical,
            lengths=loader.table.lengths[loader.pairs_of(1)],
        )

    @property
    def batch(self) -> Batch:
        """Shapes and dtypes of a step's arrays, with the longest packed sequences."""
        MB = (self.microbatches, self.rows)
        num_pairs = len(self.lengths)

        def integers(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*MB, *dims), np.int32)

        return Batch(
            *(integers(self.longest) for _ in range(8)),
            lengths_MBP2=integers(num_pairs, 2),
            weights_MBP=jax.ShapeDtypeStruct((*MB, num_pairs), np.float32),
            margins_MBP=jax.ShapeDtypeStruct((*MB, num_pairs), np.float32),
            index_MBP=integers(num_pairs),
        )
