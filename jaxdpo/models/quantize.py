"""Weights in few bits: int8, or the 4-bit NormalFloat of QLoRA (2305.14314), each run of numbers with a scale of its own.

A quantised weight is a pytree node in its array's place, so that jit, scan and shardings take it as they take arrays; the decoder's
scan turns one layer at a time back. Four-bit codes are packed two to a byte here: JAX's own 4-bit arrays take a byte each on CPU.

Dimension names: L layers, X a weight's last dimension, K runs of it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

PROJECTIONS = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
"""Names of the weights of layers that are quantised; embeddings, LM head, norms, biases and routers stay as they are."""
LONGEST_RUN = 64
"""Numbers that share a scale: the largest power of two up to this that divides the weight's last dimension."""

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
class Quantised:
    """A weight [..., X] as codes and scales."""

    codes: jax.Array
    """int8 [..., X], or for nf4 uint8 [..., X / 2]: the first of two neighbours in the low bits."""
    scales: jax.Array
    """bfloat16 [..., K]: the largest absolute value of each run."""

    def dequantized(self, dtype: Any) -> jax.Array:
        """The weight [..., X] as `dtype`."""
        if self.codes.dtype == jnp.int8:
            values = self.codes.astype(jnp.float32) / 127.0
        else:
            pairs = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
            values = jnp.asarray(NF4)[pairs.reshape(*self.codes.shape[:-1], -1)]
        runs = values.reshape(*self.scales.shape, -1) * self.scales.astype(jnp.float32)[..., None]
        return runs.reshape(values.shape).astype(dtype)


def quantise(weight: jax.Array, kind: str) -> Quantised:
    """A weight [L, ..., X] in few bits, one layer's float32 copy at a time.

    Args:
        kind: int8 or nf4.

    Raises:
        ValueError: nf4 of an odd X.
    """
    if kind == "nf4" and weight.shape[-1] % 2:
        raise ValueError(
            f"model.quantize=nf4: packs two numbers to a byte, but a weight has {weight.shape[-1]} in a row. Use int8"
        )
    return jax.lax.map(functools.partial(_quantise_layer, kind=kind), weight)


def _quantise_layer(weight: jax.Array, kind: str) -> Quantised:
    size = weight.shape[-1]
    run = min(LONGEST_RUN, size & -size)
    runs = weight.astype(jnp.float32).reshape(*weight.shape[:-1], size // run, run)
    scales = jnp.max(jnp.abs(runs), axis=-1).astype(jnp.bfloat16)
    divisors = jnp.where(scales == 0, 1.0, scales.astype(jnp.float32))
    parts = jnp.clip(runs / divisors[..., None], -1.0, 1.0).reshape(weight.shape)
    if kind == "int8":
        return Quantised(jnp.round(127.0 * parts).astype(jnp.int8), scales)
    codes = jnp.searchsorted(jnp.asarray((NF4[1:] + NF4[:-1]) / 2), parts).astype(jnp.uint8)
    return Quantised(codes[..., 0::2] | codes[..., 1::2] << 4, scales)


def is_quantised(path: str) -> bool:
    """Whether the weight at `path` (layers/attn/q, ...) is one that is quantised."""
    return path.startswith("layers/") and path.rsplit("/", 1)[-1] in PROJECTIONS


def quantised_tree(params: Tree, kind: str) -> Tree:
    """A tree of weights with its projections quantised. Call it under jit, or under jax.eval_shape for the shapes."""
    return _map_projections(params, lambda weight: quantise(weight, kind))


def quantised_axes(axes: Tree) -> Tree:
    """The tree of logical axes that fits `quantised_tree`: codes and scales lie as their weight does, but a row's runs are whole."""

    def held(names: Any) -> Quantised:
        runs: Any = (*names[:-1], "run")
        return Quantised(names, runs)

    return _map_projections(axes, held)


def _map_projections(tree: Tree, change: Any) -> Tree:
    def visit(path: tuple, leaf: Any) -> Any:
        return (
            change(leaf)
            if is_quantised(jax.tree_util.keystr(path, simple=True, separator="/"))
            else leaf
        )

    return jax.tree_util.tree_map_with_path(
        visit, tree, is_leaf=lambda node: isinstance(node, tuple)
    )
