"""Interval attention: each slot attends to one run of slots, [k_start, k_end); no mask array exists.

Packed rows are laid out so that one interval per slot says everything (see data/packing.py). Several implementations of
one function, equal in value and gradient: `dense` for tests and tiny rows, `blocks` for training. One new token against a
cache of keys is `attend_to_cache`.

Dimension names: B rows, T slots, S slots of a cache, N query heads, K key-value heads, G = N / K, H head dim, b slots of a block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.distributed.sharding import on_each_device, slots_spec
from jaxdpo.models.attention_tpu import splash
from jaxdpo.models.matmul import soft_cap, soft_cap_slope

BLOCK = 64
MASKED = -1e30  # finite, so that a block without any allowed key gives exp(...) = 0 and not NaN


class Window(NamedTuple):
    """A sliding window: a token sees tokens less than `size` positions before it."""

    size: jax.Array
    """int32 scalar, which may differ between layers; beyond all positions for a layer without a window."""
    positions_BT: jax.Array
    """int32. Slots of a packed row are not in order of position, so the slots' distance does not tell."""
    key_positions_BS: jax.Array | None = None
    """int32: those of the keys, where the keys are of more slots than the queries."""

    @property
    def of_keys(self) -> jax.Array:
        """int32 [B, S]: positions of the keys."""
        return self.positions_BT if self.key_positions_BS is None else self.key_positions_BS


class Inputs(NamedTuple):
    """What an implementation takes, as `attention` describes it."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    k_start_BT: jax.Array
    k_end_BT: jax.Array
    window: Window | None
    sinks_N: jax.Array | None


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    *,
    implementation: str,
    scale: float,
    cap: float | None = None,
    window: Window | None = None,
    sinks_N: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v over each slot's interval of keys.

    Args:
        q_BTNH, k_BTKH, v_BTKH: float; products take these types, sums and softmax are float32.
        k_start_BT, k_end_BT: int32; slot t attends to the slots k_start <= s < k_end, at least itself.
        implementation: a key of IMPLEMENTATIONS.
        scale: factor of the scores.
        cap: scores become cap * tanh(score / cap).
        window: cuts the intervals further.
        sinks_N: float32 score of one more key with value 0, by head (2309.17453, as gpt-oss learns it).
        mesh: rows are spread over ROWS, slots over context, heads over tensor. Intervals are in slots of the whole row.

    Returns:
        float32 [B, T, N, H].
    """
    if (
        window is not None
    ):  # a slot that looks back sees slots in order of position, so blocks before its window can be skipped
        slots = jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)[None, :]
        k_start_BT = jnp.maximum(k_start_BT, slots - window.size + 1)
    attend = functools.partial(IMPLEMENTATIONS[implementation], scale, cap)
    inputs = Inputs(q_BTNH, k_BTKH, v_BTKH, k_start_BT, k_end_BT, window, sinks_N)
    if mesh is None or mesh.size == 1:
        return attend(inputs)
    slots = slots_spec(mesh, q_BTNH.shape[1])
    heads = PartitionSpec(*slots, "tensor", None)
    windows = (
        None
        if window is None
        else jax.tree.map(lambda x: slots if x.ndim else PartitionSpec(), window)
    )
    where: Any = (
        heads,
        heads,
        heads,
        slots,
        slots,
        windows,
        None if sinks_N is None else PartitionSpec("tensor"),
    )
    here = attend if slots[1] is None else functools.partial(_to_whole_rows, attend, slots[1])
    return on_each_device(here, mesh, (Inputs(*where),), heads)(inputs)


