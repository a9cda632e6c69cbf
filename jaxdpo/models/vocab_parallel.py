"""The LM head's softmax over a vocab that is sharded over devices (vocab-parallel).

What one device computes, with the collectives that complete it; without a mesh there are none.

Shape suffixes: B packed sequences, C tokens of a chunk, D model, V vocab (a device's shard of it).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.distributed.sharding import ROWS, alone_on, on_each_device, shared_axes


class MeshAxes(NamedTuple):
    """On one device: the mesh axes over which something is sharded, each perhaps an empty tuple."""

    vocab: tuple[str, ...] = ()
    """Of the head's vocab."""
    embed: tuple[str, ...] = ()
    """Of the head's D, before `gather_head` and after `scatter_head_gradient`."""
    tokens: tuple[str, ...] = ()
    """Of the sequences and their tokens, without those of `embed`."""

    def gather_head(self, head_VD: jax.Array) -> jax.Array:
        """The head with all of D."""
        if not self.embed:
            return head_VD
        return jax.lax.all_gather(head_VD, self.embed, axis=1, tiled=True)

    def scatter_head_gradient(self, d_head_VD: jax.Array) -> jax.Array:
        """The head's gradient summed over all tokens, this device's shard of D."""
        if self.embed:
            d_head_VD = jax.lax.psum_scatter(d_head_VD, self.embed, scatter_dimension=1, tiled=True)
        return jax.lax.psum(d_head_VD, self.tokens) if self.tokens else d_head_VD

    def sum_vocab(self, x: jax.Array) -> jax.Array:
        """The sum over the shards of the vocab."""
        return jax.lax.psum(x, self.vocab) if self.vocab else x

    def logsumexp(self, logits_BCV: jax.Array) -> jax.Array:
        """float32 [B, C], over the full vocab."""
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        if not self.vocab:
            return lse_BC
        max_BC = jax.lax.pmax(lse_BC, self.vocab)
        return max_BC + jnp.log(self.sum_vocab(jnp.exp(lse_BC - max_BC)))

    def log_softmax(self, logits_BCV: jax.Array) -> jax.Array:
        """float32 [B, C, V], this device's shard of the vocab."""
        if not self.vocab:
            return jax.nn.log_softmax(logits_BCV, axis=-1)
        logits_BCV -= jax.lax.pmax(jnp.max(logits_BCV, axis=-1), self.vocab)[..., None]
        total_BC = self.sum_vocab(jnp.sum(jnp.exp(logits_BCV), axis=-1))
        return logits_BCV - jnp.log(total_BC)[..., None]

    def is_target(self, targets_BC: jax.Array, logits_BCV: jax.Array) -> jax.Array:
        """bool [B, C, V]: true at each token's target, if it is in this shard of the vocab."""
        ids_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
        if self.vocab:
            ids_BCV += jax.lax.axis_index(self.vocab) * logits_BCV.shape[-1]
        return ids_BCV == targets_BC[..., None]


Kind = Literal["tokens", "head", "scalar"]
"""How an array is sharded: as [B, S, ...], as the LM head, or not at all."""


def on_mesh(
    local: Callable, mesh: Mesh | None, takes: Sequence[Kind], gives: Sequence[Kind]
) -> Callable:
    """`local(axes, ...)` on every device of a mesh.

    Args:
        takes, gives: kinds of its other arguments, and of its results.
    """
    if mesh is None or mesh.size == 1:
        return functools.partial(local, MeshAxes())
    vocab, embed = shared_axes(mesh, "vocab"), shared_axes(mesh, "embed")
    tokens = (*ROWS, "context")
    # Over the axes of an outer shard_map (sharding.summed_over_data), that one sums.
    excluded = {*embed, *alone_on()}
    summed = tuple(axis for axis in tokens if mesh.shape[axis] > 1 and axis not in excluded)
    specs = {
        "tokens": PartitionSpec(tokens),
        "head": PartitionSpec(vocab or None, embed or None),
        "scalar": PartitionSpec(),
    }
    in_specs = tuple(specs[kind] for kind in takes)
    out_specs = tuple(specs[kind] for kind in gives)
    run = functools.partial(local, MeshAxes(vocab, embed, summed))
    return on_each_device(run, mesh, in_specs, out_specs[0] if len(gives) == 1 else out_specs)
