"""Log-probabilities of answer tokens from hidden states, a chunk of tokens at a time.

Logits exist for one chunk only, in the forward and in the (recomputed) backward pass, and the number of chunks follows the
number of scored tokens of the batch at hand. Sums over the vocabulary are float32.

On a mesh each device runs the chunks of its own rows against its share of the vocabulary: the LM head comes together once before the
loop and its gradient is spread once behind it; in the loop only sums over the vocabulary travel.

Dimension names: B rows, T slots, S scored tokens (multiple of the chunk), C tokens of a chunk, D model, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.distributed.sharding import ROWS, alone_on, on_each_device, shared_axes
from jaxdpo.models.matmul import soft_cap, soft_cap_slope, sum_of_outer_products

CHUNK_LOGITS_CPU, CHUNK_LOGITS = 1 << 23, 1 << 27
"""Logits held at once for one row, as a number of float32: what stays near a CPU's caches, and what keeps an accelerator busy."""


def chunk_size(vocab_size: int, num_tokens: int, on_cpu: bool) -> int:
    """Tokens of a chunk: a power of two from 64 to 1024, whose logits stay near the platform's limit; at most num_tokens."""
    size = 64
    while size < 1024 and 2 * size * vocab_size <= (CHUNK_LOGITS_CPU if on_cpu else CHUNK_LOGITS):
        size *= 2
    return min(size, num_tokens)


def gather_hidden(hidden_BTD: jax.Array, slots_BS: jax.Array) -> jax.Array:
    """The hidden states that predict the scored tokens: [B, S, D]."""
    return jnp.take_along_axis(hidden_BTD, slots_BS[..., None], axis=1)