def _to_whole_rows(attend: Callable[[Inputs], jax.Array], axis: str, inputs: Inputs) -> jax.Array:
    """On one device of the mesh axis that shares slots: its queries attend to the keys of all. Backward, each key's gradients are added
    up where it lives. Keys and values travel because they have the fewer heads."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
    window = (
        None
        if inputs.window is None
        else inputs.window._replace(key_positions_BS=gather(inputs.window.positions_BT))
    )
    return attend(
        inputs._replace(k_BTKH=gather(inputs.k_BTKH), v_BTKH=gather(inputs.v_BTKH), window=window)
    )


def dense(scale: float, cap: float | None, inputs: Inputs) -> jax.Array:
    """The reference: all T x S scores, then masked."""
    q_BTNH, k_BTKH, v_BTKH, k_start_BT, k_end_BT, window, sinks_N = inputs
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = soft_cap(
        jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32)
        * scale,
        cap,
    )
    slots = jnp.arange(k_BTKH.shape[1], dtype=jnp.int32)[None, None, :]
    allowed = (slots >= k_start_BT[..., None]) & (slots < k_end_BT[..., None])
    if window is not None:
        allowed &= window.positions_BT[:, :, None] - window.of_keys[:, None, :] < window.size
    weights = _softmax(jnp.where(allowed[:, None, None], scores, MASKED), sinks_N)
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        weights.astype(v_BTKH.dtype),
        v_BTKH,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(B, T, N, H)


def _softmax(scores_BKGTS: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
    """Softmax over the keys and, where there is one, the sink, whose own weight is left out."""
    if sinks_N is None:
        return jax.nn.softmax(scores_BKGTS, axis=-1)
    B, K, G, T, _ = scores_BKGTS.shape
    sinks = jnp.broadcast_to(sinks_N.reshape(1, K, G, 1, 1), (B, K, G, T, 1))
    return jax.nn.softmax(jnp.concatenate([scores_BKGTS, sinks], axis=-1), axis=-1)[..., :-1]


def attend_to_cache(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    allowed_BS: jax.Array,
    *,
    scale: float,
    cap: float | None,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """One token's attention to the slots of a cache that `allowed_BS` (bool) names: float32 [B, N, H]."""
    B, N, H = q_BNH.shape
    K = k_BKSH.shape[1]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    scores_BKGS = soft_cap(
        jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32) * scale,
        cap,
    )
    scores_BKGS = jnp.where(allowed_BS[:, None, None], scores_BKGS, MASKED)
    weights_BKGS = _softmax(scores_BKGS[:, :, :, None], sinks_N)[:, :, :, 0].astype(v_BKSH.dtype)
    return jnp.einsum(
        "BKGS,BKSH->BKGH", weights_BKGS, v_BKSH, preferred_element_type=jnp.float32
    ).reshape(B, N, H)


def blocks(scale: float, cap: float | None, inputs: Inputs) -> jax.Array:
    """Block by block with a running softmax, visiting only blocks that hold an allowed key.

    Online softmax: Milakov and Gimelshein 1805.02867; blocks and recomputed backward: FlashAttention 2205.14135.
    """
    q_BTNH, k_BTKH, v_BTKH, k_start_BT, k_end_BT, window, sinks_N = inputs
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q, k, v = (_whole_blocks(x) for x in (q_BTNH, k_BTKH, v_BTKH))
    keys = _Keys(
        _whole_blocks(
            k_start_BT, mode="edge"
        ),  # slots behind the last see what it sees, so no further block is visited
        _whole_blocks(k_end_BT, mode="edge"),
        None if window is None else _whole_blocks(window.positions_BT),
        None if window is None else _whole_blocks(window.of_keys),
        None if window is None else jnp.broadcast_to(window.size, (B,)),
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype).reshape(B, -1, K, N // K, H)
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, N // K)
    row = functools.partial(jax.lax.map, lambda args: _attend_row(cap, *args, sinks_KG))
    out = row((q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), keys))
    return out.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)[:, :T]


def _whole_blocks(x_BT: jax.Array, mode: str = "constant") -> jax.Array:
    """[B, T, ...] with slots behind (zeros, or as the last) until blocks are whole."""
    return jnp.pad(
        x_BT, [(0, 0), (0, -x_BT.shape[1] % BLOCK)] + [(0, 0)] * (x_BT.ndim - 2), mode=mode
    )


def on_tpu(scale: float, cap: float | None, inputs: Inputs) -> jax.Array:
    """splash.splash. A window is in the intervals already, since every slot looks back (settle.check_attention sees to that)."""
    return splash(scale, cap, *inputs[:5], inputs.sinks_N)


