"""Answers from a model: greedy or by temperature, a batch of prompts at once.

Every new token runs the whole row again, which is right for the short samples of small models that need it here.
Dimension names: B prompts, T slots, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions, Params, forward, head_weight
from jaxdpo.sharding import replicated

SLOT_MULTIPLE = 64


def generate(
    params: Params,
    model: ModelConfig,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    options: ForwardOptions,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    num_tokens: int | None = None,
) -> list[np.ndarray]:
    """Continue each prompt.

    Args:
        prompts: int32 token ids of each, at least one.
        max_new_tokens: longest answer, in tokens.
        stop_ids: an answer ends with the first of these.
        temperature: 0 takes the likeliest token; above it, samples from the softmax of logits / temperature.
        num_tokens: ids below this may be drawn (a model's vocabulary can have more rows than its tokenizer has tokens).

    Returns:
        The new ids of each prompt, int32, a stop id included.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    slots = -(-(int(lengths.max()) + max_new_tokens) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    tokens_BT = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    stops = np.array([*stop_ids, -1], np.int32)  # -1 is no token: keeps the shape valid when there are no stop ids
    where = None if options.mesh is None else replicated(options.mesh)
    tokens, ends = _continue(
        params,
        *jax.device_put((tokens_BT, lengths, stops, np.uint32(seed)), where),  # in so many words: training forbids implicit transfers
        model=model,
        options=options,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        num_tokens=num_tokens or model.vocab_size,
    )
    rows, ends_B = jax.device_get((tokens, ends))
    return [row[start:end] for row, start, end in zip(rows, lengths, ends_B, strict=True)]


@functools.partial(jax.jit, static_argnames=("model", "options", "max_new_tokens", "temperature", "num_tokens"))
def _continue(
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    stop_ids: jax.Array,
    seed: jax.Array,
    *,
    model: ModelConfig,
    options: ForwardOptions,
    max_new_tokens: int,
    temperature: float,
    num_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Rows with their answers, and where each ends."""
    B, T = tokens_BT.shape
    slots_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    first_BT = jnp.zeros_like(slots_BT)
    key = jax.random.key(seed)

    def next_ids(tokens_BT: jax.Array, ends_B: jax.Array, step: jax.Array) -> jax.Array:
        hidden_BTD = forward(params, model, tokens_BT, slots_BT, first_BT, slots_BT + 1, options)
        hidden_BD = jnp.take_along_axis(hidden_BTD, (ends_B - 1)[:, None, None], axis=1)[:, 0]
        head_VD = head_weight(params)[:num_tokens].astype(options.compute_dtype)
        logits_BV = jnp.einsum("BD,VD->BV", hidden_BD.astype(options.compute_dtype), head_VD, preferred_element_type=jnp.float32)
        if not temperature:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, step), logits_BV / temperature).astype(jnp.int32)

    def unfinished(carry: tuple) -> jax.Array:
        step, _, _, open_B = carry
        return (step < max_new_tokens) & jnp.any(open_B)

    def one_token(carry: tuple) -> tuple:
        step, tokens_BT, ends_B, open_B = carry
        ids_B = next_ids(tokens_BT, ends_B, step)
        written_BT = jnp.where((slots_BT == ends_B[:, None]) & open_B[:, None], ids_B[:, None], tokens_BT)
        stopped_B = jnp.any(ids_B[:, None] == stop_ids[None, :], axis=1)
        return step + 1, written_BT, ends_B + open_B.astype(jnp.int32), open_B & ~stopped_B

    start = (jnp.zeros((), jnp.int32), tokens_BT, lengths_B, jnp.ones((B,), bool))
    _, tokens_BT, ends_B, _ = jax.lax.while_loop(unfinished, one_token, start)
    return tokens_BT, ends_B
