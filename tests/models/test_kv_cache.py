"""Prefill and then decoding token by token give the hidden states of full sequences."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward
from jaxdpo.models.kv_cache import decode, for_decoding, prefill
from jaxdpo.models.params import Params
from tests.families import tiny
from tests.tiny import mesh, params

LENGTHS, NEW, SLOTS = (5, 1, 14, 11), 12, 32
"""Of the prompts; tokens of each completion; entries of the cache, some of which stay empty."""
T = max(LENGTHS)
ROWS = [
    np.random.default_rng(i).integers(0, 96, length + NEW).astype(np.int32)
    for i, length in enumerate(LENGTHS)
]
KINDS: dict[str, ModelConfig] = {
    "gemma2": tiny("gemma2", attn_logit_softcapping=2.0),
    "gemma3": tiny("gemma3"),
    "gpt2": tiny("gpt2"),
    "gpt_oss": tiny("gpt_oss"),
}
fixed = ("config", "options")
run_whole: Any = jax.jit(forward, static_argnames=fixed)
run_prompts: Any = jax.jit(prefill, static_argnames=(*fixed, "cache_length"))
run_one: Any = jax.jit(decode, static_argnames=fixed)


def whole(config: ModelConfig) -> list[np.ndarray]:
    """States [T, D] of each row, computed alone."""
    padded = np.zeros((len(ROWS), T + NEW), np.int32)
    for slots, row in zip(padded, ROWS, strict=True):
        slots[: len(row)] = row
    slots = jnp.broadcast_to(jnp.arange(T + NEW, dtype=jnp.int32), padded.shape)
    states = run_whole(
        params(0, config),
        config,
        padded,
        slots,
        jnp.zeros_like(slots),
        slots + 1,
        ForwardOptions(attention="dense"),
    )
    return [
        row_states[: len(row)] for row_states, row in zip(np.asarray(states), ROWS, strict=True)
    ]


def step_by_step(weights: Params, config: ModelConfig, options: ForwardOptions) -> list[np.ndarray]:
    """States of the prompts, and then of one token after the other."""
    prompts, lengths = np.zeros((len(ROWS), T), np.int32), np.array(LENGTHS, np.int32)
    for slots, row, length in zip(prompts, ROWS, LENGTHS, strict=True):
        slots[:length] = row[:length]
    hidden, cache = run_prompts(weights, config, prompts, lengths, options, cache_length=SLOTS)
    states = [
        list(row_states[:length])
        for row_states, length in zip(np.asarray(hidden), LENGTHS, strict=True)
    ]
    for step in range(NEW):
        tokens = np.array(
            [row[length + step] for row, length in zip(ROWS, LENGTHS, strict=True)], np.int32
        )
        hidden, cache = run_one(
            weights, config, tokens, lengths + np.int32(step), cache, np.int32(T + step), options
        )
        for row_states, state in zip(states, np.asarray(hidden), strict=True):
            row_states.append(state)
    assert (np.asarray(cache.positions_BS) >= 0).sum(1).tolist() == [
        length + NEW for length in LENGTHS
    ]
    return [np.stack(row_states) for row_states in states]


def check_equal(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[:-1]), "gpt_oss"]
)
def test_kv_cache_gives_the_hidden_states_of_full_sequences(kind: str) -> None:
    """Whatever the weights' form; windows of 9 cut prompts and answers."""
    config, options, theirs = KINDS[kind], ForwardOptions(), whole(KINDS[kind])
    for weights in (params(0, config), for_decoding(params(0, config), config, options)):
        check_equal(step_by_step(weights, config, options), theirs)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2)])
def test_data_and_tensor_parallelism_give_the_same_decoding(sizes: tuple[int, int, int]) -> None:
    config, options = KINDS["gpt_oss"], ForwardOptions(mesh=mesh(*sizes))
    check_equal(step_by_step(params(0, config), config, options), whole(config))


def test_the_cache_has_the_compute_dtype() -> None:
    config, options = KINDS["gemma2"], ForwardOptions(compute_dtype="bfloat16")
    cache = run_prompts(
        params(0, config),
        config,
        np.ones((1, 8), np.int32),
        np.array([8], np.int32),
        options,
        cache_length=16,
    )[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}
    assert {leaf.shape for leaf in jax.tree.leaves(cache.layers)} == {
        (4, 1, 2, 16, 16)
    }  # layers, rows, key heads, slots, head
