"""Interval attention in blocks of tokens, in plain JAX: what CPUs run.

A running softmax over blocks of keys (online softmax: Milakov and Gimelshein, 1805.02867), with
the scores recomputed in the backward pass (FlashAttention, 2205.14135). Only blocks that hold an
allowed key are visited.

Not jax.nn.dot_product_attention: see attention.py. Not splash attention, which is for TPUs.

Shape suffixes: B packed sequences, T token positions, S token positions of the keys, N query
heads, K kv heads, G = N / K query heads of one kv head, H head dim, b tokens of a block (q of a
block of queries and k of a block of keys where both meet).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxdpo.models.attention_inputs import MASK_VALUE, Inputs
from jaxdpo.models.matmul import einsum, soft_cap, soft_cap_slope

BLOCK = 64
"""Tokens of a block: few next to the hundreds of a pair, so that few masked scores are computed."""


def blocks(scale: float, cap: float | None, inputs: Inputs) -> jax.Array:
    """Attention block by block; arguments and result as in attention.attention."""
    q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, window, sinks_N = inputs
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q, k, v = _pad_to_blocks(q_BTNH), _pad_to_blocks(k_BSKH), _pad_to_blocks(v_BSKH)
    # Padding tokens see what the last token sees, so that they visit no further block of keys.
    start, end = _pad_to_blocks(k_start_BT, mode="edge"), _pad_to_blocks(k_end_BT, mode="edge")
    if window is None:
        visible = _Visible(start, end, None, None, None)
    else:
        visible = _Visible(
            start,
            end,
            _pad_to_blocks(window.positions_BT),
            _pad_to_blocks(window.positions_of_keys_BS),
            jnp.broadcast_to(window.size, (B,)),
        )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype).reshape(B, -1, K, N // K, H)
    sinks_KG = None
    if sinks_N is not None:
        sinks_KG = sinks_N.astype(jnp.float32).reshape(K, N // K)

    def attend(sequence: tuple) -> jax.Array:
        return _attend_sequence(cap, *sequence, sinks_KG)

    # One sequence after the other (lax.map): each has its own blocks to visit, and a loop whose
    # bounds differ between the members of a batch would run to the largest of them.
    q_BKGTH, k_BKSH, v_BKSH = (
        q.transpose(0, 2, 3, 1, 4),
        k.transpose(0, 2, 1, 3),
        v.transpose(0, 2, 1, 3),
    )
    out_BKGTH = jax.lax.map(attend, (q_BKGTH, k_BKSH, v_BKSH, visible))
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)[:, :T]


def _pad_to_blocks(x_BT: jax.Array, mode: str = "constant") -> jax.Array:
    """[B, T, ...] with tokens appended (zeros, or copies of the last) to a multiple of BLOCK."""
    padding = [(0, 0)] * x_BT.ndim
    padding[1] = (0, -x_BT.shape[1] % BLOCK)
    return jnp.pad(x_BT, padding, mode=mode)


class _Visible(NamedTuple):
    """What the tokens of a sequence may see; with a leading B outside the map over sequences."""

    start_T: jax.Array
    end_T: jax.Array
    positions_T: jax.Array | None
    key_positions_S: jax.Array | None
    window: jax.Array | None


class _QueryBlock(NamedTuple):
    """A block of queries: its first token, its intervals and the blocks of keys to visit."""

    start: jax.Array
    k_start_b: jax.Array
    k_end_b: jax.Array
    first_key_block: jax.Array
    end_key_block: jax.Array


def _query_block(index: jax.Array, visible: _Visible) -> _QueryBlock:
    start = index * BLOCK
    k_start_b = jax.lax.dynamic_slice_in_dim(visible.start_T, start, BLOCK)
    k_end_b = jax.lax.dynamic_slice_in_dim(visible.end_T, start, BLOCK)
    first, end = k_start_b.min() // BLOCK, (k_end_b.max() + BLOCK - 1) // BLOCK
    return _QueryBlock(start, k_start_b, k_end_b, first, end)


def _slice_block(x: jax.Array, start: jax.Array) -> jax.Array:
    """A block of tokens of [..., T, H]."""
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis=x.ndim - 2)


def _add_block(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """[..., T, H] with `part` added to a block of tokens."""
    new = _slice_block(total, start) + part
    return jax.lax.dynamic_update_slice_in_dim(total, new, start, axis=total.ndim - 2)


def _scores(
    q_KGbH: jax.Array,
    k_KbH: jax.Array,
    block: _QueryBlock,
    key_start: jax.Array,
    visible: _Visible,
    cap: float | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of a block of queries against a block of keys.

    Returns:
        float32 [K, G, q, k] scores, MASK_VALUE where not allowed; and the derivative of the
        soft-capped scores by the uncapped ones, None where it is 1.
    """
    index_1k = (key_start + jnp.arange(BLOCK, dtype=jnp.int32))[None, :]
    allowed_qk = (index_1k >= block.k_start_b[:, None]) & (index_1k < block.k_end_b[:, None])
    positions_T, key_positions_S = visible.positions_T, visible.key_positions_S
    if positions_T is not None and key_positions_S is not None and visible.window is not None:
        q_positions = jax.lax.dynamic_slice_in_dim(positions_T, block.start, BLOCK)
        k_positions = jax.lax.dynamic_slice_in_dim(key_positions_S, key_start, BLOCK)
        allowed_qk &= q_positions[:, None] - k_positions[None, :] < visible.window
    scores_KGqk = einsum("KGqH,KkH->KGqk", q_KGbH, k_KbH)
    scores_KGqk = soft_cap(scores_KGqk, cap)
    masked_KGqk = jnp.where(allowed_qk[None, None], scores_KGqk, MASK_VALUE)
    return masked_KGqk, soft_cap_slope(scores_KGqk, cap)


