"""Log-probabilities of loss tokens from hidden states: the LM head, a chunk of tokens at a time.

Logits exist for one chunk only, in the forward pass and again in the backward pass, which
recomputes them. The number of chunks follows the number of loss tokens in the batch at hand. Sums
over the vocab are float32.

Not optax.softmax_cross_entropy_with_integer_labels because it takes the logits of all tokens: its
gradient needs 1,000 MiB of temporaries where `token_logps` needs 63 MiB (compiled for CPU, 4,096
loss tokens, D 256, vocab 32,000, float32).

On a mesh each device runs the chunks of its own sequences against its shard of the vocab
(vocab_parallel.py). The LM head is gathered once before the loop and its gradient scattered once
after it; in the loop only sums over the vocab are communicated.

Shape suffixes: B packed sequences, T token positions, S loss tokens (a multiple of the chunk),
C tokens of a chunk, P pairs of a sequence, X shards of a sequence, D model, V vocab.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdpo.models.matmul import einsum, soft_cap, soft_cap_slope, weight_gradient
from jaxdpo.models.vocab_parallel import Kind, MeshAxes, on_mesh

CHUNK_LOGITS_CPU = 1 << 23
"""Float32 logits of a chunk of one sequence on CPUs: 32 MiB, about a CPU's last-level cache."""
CHUNK_LOGITS = 1 << 27
"""The same on accelerators: 512 MiB, so that a chunk is a matmul large enough to keep one busy."""


def chunk_size(vocab_size: int, num_tokens: int, on_cpu: bool) -> int:
    """Tokens of a chunk: a power of two from 64 to 1024, at most num_tokens.

    Its logits stay within CHUNK_LOGITS (or CHUNK_LOGITS_CPU), unless 64 tokens have more.
    """
    limit = CHUNK_LOGITS_CPU if on_cpu else CHUNK_LOGITS
    size = 64
    while size < 1024 and 2 * size * vocab_size <= limit:
        size *= 2
    return min(size, num_tokens)


def gather_hidden(hidden_BTD: jax.Array, index_BS: jax.Array) -> jax.Array:
    """The hidden states that predict the loss tokens: [B, S, D]."""
    return jnp.take_along_axis(hidden_BTD, index_BS[..., None], axis=1)


