"""Quantized weights: int8, or the 4-bit NormalFloat (NF4) of QLoRA (2305.14314), in blocks.

Each block of numbers along a weight's last dimension has a scale. A quantized weight is a pytree
node in place of its array, so jit, scan and shardings take it as they take arrays; the decoder's
scan dequantizes one layer at a time.

Not qwix, which has the same format, because it keeps 4-bit codes in JAX's uint4, which takes a
byte each on CPUs. Here two codes are packed into a byte.

Shape suffixes: L layers, X a weight's last dimension, K blocks of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.utils.tree import path_name

Tree = Any

PROJECTIONS = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
"""Weights of layers that are quantized; embeddings, LM head, norms, biases and routers are not."""
MAX_BLOCK = 64
"""Numbers that share a scale: the largest power of two up to this that divides the weight's last
dimension. 64 is QLoRA's block size for NF4 (2305.14314 section 4)."""

# Quantiles of a normal distribution scaled to -1..1, with 0 among them (2305.14314 appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight [..., X] as codes and scales."""

    codes: jax.Array
    """int8 [..., X], or for nf4 uint8 [..., X / 2]: the first of two neighbours in the low bits."""
    scales: jax.Array
    """bfloat16 [..., K]: the largest absolute value of each block."""

    def dequantized(self, dtype: Any) -> jax.Array:
        """The weight [..., X] as `dtype`."""
        if self.codes.dtype == jnp.int8:
            values = self.codes.astype(jnp.float32) / 127.0
        else:
            both = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
            values = jnp.asarray(NF4)[both.reshape(*self.codes.shape[:-1], -1)]
        blocks = values.reshape(*self.scales.shape, -1)
        blocks = blocks * self.scales.astype(jnp.float32)[..., None]
        return blocks.reshape(values.shape).astype(dtype)


def quantize(weight: jax.Array, kind: str) -> QuantizedArray:
    """A weight [L, ..., X] quantized, with one layer's float32 copy in memory at a time.

    Args:
        kind: int8 or nf4.

    Raises:
        ValueError: nf4 of an odd X.
    """
    if kind == "nf4" and weight.shape[-1] % 2:
        raise ValueError(
            f"model.quantize=nf4: packs two numbers into a byte, but a weight's last dimension is "
            f"{weight.shape[-1]}. Use int8"
        )
    return jax.lax.map(functools.partial(_quantize_layer, kind=kind), weight)


def _quantize_layer(weight: jax.Array, kind: str) -> QuantizedArray:
    size = weight.shape[-1]
    block = min(MAX_BLOCK, size & -size)  # size & -size: the largest power of two that divides it
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], size // block, block)
    scales = jnp.max(jnp.abs(blocks), axis=-1).astype(jnp.bfloat16)
    divisors = jnp.where(scales == 0, 1.0, scales.astype(jnp.float32))
    # Clipped, because the scale is rounded to bfloat16 and may be below the largest number.
    parts = jnp.clip(blocks / divisors[..., None], -1.0, 1.0).reshape(weight.shape)
    if kind == "int8":
        return QuantizedArray(jnp.round(127.0 * parts).astype(jnp.int8), scales)
    midpoints = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
    codes = jnp.searchsorted(midpoints, parts).astype(jnp.uint8)
    return QuantizedArray(codes[..., 0::2] | codes[..., 1::2] << 4, scales)


def is_quantized(path: str) -> bool:
    """Whether the weight at `path` (layers/attn/q, ...) is quantized."""
    return path.startswith("layers/") and path.rsplit("/", 1)[-1] in PROJECTIONS


def quantize_params(params: Tree, kind: str) -> Tree:
    """A tree of weights with its projections quantized.

    Call it under jit, or under jax.eval_shape for the shapes.
    """
    return _map_projections(params, lambda weight: quantize(weight, kind))


def quantized_axes(axes: Tree) -> Tree:
    """Logical axes of `quantize_params`' result, from those of its argument.

    Codes and scales are sharded as their weight, but the blocks of the last dimension, which may be
    too few, are not.
    """

    def split(names: Any) -> QuantizedArray:
        scale_names: Any = (*names[:-1], "run")
        return QuantizedArray(names, scale_names)

    return _map_projections(axes, split)


def _map_projections(tree: Tree, change: Callable[[Any], Any]) -> Tree:
    def visit(path: tuple, leaf: Any) -> Any:
        if is_quantized(path_name(path)):
            return change(leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(
        visit, tree, is_leaf=lambda node: isinstance(node, tuple)
    )
