"""Interval attention: token t of a packed sequence attends to the tokens [k_start, k_end).

Packing lays tokens out so that one interval per token says everything (data/packing.py), so no
mask array exists. The implementations are equal in value and gradient: `dense` (the reference),
`blocks` (CPU, attention_blocks.py), `splash` (TPU, attention_tpu.py).

Not jax.nn.dot_product_attention because it takes a mask array and outside of cuDNN keeps all
scores: its gradient needs 1,552 MiB of temporaries where `blocks` needs 41 MiB (compiled for CPU,
one sequence of 4,096 tokens, 8 heads of 64, float32). It also has no logit soft-capping and no
attention sinks.

Shape suffixes: B packed sequences, T token positions, S token positions of the keys, N query
heads, K kv heads, G = N / K query heads of one kv head, H head dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.distributed.sharding import activation_spec, on_each_device
from jaxdpo.models.attention_blocks import blocks
from jaxdpo.models.attention_inputs import MASK_VALUE, Inputs, Window
from jaxdpo.models.attention_tpu import splash
from jaxdpo.models.matmul import einsum, soft_cap


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
    """softmax(scale * q k^T) v over each token's interval of keys (grouped-query, 2305.13245).

    Args:
        q_BTNH, k_BTKH, v_BTKH: float; matmul inputs keep this dtype, sums and softmax are float32.
        k_start_BT, k_end_BT: int32; token t attends to the tokens k_start <= s < k_end, counted
            from the start of the packed sequence; at least to itself.
        implementation: a key of IMPLEMENTATIONS.
        scale: factor of the scores.
        cap: logit soft-capping: scores become cap * tanh(score / cap).
        window: sliding window, which cuts the intervals further.
        sinks_N: float32 attention sinks: by head, the score of one more key whose value is 0
            (2309.17453; gpt-oss learns it).
        mesh: sequences are sharded over ROWS, tokens over `context`, heads over `tensor`.

    Returns:
        float32 [B, T, N, H].
    """
    if window is not None:
        # Where a token looks back, it sees tokens in the order of their positions, so its interval
        # can begin at the window: the blocks before it are skipped.
        index_1T = jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)[None, :]
        k_start_BT = jnp.maximum(k_start_BT, index_1T - window.size + 1)
    attend = functools.partial(IMPLEMENTATIONS[implementation], scale, cap)
    inputs = Inputs(q_BTNH, k_BTKH, v_BTKH, k_start_BT, k_end_BT, window, sinks_N)
    if mesh is None or mesh.size == 1:
        return attend(inputs)

    tokens = activation_spec(mesh, q_BTNH.shape[1])
    heads: Any = PartitionSpec(*tokens, "tensor", None)
    window_specs: Any = None
    if window is not None:
        # All of a Window's arrays are [B, T] but for its size, a scalar.
        window_specs = jax.tree.map(lambda x: tokens if x.ndim else PartitionSpec(), window)
    sink_spec: Any = None if sinks_N is None else PartitionSpec("tensor")
    intervals: Any = tokens
    specs = Inputs(heads, heads, heads, intervals, intervals, window_specs, sink_spec)
    context_axis = tokens[1]
    if context_axis is not None:
        attend = functools.partial(_gather_keys_and_attend, attend, context_axis)
    return on_each_device(attend, mesh, (specs,), heads)(inputs)


def _gather_keys_and_attend(
    attend: Callable[[Inputs], jax.Array], axis: str, inputs: Inputs
) -> jax.Array:
    """Context parallelism, on one device: its queries attend to the keys of the full sequence.

    Keys and values are gathered, not queries, because under grouped-query attention they have the
    fewer heads. In the backward pass the gather's transpose sums each key's gradients where it is.
    """
    gather = functools.partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
    window = inputs.window
    if window is not None:
        window = window._replace(key_positions_BS=gather(window.positions_BT))
    k_BSKH, v_BSKH = gather(inputs.k_BTKH), gather(inputs.v_BTKH)
    return attend(inputs._replace(k_BTKH=k_BSKH, v_BTKH=v_BSKH, window=window))


def dense(scale: float, cap: float | None, inputs: Inputs) -> jax.Array:
    """The reference implementation: all T x S scores, then the mask."""
    q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, window, sinks_N = inputs
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    scores_BKGTS = soft_cap(scores_BKGTS * scale, cap)
    index_11S = jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)[None, None, :]
    allowed_BTS = (index_11S >= k_start_BT[..., None]) & (index_11S < k_end_BT[..., None])
    if window is not None:
        q_positions_BT1 = window.positions_BT[:, :, None]
        k_positions_B1S = window.positions_of_keys_BS[:, None, :]
        allowed_BTS &= q_positions_BT1 - k_positions_B1S < window.size
    weights_BKGTS = _softmax(
        jnp.where(allowed_BTS[:, None, None], scores_BKGTS, MASK_VALUE), sinks_N
    )
    out_BTKGH = einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


def _softmax(scores_BKGTS: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
    """Softmax over the keys and the attention sink, if any; the sink's weight is dropped."""
    if sinks_N is None:
        return jax.nn.softmax(scores_BKGTS, axis=-1)
    B, K, G, T, _ = scores_BKGTS.shape
    sinks_BKGT1 = jnp.broadcast_to(sinks_N.reshape(1, K, G, 1, 1), (B, K, G, T, 1))
    with_sink = jnp.concatenate([scores_BKGTS, sinks_BKGT1], axis=-1)
    return jax.nn.softmax(with_sink, axis=-1)[..., :-1]


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
    """Attention of one new token per sequence to a KV cache.

    Args:
        allowed_BS: bool, the entries of the cache that the token sees.

    Returns:
        float32 [B, N, H].
    """
    B, N, H = q_BNH.shape
    K = k_BKSH.shape[1]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    scores_BKGS = einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH)
    scores_BKGS = soft_cap(scores_BKGS * scale, cap)
    scores_BKGS = jnp.where(allowed_BS[:, None, None], scores_BKGS, MASK_VALUE)
    weights_BKGS = _softmax(scores_BKGS[:, :, :, None], sinks_N)[:, :, :, 0].astype(v_BKSH.dtype)
    out_BKGH = einsum("BKGS,BKSH->BKGH", weights_BKGS, v_BKSH)
    return out_BKGH.reshape(B, N, H)


def on_tpu(scale: float, cap: float | None, inputs: Inputs) -> jax.Array:
    """attention_tpu.splash, without `inputs.window`.

    Every token looks back there (training.resolve rejects splash otherwise), and then `attention`
    has already cut the intervals to the window.
    """
    return splash(scale, cap, *inputs[:5], inputs.sinks_N)


IMPLEMENTATIONS = {"dense": dense, "blocks": blocks, "splash": on_tpu}
"""Values of model.attention, except `auto`."""