def loss_tokens_by_shard(
    index_BS: jax.Array,
    completion_BS: jax.Array,
    sequence_length: int,
    max_pairs: int,
    num_shards: int,
) -> tuple[jax.Array, jax.Array]:
    """Loss tokens by the shard of their sequence whose hidden state predicts them.

    Under context parallelism hidden states then stay where they are.

    Args:
        index_BS: int32, a batch's index of the hidden state that predicts each loss token.
        completion_BS: int32, a batch's completion of each loss token, -1 for padding.
        sequence_length: T.
        max_pairs: P. A hidden state predicts at most two tokens, and two only at a prompt's end.
        num_shards: how many equal parts a sequence is sharded into.

    Returns:
        (int32 [B * num_shards, S'] numbers of the tokens among the sequence's S, those of the
        shard first; bool, which of them are of the shard.)
    """
    shard_length = sequence_length // num_shards
    max_tokens = min(index_BS.shape[1], shard_length + min(shard_length, max_pairs))
    owner_BS = jnp.where(completion_BS >= 0, index_BS // shard_length, -1)
    own_BXS = owner_BS[:, None, :] == jnp.arange(num_shards, dtype=jnp.int32)[None, :, None]
    order_BXS = jnp.argsort(~own_BXS, axis=-1, stable=True)[..., :max_tokens]
    flat = (-1, order_BXS.shape[-1])
    order = order_BXS.astype(jnp.int32).reshape(flat)
    return order, jnp.take_along_axis(own_BXS, order_BXS, axis=-1).reshape(flat)


def num_chunks(completion_BS: jax.Array, chunk: int) -> jax.Array:
    """Chunks that hold a loss token in any sequence; int32 scalar.

    Loss tokens come first, padding after them (data/packing.py).
    """
    longest = jnp.max(jnp.sum(completion_BS >= 0, axis=1)).astype(jnp.int32)
    return (longest + chunk - 1) // chunk


class LMHeadOptions(NamedTuple):
    """How logits are computed from hidden states; static."""

    chunk: int
    """Tokens of a chunk."""
    dtype: jnp.dtype
    """Compute dtype of the matmuls; accumulation is float32."""
    cap: float | None = None
    """Soft cap of the logits."""
    mesh: Mesh | None = None
    """Sequences are sharded over all its axes except `tensor`, the head as a weight with axes
    vocab and embed."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_logps(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    targets_BS: jax.Array,
    chunks: jax.Array,
    options: LMHeadOptions,
) -> jax.Array:
    """log softmax(hidden head^T)[target] of each loss token.

    Args:
        hidden_BSD: float32 hidden states that predict the tokens.
        head_VD: LM head, float.
        targets_BS: int32 token ids.
        chunks: int32 scalar, chunks to compute; the tokens after them get 0.

    Returns:
        float32 [B, S], nats. Differentiable in hidden_BSD and head_VD.
    """
    return _token_logps_fwd(hidden_BSD, head_VD, targets_BS, chunks, options)[0]


def _token_logps_fwd(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    targets_BS: jax.Array,
    chunks: jax.Array,
    options: LMHeadOptions,
) -> tuple:
    hidden_BSD = hidden_BSD.astype(options.dtype)
    run = on_mesh(
        functools.partial(_logps_local, options),
        options.mesh,
        ["tokens", "head", "tokens", "scalar"],
        ["tokens", "tokens"],
    )
    logps_BS, lse_BS = run(hidden_BSD, head_VD, targets_BS, chunks)
    return logps_BS, (hidden_BSD, head_VD, targets_BS, chunks, lse_BS)


def _token_logps_bwd(options: LMHeadOptions, saved: tuple, d_logps_BS: jax.Array) -> tuple:
    takes: list[Kind] = ["tokens", "head", "tokens", "scalar", "tokens", "tokens"]
    run = on_mesh(
        functools.partial(_gradients_local, options), options.mesh, takes, ["tokens", "head"]
    )
    d_hidden_BSD, d_head_VD = run(*saved, d_logps_BS)
    return d_hidden_BSD, d_head_VD.astype(saved[1].dtype), None, None


token_logps.defvjp(_token_logps_fwd, _token_logps_bwd)


def _logps_local(
    options: LMHeadOptions,
    axes: MeshAxes,
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    targets_BS: jax.Array,
    chunks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """On one device: log-probs and log-sum-exps, float32 [B, S] each."""
    head_VD = axes.gather_head(head_VD.astype(options.dtype))

    def measure(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = _logits(hidden_BSD, head_VD, start, options)
        lse_BC = axes.logsumexp(logits_BCV)
        is_target_BCV = axes.is_target(_chunk(targets_BS, start, options.chunk), logits_BCV)
        target_logits_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)
        return axes.sum_vocab(target_logits_BC) - lse_BC, lse_BC

    return _by_chunk(measure, 2, targets_BS.shape, chunks, options.chunk)


def _gradients_local(
    options: LMHeadOptions,
    axes: MeshAxes,
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    targets_BS: jax.Array,
    chunks: jax.Array,
    lse_BS: jax.Array,
    d_logps_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """On one device: gradients of hidden states and head, float32."""
    head_VD, chunk = axes.gather_head(head_VD.astype(options.dtype)), options.chunk
    V, D = head_VD.shape

    def step(i: jax.Array, carry: tuple) -> tuple:
        d_hidden_BSD, d_head_DV = carry
        start = i * chunk
        logits_BCV = _logits(hidden_BSD, head_VD, start, options)
        is_target_BCV = axes.is_target(_chunk(targets_BS, start, chunk), logits_BCV)
        probs_BCV = jnp.exp(logits_BCV - _chunk(lse_BS, start, chunk)[..., None])
        # d log softmax(z)[t] / d z = onehot(t) - softmax(z).
        d_logits_BCV = is_target_BCV.astype(jnp.float32) - probs_BCV
        d_logits_BCV = d_logits_BCV * _chunk(d_logps_BS, start, chunk)[..., None]
        slope_BCV = soft_cap_slope(logits_BCV, options.cap)
        if slope_BCV is not None:
            d_logits_BCV = d_logits_BCV * slope_BCV
        d_logits_BCV = d_logits_BCV.astype(options.dtype)
        d_hidden_BCD = einsum("BCV,VD->BCD", d_logits_BCV, head_VD)
        hidden_BCD = _chunk(hidden_BSD, start, chunk)
        d_head_DV += weight_gradient(hidden_BCD.reshape(-1, D), d_logits_BCV.reshape(-1, V))
        d_hidden_BSD = jax.lax.dynamic_update_slice_in_dim(
            d_hidden_BSD, d_hidden_BCD, start, axis=1
        )
        return d_hidden_BSD, d_head_DV

    zeros = jnp.zeros(hidden_BSD.shape, jnp.float32), jnp.zeros((D, V), jnp.float32)
    d_hidden_BSD, d_head_DV = jax.lax.fori_loop(0, chunks, step, zeros)
    return axes.sum_vocab(d_hidden_BSD), axes.scatter_head_gradient(d_head_DV.T)


def token_collision_logps(
    hidden_BSD: jax.Array, head_VD: jax.Array, chunks: jax.Array, options: LMHeadOptions
) -> jax.Array:
    """Log collision probability log sum_v p(v)^2 of each loss token's distribution.

    WPO weights with it (2406.11827 eq. 4).

    Returns:
        float32 [B, S], nats. Not differentiable.
    """

    def local(
        options: LMHeadOptions,
        axes: MeshAxes,
        hidden_BSD: jax.Array,
        head_VD: jax.Array,
        chunks: jax.Array,
    ) -> jax.Array:
        head_VD = axes.gather_head(head_VD.astype(options.dtype))

        def measure(start: jax.Array) -> tuple[jax.Array]:
            logits_BCV = _logits(hidden_BSD, head_VD, start, options)
            return (axes.logsumexp(2 * logits_BCV) - 2 * axes.logsumexp(logits_BCV),)

        return _by_chunk(measure, 1, hidden_BSD.shape[:2], chunks, options.chunk)[0]

    run = on_mesh(
        functools.partial(local, options), options.mesh, ["tokens", "head", "scalar"], ["tokens"]
    )
    return run(hidden_BSD.astype(options.dtype), head_VD, chunks)


def token_kl(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    ref_hidden_BSD: jax.Array,
    ref_head_VD: jax.Array,
    chunks: jax.Array,
    options: LMHeadOptions,
) -> jax.Array:
    """Exact KL(policy || reference) of each loss token's distribution, over the full vocab.

    Returns:
        float32 [B, S], nats. Not differentiable.
    """

    def local(options: LMHeadOptions, axes: MeshAxes, *args: jax.Array) -> jax.Array:
        hidden_BSD, head_VD, ref_hidden_BSD, ref_head_VD, chunks = args
        head_VD = axes.gather_head(head_VD.astype(options.dtype))
        ref_head_VD = axes.gather_head(ref_head_VD.astype(options.dtype))

        def measure(start: jax.Array) -> tuple[jax.Array]:
            logps_BCV = axes.log_softmax(_logits(hidden_BSD, head_VD, start, options))
            ref_logps_BCV = axes.log_softmax(_logits(ref_hidden_BSD, ref_head_VD, start, options))
            kl_BC = jnp.sum(jnp.exp(logps_BCV) * (logps_BCV - ref_logps_BCV), axis=-1)
            return (axes.sum_vocab(kl_BC),)

        return _by_chunk(measure, 1, hidden_BSD.shape[:2], chunks, options.chunk)[0]

    hidden_BSD = hidden_BSD.astype(options.dtype)
    ref_hidden_BSD = ref_hidden_BSD.astype(options.dtype)
    run = on_mesh(
        functools.partial(local, options),
        options.mesh,
        ["tokens", "head", "tokens", "head", "scalar"],
        ["tokens"],
    )
    return run(hidden_BSD, head_VD, ref_hidden_BSD, ref_head_VD, chunks)


def sum_by_completion(values_BS: jax.Array, completion_BS: jax.Array, max_pairs: int) -> jax.Array:
    """Sums over each completion's tokens.

    Not jax.ops.segment_sum because that is a scatter, whose sums may have another order on every
    device; a matmul with a one-hot matrix has the same order everywhere.

    Args:
        completion_BS: int32, 2 * pair for the tokens of a chosen completion, 2 * pair + 1 for those
            of a rejected one, -1 for tokens that count nowhere.

    Returns:
        float32 [B, P, 2] (chosen, rejected).
    """
    owner_BSQ = jax.nn.one_hot(completion_BS, 2 * max_pairs, dtype=jnp.float32)
    sums_BQ = einsum("BS,BSQ->BQ", values_BS, owner_BSQ)
    return sums_BQ.reshape(values_BS.shape[0], max_pairs, 2)


def _by_chunk(
    measure: Callable[[jax.Array], tuple],
    count: int,
    shape: tuple[int, ...],
    chunks: jax.Array,
    chunk: int,
) -> tuple:
    """`count` float32 [B, S] arrays, filled chunk by chunk.

    Args:
        measure: takes a chunk's first token, gives `count` arrays [B, C].
    """

    def step(i: jax.Array, arrays: tuple) -> tuple:
        filled = []
        for array, part in zip(arrays, measure(i * chunk), strict=True):
            filled.append(jax.lax.dynamic_update_slice_in_dim(array, part, i * chunk, axis=1))
        return tuple(filled)

    zeros = tuple(jnp.zeros(shape, jnp.float32) for _ in range(count))
    return jax.lax.fori_loop(0, chunks, step, zeros)


def _chunk(x: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)


def _logits(
    hidden_BSD: jax.Array, head_VD: jax.Array, start: jax.Array, options: LMHeadOptions
) -> jax.Array:
    """float32 [B, C, V] logits of the chunk that begins at token `start`."""
    hidden_BCD = _chunk(hidden_BSD, start, options.chunk)
    logits_BCV = einsum("BCD,VD->BCV", hidden_BCD, head_VD)
    return soft_cap(logits_BCV, options.cap)
