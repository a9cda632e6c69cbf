"""Answers from a model: the prompts in one pass, then token by token with a key-value cache, in one compiled program.

Dimension names: B rows, T prompt slots, S answer slots, D model, V vocabulary.
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
from jaxdpo.models.kv_cache import Cache, decode, for_decoding, prefill
from jaxdpo.models.params import Params

SMALLEST_BUCKET = 16


class Draw(NamedTuple):
    """How tokens are drawn, as arrays; None is off. What is on is part of the program, its value is not."""

    seed: Any
    stop_ids: Any
    temperature: Any
    top_k: Any
    top_p: Any


class Rows(NamedTuple):
    """Prompts at one time, padded on the right."""

    tokens_BT: Any
    lengths_B: Any
    limits_B: Any
    """Longest answer; 0 for a row that only fills up the batch."""
    numbers_B: Any
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
    """Continue each prompt. What is drawn for one does not depend on the prompts beside it.

    Args:
        prompts: int32 token ids of each; none is empty, none longer than the model has positions.
        max_new_tokens: longest answer, in tokens. An answer also ends at the model's last position.
        stop_ids: an answer ends with the first of these.
        temperature: 0 takes the likeliest token; above it, samples from the softmax of logits / temperature.
        top_k: draw among the k likeliest tokens (and any as likely as the last of them). 0: among all.
        top_p: draw among the likeliest tokens that together have at least this probability, after top_k. 1: among all.
        num_tokens: ids below this may be drawn (a model's vocabulary can have more rows than its tokenizer has tokens).
        batch_size: prompts to answer at a time, those of like length together. Default: all.
        report: told after each batch how many prompts are answered.

    Returns:
        The new ids of each prompt, int32, a stop id included.
    """
    stops = np.array(
        [*stop_ids, -1], np.int32
    )  # -1 is no token: keeps the shape valid when there are no stop ids
    draw = Draw(np.uint32(seed), stops, None, None, None)
    if temperature:
        draw = draw._replace(
            temperature=np.float32(temperature),
            top_k=np.float32(top_k) if top_k else None,
            top_p=np.float32(top_p) if top_p < 1 else None,
        )
    answers, answered = [np.zeros(0, np.int32)] * len(prompts), 0
    for rows in _batches(model, prompts, max_new_tokens, batch_size or len(prompts), options):
        ids_BS, counts_B = _answer(
            params,
            *_on_devices(rows, draw, options),
            model=model,
            options=options,
            num_slots=_bucket(max_new_tokens),
            num_tokens=num_tokens or model.vocab_size,
        )
        for number, limit, ids, count in zip(
            rows.numbers_B, rows.limits_B, *jax.device_get((ids_BS, counts_B)), strict=True
        ):
            if limit:
                answers[number] = ids[:count]
        answered = min(answered + len(rows.limits_B), len(prompts))
        if report is not None:
            report(answered)
    return answers


def _batches(
    model: ModelConfig,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int,
    options: ForwardOptions,
) -> Iterator[Rows]:
    """The prompts as batches of one size, shortest first; every device that sees rows of its own gets as many."""
    num_shards = 1 if options.mesh is None else sharding.num_row_shards(options.mesh)
    size = -(-min(batch_size, len(prompts)) // num_shards) * num_shards
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(prompts), size):
        indices = by_length[first : first + size]
        num_slots = _bucket(max(len(prompts[i]) for i in indices))
        rows = Rows(
            np.zeros((size, num_slots), np.int32),
            np.ones(size, np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
        )
        for row, index in enumerate(indices):
            length = len(prompts[index])
            assert 0 < length <= model.max_positions, f"prompt {index} has {length} tokens"
            rows.tokens_BT[row, :length] = prompts[index]
            rows.lengths_B[row] = length
            rows.limits_B[row] = min(max_new_tokens, model.max_positions - length)
            rows.numbers_B[row] = index
        yield rows


def _bucket(count: int) -> int:
    """`count` or the next larger of 16, 24, 32, 48, 64, 96, ...: sizes for which programs are compiled."""
    power = SMALLEST_BUCKET
    while power < count:
        power *= 2
    return power * 3 // 4 if power > SMALLEST_BUCKET and count <= power * 3 // 4 else power


def _on_devices(rows: Rows, draw: Draw, options: ForwardOptions) -> tuple[Rows, Draw]:
    """Moved in so many words, as training forbids implicit transfers."""
    if options.mesh is None:
        return jax.device_put((rows, draw))
    spread, everywhere = sharding.rows(options.mesh, 0), sharding.replicated(options.mesh)
    return sharding.put(
        (rows, draw),
        (jax.tree.map(lambda _: spread, rows), jax.tree.map(lambda _: everywhere, draw)),
    )


class _Answers(NamedTuple):
    """The answers so far."""

    ids_BS: jax.Array
    counts_B: jax.Array
    open_B: jax.Array
    last_B: jax.Array
    """The token drawn last."""
    step: jax.Array
    """Tokens drawn of each."""


@functools.partial(jax.jit, static_argnames=("model", "options", "num_slots", "num_tokens"))
def _answer(
    params: Params,
    rows: Rows,
    draw: Draw,
    *,
    model: ModelConfig,
    options: ForwardOptions,
    num_slots: int,
    num_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Ids [B, S] of the answers, and how many of them each has."""
    B, T = rows.tokens_BT.shape
    weights = for_decoding(params, model, options)

    def add_token(answers: _Answers, hidden_BD: jax.Array) -> _Answers:
        logits_VB = logits(weights, model, hidden_BD, options).T
        allowed_V = jnp.arange(model.vocab_size, dtype=jnp.int32) < num_tokens
        ids_B = _draw(
            jnp.where(allowed_V[:, None], logits_VB, -jnp.inf), draw, rows.numbers_B, answers.step
        )
        counts_B = answers.counts_B + answers.open_B.astype(jnp.int32)
        stopped_B = jnp.any(ids_B[:, None] == draw.stop_ids[None, :], axis=1)
        return _Answers(
            ids_BS=jax.lax.dynamic_update_slice(answers.ids_BS, ids_B[:, None], (0, answers.step)),
            counts_B=counts_B,
            open_B=answers.open_B & ~stopped_B & (counts_B < rows.limits_B),
            last_B=ids_B,
            step=answers.step + 1,
        )

    def one_more(carry: tuple[_Answers, Cache]) -> tuple[_Answers, Cache]:
        answers, cache = carry
        done = answers.step - 1  # tokens of the answers that the cache holds
        hidden_BD, cache = decode(
            weights, model, answers.last_B, rows.lengths_B + done, cache, T + done, options
        )
        return add_token(answers, hidden_BD), cache

    hidden_BTD, cache = prefill(
        weights, model, rows.tokens_BT, rows.lengths_B, options, T + num_slots
    )
    last_BD = jnp.take_along_axis(hidden_BTD, (rows.lengths_B - 1)[:, None, None], axis=1)[:, 0]
    zeros_B, zero = jnp.zeros((B,), jnp.int32), jnp.zeros((), jnp.int32)
    empty = _Answers(
        jnp.zeros((B, num_slots), jnp.int32), zeros_B, rows.limits_B > 0, zeros_B, zero
    )
    start = (add_token(empty, last_BD), cache)
    answers, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[0].open_B), one_more, start)
    return sharding.constrain(answers.ids_BS, options.mesh), sharding.constrain(
        answers.counts_B, options.mesh
    )


