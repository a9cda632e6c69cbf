"""Log-probabilities of answer tokens from hidden states, a chunk of tokens at a time.

Logits exist for one chunk only, in the forward and in the (recomputed) backward pass, and the number of chunks follows the
number of scored tokens of the batch at hand. Sums over the vocabulary are float32.

Dimension names: B rows, T slots, S scored tokens (multiple of the chunk), C tokens of a chunk, D model, V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdpo.products import soft_cap, soft_cap_slope, sum_of_outer_products

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


def num_chunks(sides_BS: jax.Array, chunk: int) -> jax.Array:
    """Chunks that hold a scored token in any row; int32 scalar. Scored tokens come first (see packing)."""
    return (jnp.max(jnp.sum(sides_BS >= 0, axis=1)).astype(jnp.int32) + chunk - 1) // chunk


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def token_logps(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    targets_BS: jax.Array,
    chunks: jax.Array,
    chunk: int,
    compute_dtype: jnp.dtype,
    cap: float | None = None,
) -> jax.Array:
    """log softmax(hidden head^T)[target] of each scored token.

    Args:
        hidden_BSD: float32 states that predict the tokens.
        head_VD: LM head, float.
        targets_BS: int32 token ids.
        chunks: int32 scalar, chunks to compute; the tokens behind them get 0.
        chunk: tokens of a chunk.
        compute_dtype: type of the products' inputs; sums are float32.
        cap: soft cap of the logits.

    Returns:
        float32 [B, S], nats. Differentiable in hidden_BSD and head_VD.
    """
    return _token_logps_fwd(hidden_BSD, head_VD, targets_BS, chunks, chunk, compute_dtype, cap)[0]


def _token_logps_fwd(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    targets_BS: jax.Array,
    chunks: jax.Array,
    chunk: int,
    compute_dtype: jnp.dtype,
    cap: float | None,
) -> tuple:
    head = head_VD.astype(compute_dtype)
    hidden_BSD = hidden_BSD.astype(compute_dtype)

    def measure(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = _logits(hidden_BSD, head, start, chunk, cap)
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        return _pick(logits_BCV, _cut(targets_BS, start, chunk)) - lse_BC, lse_BC

    logps_BS, lse_BS = _by_chunk(measure, 2, targets_BS.shape, chunks, chunk)
    return logps_BS, (hidden_BSD, head_VD, targets_BS, chunks, lse_BS)


def _token_logps_bwd(chunk: int, compute_dtype: jnp.dtype, cap: float | None, saved: tuple, d_logps_BS: jax.Array) -> tuple:
    hidden_BSD, head_VD, targets_BS, chunks, lse_BS = saved
    head = head_VD.astype(compute_dtype)

    def step(i: jax.Array, carry: tuple) -> tuple:
        d_hidden_BSD, d_head_DV = carry
        start = i * chunk
        logits_BCV = _logits(hidden_BSD, head, start, chunk, cap)
        hit_BCV = _hits(_cut(targets_BS, start, chunk), logits_BCV)
        probs_BCV = jnp.exp(logits_BCV - _cut(lse_BS, start, chunk)[..., None])
        d_logits_BCV = (hit_BCV.astype(jnp.float32) - probs_BCV) * _cut(d_logps_BS, start, chunk)[..., None]
        slope_BCV = soft_cap_slope(logits_BCV, cap)
        d_logits_BCV = (d_logits_BCV if slope_BCV is None else d_logits_BCV * slope_BCV).astype(compute_dtype)
        d_hidden = jnp.einsum("BCV,VD->BCD", d_logits_BCV, head, preferred_element_type=jnp.float32)
        hidden_BCD = _cut(hidden_BSD, start, chunk)
        V, D = head.shape
        d_head_DV += sum_of_outer_products(hidden_BCD.reshape(-1, D), d_logits_BCV.reshape(-1, V))
        return jax.lax.dynamic_update_slice_in_dim(d_hidden_BSD, d_hidden, start, axis=1), d_head_DV

    zeros = jnp.zeros(hidden_BSD.shape, jnp.float32), jnp.zeros(head_VD.shape[::-1], jnp.float32)
    d_hidden_BSD, d_head_DV = jax.lax.fori_loop(0, chunks, step, zeros)
    return d_hidden_BSD, d_head_DV.T.astype(head_VD.dtype), None, None


token_logps.defvjp(_token_logps_fwd, _token_logps_bwd)


def token_collisions(
    hidden_BSD: jax.Array, head_VD: jax.Array, chunks: jax.Array, chunk: int, compute_dtype: jnp.dtype, cap: float | None = None
) -> jax.Array:
    """log sum_v p(v)^2 of each scored token's distribution, as WPO weighs with (2406.11827 eq. 4); float32 [B, S]. Not differentiable."""
    hidden_BSD, head_VD = hidden_BSD.astype(compute_dtype), head_VD.astype(compute_dtype)

    def measure(start: jax.Array) -> tuple[jax.Array]:
        logits_BCV = _logits(hidden_BSD, head_VD, start, chunk, cap)
        return (jax.nn.logsumexp(2 * logits_BCV, axis=-1) - 2 * jax.nn.logsumexp(logits_BCV, axis=-1),)

    return _by_chunk(measure, 1, hidden_BSD.shape[:2], chunks, chunk)[0]


