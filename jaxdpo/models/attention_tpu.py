"""Interval attention on TPUs: JAX's splash attention kernel, told what each slot may see by intervals instead of a mask.

The kernel takes one number for each query from which a mask is computed where it is needed, and a table of the blocks that hold anything
to see. An interval [k_start, k_end) of slots fits into that number; the blocks that no interval of theirs touches are skipped.

Dimension names: B rows, T slots, N query heads, K key-value heads, H head dim; Q and S blocks of queries and keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

LANES = 128
BLOCKS = (512, 256, 128)
"""Slots of a block of queries or keys: the largest that divides the row, filled up to a multiple of LANES."""
LONGEST = 1 << 15
"""Slots of the longest row: two numbers up to it fit into an int32."""


def splash(
    scale: float,
    cap: float | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale * q k^T) v over each slot's interval of keys; see attention.attention.

    Args:
        interpret: compute what the kernel does on a CPU, slowly: for tests.

    Returns:
        float32 [B, T, N, H]. Sums are float32, the result is rounded to q's type.

    Raises:
        ValueError: a row is longer than an interval's number can hold.
    """
    T, H, S = q_BTNH.shape[1], q_BTNH.shape[3], k_BTKH.shape[1]
    if S >= LONGEST:
        raise ValueError(
            f"model.attention=splash: takes rows of less than {LONGEST} slots, not {S}. Use model.attention=blocks"
        )
    q, k, v = (_padded(x).transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH))
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    behind = ((0, 0), (0, -T % LANES))
    start_BT, end_BT = (
        jnp.pad(k_start_BT, behind, mode="edge"),
        jnp.pad(k_end_BT, behind, mode="edge"),
    )
    attend = functools.partial(_attend_row, cap, interpret, sinks_N)
    out = jax.lax.map(lambda row: attend(*row), (q, k, v, start_BT, end_BT))
    return out.transpose(0, 2, 1, 3)[:, :T, :, :H].astype(jnp.float32)


def _padded(x_BTNH: jax.Array) -> jax.Array:
    """Zeros behind the slots and the head's dimensions, up to multiples of LANES."""
    return jnp.pad(
        x_BTNH, ((0, 0), (0, -x_BTNH.shape[1] % LANES), (0, 0), (0, -x_BTNH.shape[3] % LANES))
    )


def _attend_row(
    cap: float | None,
    interpret: bool,
    sinks_N: jax.Array | None,
    q_NTH: jax.Array,
    k_KTH: jax.Array,
    v_KTH: jax.Array,
    start_T: jax.Array,
    end_T: jax.Array,
) -> jax.Array:
    size = next(
        size for size in BLOCKS if q_NTH.shape[1] % size == 0 and k_KTH.shape[1] % size == 0
    )
    by_query, by_key = _tables(start_T, end_T, size, k_KTH.shape[1] // size)
    kernel = SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_kv_dkv_compute=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=-1e30,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name="attention",
        mask_function=_inside,
        interpret=interpret,
    )
    out: Any = kernel(q_NTH, k_KTH, v_KTH, sinks=sinks_N)
    return out


def _inside(interval: jax.Array, slot: jax.Array) -> jax.Array:
    """Whether a slot lies in a query's interval, which is k_start in the high bits and k_end in the low ones."""
    return (slot >= interval >> 16) & (slot < (interval & 0xFFFF))


def _tables(
    start_T: jax.Array, end_T: jax.Array, size: int, num_keys: int
) -> tuple[MaskInfo, MaskInfo]:
    """The blocks to visit, for a kernel that goes through the keys of each block of queries, and for one that goes the other way.

    `data_next` says which block is to be loaded: the visited one itself, and for one that is skipped a neighbour that will be visited.
    """
    first_Q1 = (start_T.reshape(-1, size).min(axis=1) // size)[:, None]
    last_Q1 = ((end_T.reshape(-1, size).max(axis=1) - 1) // size)[:, None]
    keys_1S = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    queries_Q1 = jnp.arange(start_T.shape[0] // size, dtype=jnp.int32)[:, None]
    visited_QS = (keys_1S >= first_Q1) & (keys_1S <= last_Q1)
    intervals_T = (start_T << 16) | end_T

    def table(next_QS: jax.Array) -> MaskInfo:
        return MaskInfo(next_QS[None], None, visited_QS.astype(jnp.int32)[None], None, intervals_T)  # type: ignore[arg-type]

    none = queries_Q1.shape[0]
    following_QS = jax.lax.cummin(jnp.where(visited_QS, queries_Q1, none), axis=0, reverse=True)
    before_QS = jax.lax.cummax(jnp.where(visited_QS, queries_Q1, 0), axis=0)
    return table(jnp.clip(keys_1S, first_Q1, last_Q1)), table(
        jnp.where(following_QS < none, following_QS, before_QS)
    )
