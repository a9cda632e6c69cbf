"""Sampling completions from a model, in one compiled program.

The prompts are run in one pass (prefill), then one token at a time with a KV cache.

Shape suffixes: B sequences, T token positions of the prompts, S of the completions, D model,
V vocab.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.distributed import sharding
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import logits
from jaxdpo.models.kv_cache import KVCache, decode, for_decoding, prefill
from jaxdpo.models.params import Params

SMALLEST_BUCKET = 16
"""Tokens to which shorter prompts and completions are padded: more programs would save little."""


class SamplingParams(NamedTuple):
    """How tokens are sampled, as arrays; None is off.

    What is on is part of the compiled program, its value is not.
    """

    seed: Any
    stop_ids: Any
    temperature: Any
    top_k: Any
    top_p: Any


class PromptBatch(NamedTuple):
    """Prompts that are answered together, padded on the right."""

    tokens_BT: Any
    lengths_B: Any
    limits_B: Any
    """Longest completion in tokens; 0 for a sequence that only fills up the batch."""
    indices_B: Any
    """The prompt's index among all: with the seed, what its random draws depend on."""


def generate(
    params: Params,
    model: ModelConfig,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    options: ForwardOptions,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    num_tokens: int | None = None,
    batch_size: int | None = None,
    report: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Continue each prompt. A prompt's completion does not depend on the others in its batch.

    Args:
        prompts: int32 token ids of each; none is empty, none longer than the model's positions.
        max_new_tokens: longest completion, in tokens. A completion also ends at the model's last
            position.
        stop_ids: a completion ends with the first of these (eos).
        temperature: 0 is greedy; above it, samples from the softmax of logits / temperature.
        top_k: sample from the k likeliest tokens (and any as likely as the last of them). 0: all.
        top_p: sample from the likeliest tokens that together have at least this probability
            (nucleus sampling, 1904.09751), after top_k. 1: all.
        num_tokens: ids below this may be sampled (a model's vocab can be larger than its
            tokenizer's). Default: the model's vocab.
        batch_size: prompts to run at a time, those of similar length together. Default: all.
        report: called after each batch with the number of prompts that are answered.

    Returns:
        The new ids of each prompt, int32, a stop id included.
    """
    stops = np.array(
        [*stop_ids, -1], np.int32
    )  # -1 is no token: without stop ids, not an empty array
    sampling = SamplingParams(np.uint32(seed), stops, None, None, None)
    if temperature:
        sampling = sampling._replace(
            temperature=np.float32(temperature),
            top_k=np.float32(top_k) if top_k else None,
            top_p=np.float32(top_p) if top_p < 1 else None,
        )
    completions = [np.zeros(0, np.int32)] * len(prompts)
    num_answered = 0
    for batch in _batches(model, prompts, max_new_tokens, batch_size or len(prompts), options):
        generated = _generate_batch(
            params,
            *_on_devices(batch, sampling, options),
            model=model,
            options=options,
            max_new_tokens=_bucket(max_new_tokens),
            num_tokens=num_tokens or model.vocab_size,
        )
        ids_BS, counts_B = jax.device_get(generated)
        for row, index in enumerate(batch.indices_B):
            if batch.limits_B[row]:
                completions[index] = ids_BS[row, : counts_B[row]]
        num_answered = min(num_answered + len(batch.limits_B), len(prompts))
        if report is not None:
            report(num_answered)
    return completions


def _batches(
    model: ModelConfig,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int,
    options: ForwardOptions,
) -> Iterator[PromptBatch]:
    """The prompts in batches of one size, a multiple of the data parallel devices, by length."""
    num_shards = 1 if options.mesh is None else sharding.num_row_shards(options.mesh)
    size = -(-min(batch_size, len(prompts)) // num_shards) * num_shards
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(prompts), size):
        indices = by_length[first : first + size]
        longest = max(len(prompts[i]) for i in indices)
        batch = PromptBatch(
            tokens_BT=np.zeros((size, _bucket(longest)), np.int32),
            lengths_B=np.ones(size, np.int32),
            limits_B=np.zeros(size, np.int32),
            indices_B=np.zeros(size, np.int32),
        )
        for row, index in enumerate(indices):
            length = len(prompts[index])
            assert 0 < length <= model.max_positions, f"prompt {index} has {length} tokens"
            batch.tokens_BT[row, :length] = prompts[index]
            batch.lengths_B[row] = length
            batch.limits_B[row] = min(max_new_tokens, model.max_positions - length)
            batch.indices_B[row] = index
        yield batch


def _bucket(count: int) -> int:
    """`count` or the next larger of 16, 24, 32, 48, 64, 96, ...: programs exist for these sizes.

    Two to each power of two: at most a third of a size is padding.
    """
    power = SMALLEST_BUCKET
    while power < count:
        power *= 2
    if power > SMALLEST_BUCKET and count <= power * 3 // 4:
        return power * 3 // 4
    return power


def _on_devices(
    batch: PromptBatch, sampling: SamplingParams, options: ForwardOptions
) -> tuple[PromptBatch, SamplingParams]:
    """Explicit transfers, because training forbids implicit ones (jax.transfer_guard)."""
    if options.mesh is None:
        return jax.device_put((batch, sampling))
    sharded, replicated = sharding.rows(options.mesh, 0), sharding.replicated(options.mesh)
    shardings = (
        jax.tree.map(lambda _: sharded, batch),
        jax.tree.map(lambda _: replicated, sampling),
    )
    return sharding.put((batch, sampling), shardings)


class _Completions(NamedTuple):
    """The completions so far."""

    ids_BS: jax.Array
    counts_B: jax.Array
    open_B: jax.Array
    """bool: neither at a stop id nor at its limit."""
    last_B: jax.Array
    """The token sampled last."""
    step: jax.Array
    """Tokens sampled of each."""


@functools.partial(jax.jit, static_argnames=("model", "options", "max_new_tokens", "num_tokens"))
def _generate_batch(
    params: Params,
    batch: PromptBatch,
    sampling: SamplingParams,
    *,
    model: ModelConfig,
    options: ForwardOptions,
    max_new_tokens: int,
    num_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Ids [B, S] of the completions, and how many of them each has."""
    B, T = batch.tokens_BT.shape
    weights = for_decoding(params, model, options)

    def add_token(completions: _Completions, hidden_BD: jax.Array) -> _Completions:
        logits_VB = logits(weights, model, hidden_BD, options).T
        allowed_V = jnp.arange(model.vocab_size, dtype=jnp.int32) < num_tokens
        logits_VB = jnp.where(allowed_V[:, None], logits_VB, -jnp.inf)
        ids_B = _sample(logits_VB, sampling, batch.indices_B, completions.step)
        counts_B = completions.counts_B + completions.open_B.astype(jnp.int32)
        stopped_B = jnp.any(ids_B[:, None] == sampling.stop_ids[None, :], axis=1)
        return _Completions(
            ids_BS=jax.lax.dynamic_update_slice(
                completions.ids_BS, ids_B[:, None], (0, completions.step)
            ),
            counts_B=counts_B,
            open_B=completions.open_B & ~stopped_B & (counts_B < batch.limits_B),
            last_B=ids_B,
            step=completions.step + 1,
        )

    def next_token(carry: tuple[_Completions, KVCache]) -> tuple[_Completions, KVCache]:
        completions, cache = carry
        num_cached = completions.step - 1  # the last token is not in the cache yet
        hidden_BD, cache = decode(
            weights,
            model,
            completions.last_B,
            batch.lengths_B + num_cached,
            cache,
            T + num_cached,
            options,
        )
        return add_token(completions, hidden_BD), cache

    def any_open(carry: tuple[_Completions, KVCache]) -> jax.Array:
        return jnp.any(carry[0].open_B)

    hidden_BTD, cache = prefill(
        weights, model, batch.tokens_BT, batch.lengths_B, options, T + max_new_tokens
    )
    last_B11 = (batch.lengths_B - 1)[:, None, None]
    last_BD = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
    zeros_B, zero = jnp.zeros((B,), jnp.int32), jnp.zeros((), jnp.int32)
    empty_BS = jnp.zeros((B, max_new_tokens), jnp.int32)
    empty = _Completions(empty_BS, zeros_B, batch.limits_B > 0, zeros_B, zero)
    start = (add_token(empty, last_BD), cache)
    completions, _ = jax.lax.while_loop(any_open, next_token, start)
    ids_BS = sharding.constrain(completions.ids_BS, options.mesh)
    return ids_BS, sharding.constrain(completions.counts_B, options.mesh)


def _sample(
    logits_VB: jax.Array, sampling: SamplingParams, indices_B: jax.Array, step: jax.Array
) -> jax.Array:
    """One token id of each sequence, int32 [B].

    The vocab comes first, so that a CPU's vector instructions run over the sequences.
    """
    if sampling.temperature is None:
        return _argmax(logits_VB)
    logits_VB = logits_VB / sampling.temperature
    if sampling.top_k is not None:
        top_VB = _top(logits_VB, jnp.ones_like(logits_VB), sampling.top_k)
        logits_VB = jnp.where(top_VB, logits_VB, -jnp.inf)
    if sampling.top_p is not None:
        probs_VB = jax.nn.softmax(logits_VB, axis=0)
        logits_VB = jnp.where(_top(probs_VB, probs_VB, sampling.top_p), logits_VB, -jnp.inf)
    # Gumbel-max: argmax(logits + Gumbel noise) is a sample of their softmax. A key for each prompt
    # and token, so that batch and order of the prompts change nothing.
    key = jax.random.key(sampling.seed)

    def key_of(index: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, index), step)

    def noise_of(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(key, logits_VB.shape[:1], jnp.float32)

    noise_VB = jax.vmap(noise_of, out_axes=1)(jax.vmap(key_of)(indices_B))
    return _argmax(logits_VB + noise_VB)


def _argmax(scores_VB: jax.Array) -> jax.Array:
    """The first of the highest scores.

    Not jnp.argmax because its reduction of (score, index) pairs takes 1.5 to 2 times as long on a
    CPU for 32 sequences (vocab 32,000 and 128,256); for 1 to 8 sequences neither is always faster.
    """
    index_VB = jax.lax.broadcasted_iota(jnp.int32, scores_VB.shape, 0)
    is_max_VB = scores_VB == scores_VB.max(0, keepdims=True)
    return jnp.min(jnp.where(is_max_VB, index_VB, scores_VB.shape[0] - 1), axis=0)


def _top(scores_VB: jax.Array, weights_VB: jax.Array, enough: jax.Array) -> jax.Array:
    """The fewest highest scores whose weights sum to `enough`, and those equal to the last of them.

    Not jnp.sort because that takes twenty times as long (130 ms and 6 ms for 8 sequences and a
    vocab of 32,000 on two CPU cores). Not jax.lax.top_k because its k would be part of the program.

    A radix select: finds the lowest of these scores bit by bit, on integers that order as the
    floats do.

    Returns:
        bool [V, B].
    """
    bits_VB = jax.lax.bitcast_convert_type(scores_VB, jnp.uint32)
    # The integers order as non-negative floats do once the sign bit is set; those of negative
    # floats in reverse.
    order_VB = jnp.where(bits_VB >> 31 == 1, ~bits_VB, bits_VB | jnp.uint32(1 << 31))

    def add_bit(i: jax.Array, lowest_1B: jax.Array) -> jax.Array:
        higher_1B = lowest_1B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        total_1B = jnp.sum(jnp.where(order_VB >= higher_1B, weights_VB, 0.0), axis=0, keepdims=True)
        return jnp.where(total_1B >= enough, higher_1B, lowest_1B)

    lowest_1B = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((1, scores_VB.shape[1]), jnp.uint32))
    return order_VB >= lowest_1B