IMPLEMENTATIONS = {"dense": dense, "blocks": blocks, "splash": on_tpu}


class _Keys(NamedTuple):
    """What each slot of a row may see; with a leading B outside the map over rows."""

    start_T: jax.Array
    end_T: jax.Array
    positions_T: jax.Array | None
    key_positions_S: jax.Array | None
    window: jax.Array | None


class _Block(NamedTuple):
    """One block of queries: its first slot, its intervals and the range of key blocks to visit."""

    start: jax.Array
    k_start_b: jax.Array
    k_end_b: jax.Array
    first: jax.Array
    last: jax.Array


def _query_block(index: jax.Array, keys: _Keys) -> _Block:
    start = index * BLOCK
    k_start_b = jax.lax.dynamic_slice_in_dim(keys.start_T, start, BLOCK)
    k_end_b = jax.lax.dynamic_slice_in_dim(keys.end_T, start, BLOCK)
    return _Block(
        start, k_start_b, k_end_b, k_start_b.min() // BLOCK, (k_end_b.max() + BLOCK - 1) // BLOCK
    )


def _cut(x: jax.Array, start: jax.Array) -> jax.Array:
    """A block of slots out of [..., T, H]."""
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis=x.ndim - 2)


def _scores(
    q_KGbH: jax.Array,
    k_KbH: jax.Array,
    block: _Block,
    key_start: jax.Array,
    keys: _Keys,
    cap: float | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of a block of queries against a block of keys, MASKED where they are not allowed: float32 [K, G, b, b].

    Also the derivative of the scores by the products, where it is not 1.
    """
    slots = (key_start + jnp.arange(BLOCK, dtype=jnp.int32))[None, :]
    allowed = (slots >= block.k_start_b[:, None]) & (slots < block.k_end_b[:, None])
    if (
        keys.positions_T is not None
        and keys.key_positions_S is not None
        and keys.window is not None
    ):
        q_positions = jax.lax.dynamic_slice_in_dim(keys.positions_T, block.start, BLOCK)
        k_positions = jax.lax.dynamic_slice_in_dim(keys.key_positions_S, key_start, BLOCK)
        allowed &= q_positions[:, None] - k_positions[None, :] < keys.window
    scores = soft_cap(
        jnp.einsum("KGqH,KkH->KGqk", q_KGbH, k_KbH, preferred_element_type=jnp.float32), cap
    )
    return jnp.where(allowed[None, None], scores, MASKED), soft_cap_slope(scores, cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_row(
    cap: float | None,
    q_KGTH: jax.Array,
    k_KTH: jax.Array,
    v_KTH: jax.Array,
    keys: _Keys,
    sinks_KG: jax.Array | None,
) -> jax.Array:
    return _attend_row_fwd(cap, q_KGTH, k_KTH, v_KTH, keys, sinks_KG)[0]


def _attend_row_fwd(
    cap: float | None,
    q_KGTH: jax.Array,
    k_KTH: jax.Array,
    v_KTH: jax.Array,
    keys: _Keys,
    sinks_KG: jax.Array | None,
) -> tuple:
    K, G, T, H = q_KGTH.shape
    shape = (K, G, BLOCK)
    if sinks_KG is None:
        top, total = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        top, total = jnp.broadcast_to(sinks_KG[..., None], shape), jnp.ones(shape, jnp.float32)

    def query_block(carry: tuple, index: jax.Array) -> tuple:
        out_KGTH, lse_KGT = carry
        block = _query_block(index, keys)
        q_KGbH = _cut(q_KGTH, block.start)

        def key_block(j: jax.Array, running: tuple) -> tuple:
            top, total, out = running
            scores, _ = _scores(q_KGbH, _cut(k_KTH, j * BLOCK), block, j * BLOCK, keys, cap)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            new = jnp.einsum(
                "KGqk,KkH->KGqH",
                weights.astype(v_KTH.dtype),
                _cut(v_KTH, j * BLOCK),
                preferred_element_type=jnp.float32,
            )
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + new

        start = (top, total, jnp.zeros((*shape, H), jnp.float32))
        last_top, last_total, out = jax.lax.fori_loop(block.first, block.last, key_block, start)
        out_KGTH = jax.lax.dynamic_update_slice_in_dim(
            out_KGTH, out / last_total[..., None], block.start, axis=2
        )
        lse_KGT = jax.lax.dynamic_update_slice_in_dim(
            lse_KGT, last_top + jnp.log(last_total), block.start, axis=2
        )
        return (out_KGTH, lse_KGT), None

    empty = (jnp.zeros((K, G, T, H), jnp.float32), jnp.zeros((K, G, T), jnp.float32))
    (out_KGTH, lse_KGT), _ = jax.lax.scan(
        query_block, empty, jnp.arange(T // BLOCK, dtype=jnp.int32)
    )
    out_KGTH, lse_KGT = (
        checkpoint_name(out_KGTH, "attention"),
        checkpoint_name(lse_KGT, "attention"),
    )
    return out_KGTH, (q_KGTH, k_KTH, v_KTH, keys, sinks_KG, out_KGTH, lse_KGT)


def _attend_row_bwd(cap: float | None, saved: tuple, d_out_KGTH: jax.Array) -> tuple:
    q_KGTH, k_KTH, v_KTH, keys, sinks_KG, out_KGTH, lse_KGT = saved
    dtype = q_KGTH.dtype
    overlap_KGT = (d_out_KGTH * out_KGTH).sum(-1)  # sum_k p_k dp_k, FlashAttention's D
    d_sinks_KG = (
        None
        if sinks_KG is None
        else -(jnp.exp(sinks_KG[..., None] - lse_KGT) * overlap_KGT).sum(-1)
    )
    d_out_KGTH = d_out_KGTH.astype(dtype)

    def query_block(carry: tuple, index: jax.Array) -> tuple:
        d_q_KGTH, d_k_KTH, d_v_KTH = carry
        block = _query_block(index, keys)
        q, d_out = _cut(q_KGTH, block.start), _cut(d_out_KGTH, block.start)
        lse, overlap = (
            jax.lax.dynamic_slice_in_dim(x, block.start, BLOCK, axis=2)[..., None]
            for x in (lse_KGT, overlap_KGT)
        )

        def key_block(j: jax.Array, running: tuple) -> tuple:
            d_q, d_k_KTH, d_v_KTH = running
            k, v = _cut(k_KTH, j * BLOCK), _cut(v_KTH, j * BLOCK)
            scores, slope = _scores(q, k, block, j * BLOCK, keys, cap)
            weights = jnp.exp(scores - lse)
            d_weights = jnp.einsum("KGqH,KkH->KGqk", d_out, v, preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - overlap)
            d_scores = (d_scores if slope is None else d_scores * slope).astype(dtype)
            d_v = jnp.einsum(
                "KGqk,KGqH->KkH", weights.astype(dtype), d_out, preferred_element_type=jnp.float32
            )
            d_k = jnp.einsum("KGqk,KGqH->KkH", d_scores, q, preferred_element_type=jnp.float32)
            d_q += jnp.einsum("KGqk,KkH->KGqH", d_scores, k, preferred_element_type=jnp.float32)
            return d_q, _add_block(d_k_KTH, d_k, j * BLOCK), _add_block(d_v_KTH, d_v, j * BLOCK)

        d_q = jnp.zeros(q.shape, jnp.float32)
        d_q, d_k_KTH, d_v_KTH = jax.lax.fori_loop(
            block.first, block.last, key_block, (d_q, d_k_KTH, d_v_KTH)
        )
        return (
            jax.lax.dynamic_update_slice_in_dim(d_q_KGTH, d_q, block.start, axis=2),
            d_k_KTH,
            d_v_KTH,
        ), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_KGTH, k_KTH, v_KTH))
    (d_q, d_k, d_v), _ = jax.lax.scan(
        query_block, zeros, jnp.arange(q_KGTH.shape[2] // BLOCK, dtype=jnp.int32)
    )
    return d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype), None, d_sinks_KG


def _add_block(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
        total, _cut(total, start) + part, start, axis=total.ndim - 2
    )


_attend_row.defvjp(_attend_row_fwd, _attend_row_bwd)