def _draw(logits_VB: jax.Array, draw: Draw, numbers_B: jax.Array, step: jax.Array) -> jax.Array:
    """One token of each row. Rows are last, so that a CPU computes them side by side."""
    if draw.temperature is None:
        return _argmax(logits_VB)
    logits_VB = logits_VB / draw.temperature
    if draw.top_k is not None:
        logits_VB = jnp.where(
            _likeliest(logits_VB, jnp.ones_like(logits_VB), draw.top_k), logits_VB, -jnp.inf
        )
    if draw.top_p is not None:
        probs_VB = jax.nn.softmax(logits_VB, axis=0)
        logits_VB = jnp.where(_likeliest(probs_VB, probs_VB, draw.top_p), logits_VB, -jnp.inf)
    key = jax.random.key(draw.seed)
    keys_B = jax.vmap(lambda number: jax.random.fold_in(jax.random.fold_in(key, number), step))(
        numbers_B
    )
    noise_VB = jax.vmap(
        lambda key: jax.random.gumbel(key, logits_VB.shape[:1], jnp.float32), out_axes=1
    )(keys_B)
    return _argmax(logits_VB + noise_VB)


def _argmax(scores_VB: jax.Array) -> jax.Array:
    """The first of the highest. jnp.argmax, which compares pairs of score and index, is slower on CPUs."""
    places_VB = jax.lax.broadcasted_iota(jnp.int32, scores_VB.shape, 0)
    return jnp.min(
        jnp.where(scores_VB == scores_VB.max(0, keepdims=True), places_VB, scores_VB.shape[0] - 1),
        axis=0,
    )


def _likeliest(scores_VB: jax.Array, weights_VB: jax.Array, enough: jax.Array) -> jax.Array:
    """The fewest highest scores of each row whose weights sum to `enough`, and their equals: bool [V, B].

    Finds the lowest of them bit by bit, on integers in the order of the floats. A sort would take ten times as long.
    """
    bits_VB = jax.lax.bitcast_convert_type(scores_VB, jnp.uint32)
    order_VB = jnp.where(bits_VB >> 31 == 1, ~bits_VB, bits_VB | jnp.uint32(1 << 31))

    def add_bit(i: jax.Array, lowest_1B: jax.Array) -> jax.Array:
        higher_1B = lowest_1B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        total_1B = jnp.sum(jnp.where(order_VB >= higher_1B, weights_VB, 0.0), axis=0, keepdims=True)
        return jnp.where(total_1B >= enough, higher_1B, lowest_1B)

    lowest_1B = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((1, scores_VB.shape[1]), jnp.uint32))
    return order_VB >= lowest_1B
