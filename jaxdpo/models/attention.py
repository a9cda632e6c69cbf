"""Interval attention: each slot attends to one run of slots, [k_start, k_end); no mask array exists.

Packed rows are laid out so that one interval per slot says everything (see data/packing.py). Several implementations of
one function, equal in value and gradient: `dense` for tests and tiny rows, `blocks` for training.

Dimension names: B rows, T slots, N query heads, K key-value heads, G = N / K, H head dim, b slots of a block, n blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.sharding import ROWS

BLOCK = 64
MASKED = -1e30  # finite, so that a block without any allowed key gives exp(...) = 0 and not NaN


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    *,
    implementation: str,
    mesh: Mesh | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over each slot's interval of keys.

    Args:
        q_BTNH, k_BTKH, v_BTKH: float; products take these types, sums and softmax are float32.
        k_start_BT, k_end_BT: int32; slot t attends to the slots k_start <= s < k_end, at least one.
        implementation: a key of IMPLEMENTATIONS.
        mesh: rows are spread over data and fsdp, heads over tensor.

    Returns:
        float32 [B, T, N, H].
    """
    attend = IMPLEMENTATIONS[implementation]
    if mesh is None or mesh.size == 1:
        return attend(q_BTNH, k_BTKH, v_BTKH, k_start_BT, k_end_BT)
    heads, slots = PartitionSpec(ROWS, None, "tensor", None), PartitionSpec(ROWS, None)
    local = jax.shard_map(attend, mesh=mesh, in_specs=(heads, heads, heads, slots, slots), out_specs=heads, check_vma=False)
    return local(q_BTNH, k_BTKH, v_BTKH, k_start_BT, k_end_BT)