# A custom gradient because autodiff of the loop over blocks would save every block's scores.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_sequence(
    cap: float | None,
    q_KGTH: jax.Array,
    k_KSH: jax.Array,
    v_KSH: jax.Array,
    visible: _Visible,
    sinks_KG: jax.Array | None,
) -> jax.Array:
    """Attention of one packed sequence; the queries are scaled already. float32 [K, G, T, H]."""
    return _attend_sequence_fwd(cap, q_KGTH, k_KSH, v_KSH, visible, sinks_KG)[0]


def _attend_sequence_fwd(
    cap: float | None,
    q_KGTH: jax.Array,
    k_KSH: jax.Array,
    v_KSH: jax.Array,
    visible: _Visible,
    sinks_KG: jax.Array | None,
) -> tuple:
    K, G, T, H = q_KGTH.shape
    shape = (K, G, BLOCK)
    if sinks_KG is None:
        max_KGb = jnp.full(shape, MASK_VALUE, jnp.float32)
        total_KGb = jnp.zeros(shape, jnp.float32)
    else:
        # A sink is a key with value 0 that was visited first: exp(sink - max) = 1.
        max_KGb = jnp.broadcast_to(sinks_KG[..., None], shape)
        total_KGb = jnp.ones(shape, jnp.float32)

    def query_block(carry: tuple, index: jax.Array) -> tuple:
        out_KGTH, lse_KGT = carry
        block = _query_block(index, visible)
        q_KGbH = _slice_block(q_KGTH, block.start)

        def key_block(j: jax.Array, running: tuple) -> tuple:
            old_max, total, out = running
            k_KbH = _slice_block(k_KSH, j * BLOCK)
            scores, _ = _scores(q_KGbH, k_KbH, block, j * BLOCK, visible, cap)
            new_max = jnp.maximum(old_max, scores.max(-1))
            weights = jnp.exp(scores - new_max[..., None])
            rescale = jnp.exp(old_max - new_max)
            new = einsum(
                "KGqk,KkH->KGqH", weights.astype(v_KSH.dtype), _slice_block(v_KSH, j * BLOCK)
            )
            return new_max, total * rescale + weights.sum(-1), out * rescale[..., None] + new

        start = (max_KGb, total_KGb, jnp.zeros((*shape, H), jnp.float32))
        last_max, total, out = jax.lax.fori_loop(
            block.first_key_block, block.end_key_block, key_block, start
        )
        out_KGTH = jax.lax.dynamic_update_slice_in_dim(
            out_KGTH, out / total[..., None], block.start, axis=2
        )
        lse_KGT = jax.lax.dynamic_update_slice_in_dim(
            lse_KGT, last_max + jnp.log(total), block.start, axis=2
        )
        return (out_KGTH, lse_KGT), None

    empty = (jnp.zeros((K, G, T, H), jnp.float32), jnp.zeros((K, G, T), jnp.float32))
    block_indices = jnp.arange(T // BLOCK, dtype=jnp.int32)
    (out_KGTH, lse_KGT), _ = jax.lax.scan(query_block, empty, block_indices)
    # Named, so that remat (forward.REMAT) keeps both and the backward pass need not repeat this.
    out_KGTH = checkpoint_name(out_KGTH, "attention")
    lse_KGT = checkpoint_name(lse_KGT, "attention")
    return out_KGTH, (q_KGTH, k_KSH, v_KSH, visible, sinks_KG, out_KGTH, lse_KGT)


def _attend_sequence_bwd(cap: float | None, saved: tuple, d_out_KGTH: jax.Array) -> tuple:
    q_KGTH, k_KSH, v_KSH, visible, sinks_KG, out_KGTH, lse_KGT = saved
    dtype = q_KGTH.dtype
    delta_KGT = (d_out_KGTH * out_KGTH).sum(-1)  # sum_k p_k dp_k, D in FlashAttention (alg. 4)
    d_sinks_KG = None
    if sinks_KG is not None:
        sink_weights_KGT = jnp.exp(sinks_KG[..., None] - lse_KGT)
        d_sinks_KG = -(sink_weights_KGT * delta_KGT).sum(-1)
    d_out_KGTH = d_out_KGTH.astype(dtype)

    def query_block(carry: tuple, index: jax.Array) -> tuple:
        d_q_KGTH, d_k_KSH, d_v_KSH = carry
        block = _query_block(index, visible)
        q, d_out = _slice_block(q_KGTH, block.start), _slice_block(d_out_KGTH, block.start)
        lse = jax.lax.dynamic_slice_in_dim(lse_KGT, block.start, BLOCK, axis=2)[..., None]
        delta = jax.lax.dynamic_slice_in_dim(delta_KGT, block.start, BLOCK, axis=2)[..., None]

        def key_block(j: jax.Array, running: tuple) -> tuple:
            d_q, d_k_KSH, d_v_KSH = running
            k, v = _slice_block(k_KSH, j * BLOCK), _slice_block(v_KSH, j * BLOCK)
            scores, slope = _scores(q, k, block, j * BLOCK, visible, cap)
            weights = jnp.exp(scores - lse)
            d_weights = einsum("KGqH,KkH->KGqk", d_out, v)
            d_scores = weights * (d_weights - delta)
            if slope is not None:
                d_scores = d_scores * slope
            d_scores = d_scores.astype(dtype)
            d_v = einsum("KGqk,KGqH->KkH", weights.astype(dtype), d_out)
            d_k = einsum("KGqk,KGqH->KkH", d_scores, q)
            d_q += einsum("KGqk,KkH->KGqH", d_scores, k)
            return d_q, _add_block(d_k_KSH, d_k, j * BLOCK), _add_block(d_v_KSH, d_v, j * BLOCK)

        start = (jnp.zeros(q.shape, jnp.float32), d_k_KSH, d_v_KSH)
        d_q, d_k_KSH, d_v_KSH = jax.lax.fori_loop(
            block.first_key_block, block.end_key_block, key_block, start
        )
        d_q_KGTH = jax.lax.dynamic_update_slice_in_dim(d_q_KGTH, d_q, block.start, axis=2)
        return (d_q_KGTH, d_k_KSH, d_v_KSH), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_KGTH, k_KSH, v_KSH))
    block_indices = jnp.arange(q_KGTH.shape[2] // BLOCK, dtype=jnp.int32)
    (d_q, d_k, d_v), _ = jax.lax.scan(query_block, zeros, block_indices)
    # None: `visible` is integers and has no gradient.
    return d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype), None, d_sinks_KG


_attend_sequence.defvjp(_attend_sequence_fwd, _attend_sequence_bwd)