def scored_by_share(
    slots_BS: jax.Array, sides_BS: jax.Array, num_slots: int, num_places: int, shares: int
) -> tuple[jax.Array, jax.Array]:
    """Scored tokens by the share of their row that holds the slot that predicts them, so that hidden states stay where they are.

    Args:
        slots_BS, sides_BS: as in a batch.
        num_slots: T.
        num_places: P. A slot predicts at most two tokens, and two only where a prompt ends.
        shares: how many runs of slots a row is cut into.

    Returns:
        (int32 [B * shares, S'] places of the tokens among the row's S, those of the share first; bool, which of them are of the share.)
    """
    length = num_slots // shares
    owner_BS = jnp.where(sides_BS >= 0, slots_BS // length, -1)
    own_BXS = owner_BS[:, None, :] == jnp.arange(shares, dtype=jnp.int32)[None, :, None]
    order_BXS = jnp.argsort(~own_BXS, axis=-1, stable=True)[
        ..., : min(slots_BS.shape[1], length + min(length, num_places))
    ]
    flat = (-1, order_BXS.shape[-1])
    return order_BXS.astype(jnp.int32).reshape(flat), jnp.take_along_axis(
        own_BXS, order_BXS, axis=-1
    ).reshape(flat)


def num_chunks(sides_BS: jax.Array, chunk: int) -> jax.Array:
    """Chunks that hold a scored token in any row; int32 scalar. Scored tokens come first (see packing)."""
    return (jnp.max(jnp.sum(sides_BS >= 0, axis=1)).astype(jnp.int32) + chunk - 1) // chunk


class Head(NamedTuple):
    """How logits are made of hidden states; static."""

    chunk: int
    """Tokens of a chunk."""
    dtype: jnp.dtype
    """Type of the products' inputs; sums are float32."""
    cap: float | None = None
    """Soft cap of the logits."""
    mesh: Mesh | None = None
    """Rows are spread over all its axes but tensor, the head as a weight with axes vocab and embed."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_logps(
    hidden_BSD: jax.Array, head_VD: jax.Array, targets_BS: jax.Array, chunks: jax.Array, head: Head
) -> jax.Array:
    """log softmax(hidden head^T)[target] of each scored token.

    Args:
        hidden_BSD: float32 states that predict the tokens.
        head_VD: LM head, float.
        targets_BS: int32 token ids.
        chunks: int32 scalar, chunks to compute; the tokens behind them get 0.

    Returns:
        float32 [B, S], nats. Differentiable in hidden_BSD and head_VD.
    """
    return _token_logps_fwd(hidden_BSD, head_VD, targets_BS, chunks, head)[0]


def _token_logps_fwd(
    hidden_BSD: jax.Array, head_VD: jax.Array, targets_BS: jax.Array, chunks: jax.Array, head: Head
) -> tuple:
    hidden_BSD = hidden_BSD.astype(head.dtype)
    logps_BS, lse_BS = _on_devices(_logps_here, head, "rwrn", "rr")(
        hidden_BSD, head_VD, targets_BS, chunks
    )
    return logps_BS, (hidden_BSD, head_VD, targets_BS, chunks, lse_BS)


def _token_logps_bwd(head: Head, saved: tuple, d_logps_BS: jax.Array) -> tuple:
    d_hidden_BSD, d_head_VD = _on_devices(_gradients_here, head, "rwrnrr", "rw")(*saved, d_logps_BS)
    return d_hidden_BSD, d_head_VD.astype(saved[1].dtype), None, None


token_logps.defvjp(_token_logps_fwd, _token_logps_bwd)


def _logps_here(
    head: Head,
    over: "_Over",
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    targets_BS: jax.Array,
    chunks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and log-sum-exps, float32 [B, S] each."""
    head_VD = over.whole(head_VD.astype(head.dtype))

    def measure(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = _logits(hidden_BSD, head_VD, start, head)
        lse_BC = over.logsumexp(logits_BCV)
        hit_BCV = over.hits(_cut(targets_BS, start, head.chunk), logits_BCV)
        return over.sum(jnp.sum(jnp.where(hit_BCV, logits_BCV, 0.0), axis=-1)) - lse_BC, lse_BC

    return _by_chunk(measure, 2, targets_BS.shape, chunks, head.chunk)


def _gradients_here(
    head: Head,
    over: "_Over",
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    targets_BS: jax.Array,
    chunks: jax.Array,
    lse_BS: jax.Array,
    d_logps_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden states and head, float32."""
    head_VD, chunk = over.whole(head_VD.astype(head.dtype)), head.chunk

    def step(i: jax.Array, carry: tuple) -> tuple:
        d_hidden_BSD, d_head_DV = carry
        start = i * chunk
        logits_BCV = _logits(hidden_BSD, head_VD, start, head)
        hit_BCV = over.hits(_cut(targets_BS, start, chunk), logits_BCV)
        probs_BCV = jnp.exp(logits_BCV - _cut(lse_BS, start, chunk)[..., None])
        d_logits_BCV = (hit_BCV.astype(jnp.float32) - probs_BCV) * _cut(d_logps_BS, start, chunk)[
            ..., None
        ]
        slope_BCV = soft_cap_slope(logits_BCV, head.cap)
        d_logits_BCV = (d_logits_BCV if slope_BCV is None else d_logits_BCV * slope_BCV).astype(
            head.dtype
        )
        d_hidden = jnp.einsum(
            "BCV,VD->BCD", d_logits_BCV, head_VD, preferred_element_type=jnp.float32
        )
        hidden_BCD = _cut(hidden_BSD, start, chunk)
        V, D = head_VD.shape
        d_head_DV += sum_of_outer_products(hidden_BCD.reshape(-1, D), d_logits_BCV.reshape(-1, V))
        return jax.lax.dynamic_update_slice_in_dim(d_hidden_BSD, d_hidden, start, axis=1), d_head_DV

    zeros = jnp.zeros(hidden_BSD.shape, jnp.float32), jnp.zeros(head_VD.shape[::-1], jnp.float32)
    d_hidden_BSD, d_head_DV = jax.lax.fori_loop(0, chunks, step, zeros)
    return over.sum(d_hidden_BSD), over.share(d_head_DV.T)


def token_collisions(
    hidden_BSD: jax.Array, head_VD: jax.Array, chunks: jax.Array, head: Head
) -> jax.Array:
    """log sum_v p(v)^2 of each scored token's distribution, as WPO weighs with (2406.11827 eq. 4); float32 [B, S]. Not differentiable."""

    def here(
        head: Head, over: _Over, hidden_BSD: jax.Array, head_VD: jax.Array, chunks: jax.Array
    ) -> jax.Array:
        head_VD = over.whole(head_VD.astype(head.dtype))

        def measure(start: jax.Array) -> tuple[jax.Array]:
            logits_BCV = _logits(hidden_BSD, head_VD, start, head)
            return (over.logsumexp(2 * logits_BCV) - 2 * over.logsumexp(logits_BCV),)

        return _by_chunk(measure, 1, hidden_BSD.shape[:2], chunks, head.chunk)[0]

    return _on_devices(here, head, "rwn", "r")(hidden_BSD.astype(head.dtype), head_VD, chunks)


def token_kl(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    ref_hidden_BSD: jax.Array,
    ref_head_VD: jax.Array,
    chunks: jax.Array,
    head: Head,
) -> jax.Array:
    """Exact KL(policy || reference) of each scored token's distribution, over the whole vocabulary.

    Returns:
        float32 [B, S], nats. Not differentiable.
    """

    def here(head: Head, over: _Over, *args: jax.Array) -> jax.Array:
        hidden_BSD, head_VD, ref_hidden_BSD, ref_head_VD, chunks = args
        head_VD, ref_head_VD = (
            over.whole(weight.astype(head.dtype)) for weight in (head_VD, ref_head_VD)
        )

        def measure(start: jax.Array) -> tuple[jax.Array]:
            logps_BCV = over.log_softmax(_logits(hidden_BSD, head_VD, start, head))
            ref_logps_BCV = over.log_softmax(_logits(ref_hidden_BSD, ref_head_VD, start, head))
            return (over.sum(jnp.sum(jnp.exp(logps_BCV) * (logps_BCV - ref_logps_BCV), axis=-1)),)

        return _by_chunk(measure, 1, hidden_BSD.shape[:2], chunks, head.chunk)[0]

    hidden_BSD, ref_hidden_BSD = hidden_BSD.astype(head.dtype), ref_hidden_BSD.astype(head.dtype)
    return _on_devices(here, head, "rwrwn", "r")(
        hidden_BSD, head_VD, ref_hidden_BSD, ref_head_VD, chunks
    )


class _Over(NamedTuple):
    """On one device: the mesh axes that share something with it, each as a tuple of names that may be empty."""

    vocab: tuple[str, ...] = ()
    """The vocabulary."""
    embed: tuple[str, ...] = ()
    """The head's second dimension, between steps."""
    rows: tuple[str, ...] = ()
    """The rows, but for those of `embed`."""

    def whole(self, head_VD: jax.Array) -> jax.Array:
        """All of D."""
        return (
            jax.lax.all_gather(head_VD, self.embed, axis=1, tiled=True) if self.embed else head_VD
        )

    def share(self, d_head_VD: jax.Array) -> jax.Array:
        """The sum over all rows, this device's share of D."""
        if self.embed:
            d_head_VD = jax.lax.psum_scatter(d_head_VD, self.embed, scatter_dimension=1, tiled=True)
        return jax.lax.psum(d_head_VD, self.rows) if self.rows else d_head_VD

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the shares of the vocabulary."""
        return jax.lax.psum(x, self.vocab) if self.vocab else x

    def logsumexp(self, logits_BCV: jax.Array) -> jax.Array:
        """float32 [B, C], over the whole vocabulary."""
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        if not self.vocab:
            return lse_BC
        top_BC = jax.lax.pmax(lse_BC, self.vocab)
        return top_BC + jnp.log(self.sum(jnp.exp(lse_BC - top_BC)))

    def log_softmax(self, logits_BCV: jax.Array) -> jax.Array:
        """float32 [B, C, V] of this share of the vocabulary."""
        if not self.vocab:
            return jax.nn.log_softmax(logits_BCV, axis=-1)
        logits_BCV -= jax.lax.pmax(jnp.max(logits_BCV, axis=-1), self.vocab)[..., None]
        return logits_BCV - jnp.log(self.sum(jnp.sum(jnp.exp(logits_BCV), axis=-1)))[..., None]

    def hits(self, targets_BC: jax.Array, logits_BCV: jax.Array) -> jax.Array:
        """True at each token's target, where it is in this share of the vocabulary."""
        ids_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
        if self.vocab:
            ids_BCV += jax.lax.axis_index(self.vocab) * logits_BCV.shape[-1]
        return ids_BCV == targets_BC[..., None]


def _on_devices(here: Callable, head: Head, takes: str, gives: str) -> Callable:
    """`here` on every device.

    Args:
        takes, gives: what its arguments and results are: r rows, w a weight like the head, n a number.
    """
    mesh = head.mesh
    if mesh is None or mesh.size == 1:
        return functools.partial(here, head, _Over())
    vocab, embed = shared_axes(mesh, "vocab"), shared_axes(mesh, "embed")
    rows = (*ROWS, "context")
    over = _Over(
        vocab,
        embed,
        tuple(axis for axis in rows if mesh.shape[axis] > 1 and axis not in {*embed, *alone_on()}),
    )
    specs = {
        "r": PartitionSpec(rows),
        "w": PartitionSpec(vocab or None, embed or None),
        "n": PartitionSpec(),
    }
    results = tuple(specs[kind] for kind in gives)
    each = functools.partial(here, head, over)
    return on_each_device(
        each, mesh, tuple(specs[kind] for kind in takes), results[0] if len(gives) == 1 else results
    )


def sum_by_side(values_BS: jax.Array, sides_BS: jax.Array, num_places: int) -> jax.Array:
    """Sums over each side's tokens: float32 [B, P, 2] (chosen, rejected). Tokens of side -1 count nowhere.

    A product with a one-hot matrix: the same sums in the same order on every device, where a scatter may not be.
    """
    owner = jax.nn.one_hot(sides_BS, 2 * num_places, dtype=jnp.float32)
    sums = jnp.einsum("BS,BSQ->BQ", values_BS, owner, precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(values_BS.shape[0], num_places, 2)


def _by_chunk(
    measure: Callable[[jax.Array], tuple],
    count: int,
    shape: tuple[int, ...],
    chunks: jax.Array,
    chunk: int,
) -> tuple:
    """`count` float32 [B, S] arrays, filled a chunk at a time by `measure`, which takes a chunk's first token."""

    def step(i: jax.Array, arrays: tuple) -> tuple:
        parts = measure(i * chunk)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(array, part, i * chunk, axis=1)
            for array, part in zip(arrays, parts, strict=True)
        )

    return jax.lax.fori_loop(
        0, chunks, step, tuple(jnp.zeros(shape, jnp.float32) for _ in range(count))
    )


def _cut(x: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)


def _logits(hidden_BSD: jax.Array, head_VD: jax.Array, start: jax.Array, head: Head) -> jax.Array:
    hidden_BCD = _cut(hidden_BSD, start, head.chunk)
    return soft_cap(
        jnp.einsum("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=jnp.float32), head.cap
    )