def dense(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, k_start_BT: jax.Array, k_end_BT: jax.Array) -> jax.Array:
    """The reference: all T x T scores, then masked."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32) * H**-0.5
    slots = jnp.arange(T, dtype=jnp.int32)[None, None, :]
    allowed = (slots >= k_start_BT[..., None]) & (slots < k_end_BT[..., None])
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BTKH.dtype), v_BTKH, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H)


def blocks(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, k_start_BT: jax.Array, k_end_BT: jax.Array) -> jax.Array:
    """Block by block with a running softmax, visiting only blocks that hold an allowed key.

    Online softmax: Milakov and Gimelshein 1805.02867; blocks and recomputed backward: FlashAttention 2205.14135.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    pad = -T % BLOCK
    slots = ((0, 0), (0, pad))
    k_start_BT, k_end_BT = jnp.pad(k_start_BT, slots), jnp.pad(k_end_BT, slots, constant_values=1)
    q, k, v = (jnp.pad(x, (*slots, (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype).reshape(B, T + pad, K, N // K, H)
    row = functools.partial(jax.lax.map, lambda args: _attend_row(*args))
    out = row((q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), k_start_BT, k_end_BT))
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T + pad, N, H)[:, :T]


IMPLEMENTATIONS = {"dense": dense, "blocks": blocks}


class _Block(NamedTuple):
    """One block of queries: its first slot, its intervals and the range of key blocks to visit."""

    start: jax.Array
    k_start_b: jax.Array
    k_end_b: jax.Array
    first: jax.Array
    last: jax.Array


def _query_block(index: jax.Array, k_start_T: jax.Array, k_end_T: jax.Array) -> _Block:
    start = index * BLOCK
    k_start_b = jax.lax.dynamic_slice_in_dim(k_start_T, start, BLOCK)
    k_end_b = jax.lax.dynamic_slice_in_dim(k_end_T, start, BLOCK)
    return _Block(start, k_start_b, k_end_b, k_start_b.min() // BLOCK, (k_end_b.max() + BLOCK - 1) // BLOCK)


def _cut(x: jax.Array, start: jax.Array) -> jax.Array:
    """A block of slots out of [..., T, H]."""
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis=x.ndim - 2)


def _scores(q_KGbH: jax.Array, k_KbH: jax.Array, block: _Block, key_start: jax.Array) -> jax.Array:
    """Scores of a block of queries against a block of keys, MASKED outside the intervals: float32 [K, G, b, b]."""
    keys = (key_start + jnp.arange(BLOCK, dtype=jnp.int32))[None, :]
    allowed = (keys >= block.k_start_b[:, None]) & (keys < block.k_end_b[:, None])
    scores = jnp.einsum("KGqH,KkH->KGqk", q_KGbH, k_KbH, preferred_element_type=jnp.float32)
    return jnp.where(allowed[None, None], scores, MASKED)


@jax.custom_vjp
def _attend_row(q_KGTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, k_start_T: jax.Array, k_end_T: jax.Array) -> jax.Array:
    return _attend_row_fwd(q_KGTH, k_KTH, v_KTH, k_start_T, k_end_T)[0]


def _attend_row_fwd(q_KGTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, k_start_T: jax.Array, k_end_T: jax.Array) -> tuple:
    K, G, T, H = q_KGTH.shape

    def query_block(carry: tuple, index: jax.Array) -> tuple:
        out_KGTH, lse_KGT = carry
        block = _query_block(index, k_start_T, k_end_T)
        q_KGbH = _cut(q_KGTH, block.start)

        def key_block(j: jax.Array, running: tuple) -> tuple:
            top, total, out = running
            scores = _scores(q_KGbH, _cut(k_KTH, j * BLOCK), block, j * BLOCK)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            new = jnp.einsum("KGqk,KkH->KGqH", weights.astype(v_KTH.dtype), _cut(v_KTH, j * BLOCK), preferred_element_type=jnp.float32)
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + new

        shape = (K, G, BLOCK)
        start = (jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, H), jnp.float32))
        top, total, out = jax.lax.fori_loop(block.first, block.last, key_block, start)
        out_KGTH = jax.lax.dynamic_update_slice_in_dim(out_KGTH, out / total[..., None], block.start, axis=2)
        lse_KGT = jax.lax.dynamic_update_slice_in_dim(lse_KGT, top + jnp.log(total), block.start, axis=2)
        return (out_KGTH, lse_KGT), None

    empty = (jnp.zeros((K, G, T, H), jnp.float32), jnp.zeros((K, G, T), jnp.float32))
    (out_KGTH, lse_KGT), _ = jax.lax.scan(query_block, empty, jnp.arange(T // BLOCK, dtype=jnp.int32))
    out_KGTH, lse_KGT = checkpoint_name(out_KGTH, "attention"), checkpoint_name(lse_KGT, "attention")
    return out_KGTH, (q_KGTH, k_KTH, v_KTH, k_start_T, k_end_T, out_KGTH, lse_KGT)


def _attend_row_bwd(saved: tuple, d_out_KGTH: jax.Array) -> tuple:
    q_KGTH, k_KTH, v_KTH, k_start_T, k_end_T, out_KGTH, lse_KGT = saved
    dtype = q_KGTH.dtype
    overlap_KGT = (d_out_KGTH * out_KGTH).sum(-1)  # sum_k p_k dp_k, FlashAttention's D
    d_out_KGTH = d_out_KGTH.astype(dtype)

    def query_block(carry: tuple, index: jax.Array) -> tuple:
        d_q_KGTH, d_k_KTH, d_v_KTH = carry
        block = _query_block(index, k_start_T, k_end_T)
        q, d_out = _cut(q_KGTH, block.start), _cut(d_out_KGTH, block.start)
        lse, overlap = (jax.lax.dynamic_slice_in_dim(x, block.start, BLOCK, axis=2)[..., None] for x in (lse_KGT, overlap_KGT))

        def key_block(j: jax.Array, running: tuple) -> tuple:
            d_q, d_k_KTH, d_v_KTH = running
            k, v = _cut(k_KTH, j * BLOCK), _cut(v_KTH, j * BLOCK)
            weights = jnp.exp(_scores(q, k, block, j * BLOCK) - lse)
            d_weights = jnp.einsum("KGqH,KkH->KGqk", d_out, v, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - overlap)).astype(dtype)
            d_v = jnp.einsum("KGqk,KGqH->KkH", weights.astype(dtype), d_out, preferred_element_type=jnp.float32)
            d_k = jnp.einsum("KGqk,KGqH->KkH", d_scores, q, preferred_element_type=jnp.float32)
            d_q += jnp.einsum("KGqk,KkH->KGqH", d_scores, k, preferred_element_type=jnp.float32)
            return d_q, _add_block(d_k_KTH, d_k, j * BLOCK), _add_block(d_v_KTH, d_v, j * BLOCK)

        d_q = jnp.zeros(q.shape, jnp.float32)
        d_q, d_k_KTH, d_v_KTH = jax.lax.fori_loop(block.first, block.last, key_block, (d_q, d_k_KTH, d_v_KTH))
        return (jax.lax.dynamic_update_slice_in_dim(d_q_KGTH, d_q, block.start, axis=2), d_k_KTH, d_v_KTH), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_KGTH, k_KTH, v_KTH))
    (d_q, d_k, d_v), _ = jax.lax.scan(query_block, zeros, jnp.arange(q_KGTH.shape[2] // BLOCK, dtype=jnp.int32))
    return d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype), None, None


def _add_block(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(total, _cut(total, start) + part, start, axis=total.ndim - 2)


_attend_row.defvjp(_attend_row_fwd, _attend_row_bwd)
