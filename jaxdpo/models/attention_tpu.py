"""Interval attention on TPUs: JAX's splash attention kernel with intervals instead of a mask.

The kernel takes one int32 per query, from which it computes the mask block by block, and a table
of the blocks to visit. An interval [k_start, k_end) of tokens fits into the int32; blocks that no
interval touches are skipped.

Not the kernel's own masks because those of splash_attention_mask are fixed when the program is
traced, and its dynamic mask is an array of heads x tokens x tokens; here the intervals change with
every batch.

Shape suffixes: B packed sequences, T token positions, N query heads, K kv heads, H head dim;
Q blocks of queries, S blocks of keys.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from jaxdpo.models.attention_inputs import MASK_VALUE
from jaxdpo.models.matmul import exact_products

LANES = 128
"""Lanes of a TPU's vector unit: the kernel takes multiples of it."""
BLOCKS = (512, 256, 128)
"""Tokens of a block of queries or keys: the largest of these that divides the padded sequence.

128 is the kernel's default and smallest; of larger ones, fewer are visited."""
MAX_LENGTH = 1 << 15
"""Tokens of a sequence must be fewer: two such numbers fit into an int32."""


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
    """softmax(scale * q k^T) v over each token's interval of keys; see attention.attention.

    Args:
        interpret: run the kernel in Pallas' interpreter on a CPU, slowly: for tests.

    Returns:
        float32 [B, T, N, H]. Accumulation is float32, the result is rounded to q's dtype.

    Raises:
        ValueError: a packed sequence has MAX_LENGTH tokens or more.
    """
    T, H, S = q_BTNH.shape[1], q_BTNH.shape[3], k_BTKH.shape[1]
    if S >= MAX_LENGTH:
        raise ValueError(
            f"model.attention=splash: takes packed sequences of less than {MAX_LENGTH} tokens, not "
            f"{S}. Use model.attention=blocks"
        )
    q, k, v = (_pad(x).transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH))
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    # Padding tokens see what the last token sees, so that they visit no further block.
    padding = ((0, 0), (0, -T % LANES))
    start_BT = jnp.pad(k_start_BT, padding, mode="edge")
    end_BT = jnp.pad(k_end_BT, padding, mode="edge")

    def attend(sequence: tuple) -> jax.Array:
        return _attend_sequence(cap, interpret, sinks_N, *sequence)

    with exact_products(q.dtype):
        out = jax.lax.map(attend, (q, k, v, start_BT, end_BT))
    return out.transpose(0, 2, 1, 3)[:, :T, :, :H].astype(jnp.float32)


def _pad(x_BTNH: jax.Array) -> jax.Array:
    """Zeros after the tokens and after the head's dimensions, up to multiples of LANES."""
    pad_T, pad_H = -x_BTNH.shape[1] % LANES, -x_BTNH.shape[3] % LANES
    return jnp.pad(x_BTNH, ((0, 0), (0, pad_T), (0, 0), (0, pad_H)))


def _attend_sequence(
    cap: float | None,
    interpret: bool,
    sinks_N: jax.Array | None,
    q_NTH: jax.Array,
    k_KTH: jax.Array,
    v_KTH: jax.Array,
    start_T: jax.Array,
    end_T: jax.Array,
) -> jax.Array:
    lengths = math.gcd(q_NTH.shape[1], k_KTH.shape[1])
    size = next(size for size in BLOCKS if lengths % size == 0)
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
        mask_value=MASK_VALUE,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name="attention",
        mask_function=_is_inside,
        interpret=interpret,
    )
    out: Any = kernel(q_NTH, k_KTH, v_KTH, sinks=sinks_N)
    return out


def _is_inside(interval: jax.Array, index: jax.Array) -> jax.Array:
    """Whether a key is in a query's interval: k_start in the high 16 bits, k_end in the low."""
    return (index >= interval >> 16) & (index < (interval & 0xFFFF))


def _tables(
    start_T: jax.Array, end_T: jax.Array, size: int, num_keys: int
) -> tuple[MaskInfo, MaskInfo]:
    """The blocks to visit, as the forward kernel and the backward kernel want them.

    The forward kernel iterates over the blocks of keys of each block of queries, the backward
    kernel of dk and dv the other way around. A table's `data_next` is the block to load: the one
    that is visited, and in place of one that is skipped a neighbour that will be, so that nothing
    is loaded that is not used.
    """
    first_Q1 = (start_T.reshape(-1, size).min(axis=1) // size)[:, None]
    last_Q1 = ((end_T.reshape(-1, size).max(axis=1) - 1) // size)[:, None]
    keys_1S = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    queries_Q1 = jnp.arange(start_T.shape[0] // size, dtype=jnp.int32)[:, None]
    visited_QS = (keys_1S >= first_Q1) & (keys_1S <= last_Q1)
    intervals_T = (start_T << 16) | end_T

    def table(next_QS: jax.Array) -> MaskInfo:
        arrays: Any = (next_QS[None], None, visited_QS.astype(jnp.int32)[None], None, intervals_T)
        return MaskInfo(*arrays)

    num_queries = queries_Q1.shape[0]  # as a block number: none
    following_QS = jnp.where(visited_QS, queries_Q1, num_queries)
    following_QS = jax.lax.cummin(following_QS, axis=0, reverse=True)
    previous_QS = jax.lax.cummax(jnp.where(visited_QS, queries_Q1, 0), axis=0)
    by_query = table(jnp.clip(keys_1S, first_Q1, last_Q1))
    return by_query, table(jnp.where(following_QS < num_queries, following_QS, previous_QS))
