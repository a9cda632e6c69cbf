"""MXFP4 weights, read piece by piece: 4-bit floats in groups of 32 along the inputs, each group with a power of two as its scale.

The format is that of the OCP Microscaling specification 1.0: two numbers to a byte, the first in its low half; the scale's exponent is
biased by 127. A weight [E, out, in] is stored as blocks [E, out, groups, 16] and scales [E, out, groups], both of bytes.
"""

import numpy as np

GROUP = 32
"""Numbers that share a scale."""
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1)
"""The two numbers of each byte."""


def stored_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of blocks and scales of a weight [E, out, in]."""
    groups = (*shape[:-1], -(-shape[-1] // GROUP))
    return (*groups, GROUP // 2), groups


def read(
    target: np.ndarray, blocks: np.ndarray, scales: np.ndarray, index: tuple[slice, slice, slice]
) -> None:
    """Write experts x inputs x outputs of a weight into `target`, one expert at a time.

    Args:
        target: float array of the shape that `index` has.
        blocks: uint8 [E, out, groups, 16].
        scales: uint8 [E, out, groups].
        index: which experts, inputs and outputs, steps of 1.
    """
    experts, inputs, outputs = index
    first, size = inputs.start // GROUP, inputs.stop - inputs.start
    groups = slice(first, -(-inputs.stop // GROUP))
    begin = inputs.start - first * GROUP
    for place, expert in enumerate(range(experts.start, experts.stop)):
        rows = _numbers(blocks[expert, outputs, groups], scales[expert, outputs, groups])
        target[place] = rows[:, begin : begin + size].T


def _numbers(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[rows, groups, 16] and [rows, groups] -> float32 [rows, 32 groups]."""
    exponents = scales.astype(np.int32)[..., None, None] - 127
    return np.ldexp(_PAIRS[blocks], exponents).reshape(len(blocks), -1)