def token_kl(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    ref_hidden_BSD: jax.Array,
    ref_head_VD: jax.Array,
    chunks: jax.Array,
    chunk: int,
    compute_dtype: jnp.dtype,
    cap: float | None = None,
) -> jax.Array:
    """Exact KL(policy || reference) of each scored token's distribution, over the whole vocabulary.

    Returns:
        float32 [B, S], nats. Not differentiable.
    """
    hidden_BSD, head_VD = hidden_BSD.astype(compute_dtype), head_VD.astype(compute_dtype)
    ref_hidden_BSD, ref_head_VD = ref_hidden_BSD.astype(compute_dtype), ref_head_VD.astype(compute_dtype)

    def measure(start: jax.Array) -> tuple[jax.Array]:
        logps_BCV = jax.nn.log_softmax(_logits(hidden_BSD, head_VD, start, chunk, cap), axis=-1)
        ref_logps_BCV = jax.nn.log_softmax(_logits(ref_hidden_BSD, ref_head_VD, start, chunk, cap), axis=-1)
        return (jnp.sum(jnp.exp(logps_BCV) * (logps_BCV - ref_logps_BCV), axis=-1),)

    return _by_chunk(measure, 1, hidden_BSD.shape[:2], chunks, chunk)[0]


def sum_by_side(values_BS: jax.Array, sides_BS: jax.Array, num_places: int) -> jax.Array:
    """Sums over each side's tokens: float32 [B, P, 2] (chosen, rejected). Tokens of side -1 count nowhere.

    A product with a one-hot matrix: the same sums in the same order on every device, where a scatter may not be.
    """
    owner = jax.nn.one_hot(sides_BS, 2 * num_places, dtype=jnp.float32)
    sums = jnp.einsum("BS,BSQ->BQ", values_BS, owner, precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(values_BS.shape[0], num_places, 2)


def _by_chunk(measure: Callable[[jax.Array], tuple], count: int, shape: tuple[int, ...], chunks: jax.Array, chunk: int) -> tuple:
    """`count` float32 [B, S] arrays, filled a chunk at a time by `measure`, which takes a chunk's first token."""

    def step(i: jax.Array, arrays: tuple) -> tuple:
        parts = measure(i * chunk)
        return tuple(jax.lax.dynamic_update_slice_in_dim(array, part, i * chunk, axis=1) for array, part in zip(arrays, parts, strict=True))

    return jax.lax.fori_loop(0, chunks, step, tuple(jnp.zeros(shape, jnp.float32) for _ in range(count)))


def _cut(x: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)


def _logits(hidden_BSD: jax.Array, head_VD: jax.Array, start: jax.Array, chunk: int, cap: float | None) -> jax.Array:
    return soft_cap(jnp.einsum("BCD,VD->BCV", _cut(hidden_BSD, start, chunk), head_VD, preferred_element_type=jnp.float32), cap)


def _hits(targets_BC: jax.Array, logits_BCV: jax.Array) -> jax.Array:
    """True at each token's target; a comparison, because it splits over a sharded vocabulary as a gather does not."""
    return jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == targets_BC[..., None]


def _pick(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(_hits(targets_BC, logits_BCV), logits_BCV, 0.0), axis=-1)
