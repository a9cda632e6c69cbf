"""MXFP4 weights, dequantized slice by slice: 4-bit floats in groups of 32 inputs that share a
scale.

The format is that of the OCP Microscaling specification 1.0: two numbers to a byte, the first in
the low half; a scale is a power of two, stored as its exponent plus 127. A weight [E, out, in] is
stored as blocks [E, out, groups, 16] and scales [E, out, groups], both bytes.

Not transformers' convert_moe_packed_tensors, because it is torch code and converts full tensors;
each device reads its own slice here. Tests compare with it.
"""

import numpy as np

GROUP = 32
"""Numbers that share a scale."""
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Value of each 4-bit code (sign, two bits of exponent, one of mantissa)."""
_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1)
"""The two numbers of each byte."""


def stored_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of blocks and scales of a weight [E, out, in]."""
    num_groups = -(-shape[-1] // GROUP)
    scales = (*shape[:-1], num_groups)
    return (*scales, GROUP // 2), scales


def read(
    target: np.ndarray, blocks: np.ndarray, scales: np.ndarray, index: tuple[slice, slice, slice]
) -> None:
    """Write experts x inputs x outputs of a weight into `target`, one expert at a time.

    Args:
        target: float array of the shape that `index` has.
        blocks: uint8 [E, out, groups, 16].
        scales: uint8 [E, out, groups].
        index: which experts, inputs and outputs, with steps of 1.
    """
    experts, inputs, outputs = index
    first_group = inputs.start // GROUP
    groups = slice(first_group, -(-inputs.stop // GROUP))
    # inputs need not begin at the beginning of a group
    begin = inputs.start - first_group * GROUP
    end = inputs.stop - first_group * GROUP
    for i, expert in enumerate(range(experts.start, experts.stop)):
        matrix = _dequantized(blocks[expert, outputs, groups], scales[expert, outputs, groups])
        target[i] = matrix[:, begin:end].T


def _dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks [out, groups, 16] and scales [out, groups] -> float32 [out, 32 groups]."""
    exponents = scales.astype(np.int32)[..., None, None] - 127
    return np.ldexp(_PAIRS[blocks], exponents).reshape(len(blocks), -1)
