"""The decoder on its own; logits against transformers are in test_parity.py."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.data.packing import Batch
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.models.config import ModelConfig, RopeScaling
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import REMAT, forward, head_weight
from jaxdpo.models.layers import rope_tables, scale_frequencies
from jaxdpo.models.params import Params, abstract_params, init_params, logical_axes
from tests.byhand import by_hand
from tests.families import tiny
from tests.tiny import model, pack, pairs, params

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 12,
    "attention_bias": True,
    "tie_word_embeddings": True,
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 9}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": QWEN3,
    "mistral": MISTRAL,
}
KINDS: dict[str, ModelConfig] = {
    "llama with biases": model(**FAMILIES["llama with biases"]),
    "qwen3": model(**QWEN3),
    "mistral": model(**MISTRAL),
    "gemma2": tiny("gemma2", attn_logit_softcapping=1.5),
    "gemma3": tiny("gemma3", rope_scaling=None),
    "olmo2": tiny("olmo2"),
    "phi3": tiny("phi3", partial_rotary_factor=0.5),
    "gpt2": tiny("gpt2"),
    "sinks": dataclasses.replace(tiny("llama"), attention_sinks=True),
}
PAIRS = pairs(5, low=7, high=20)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def hidden_states(
    weights: Params, arrays: Any, config: ModelConfig, options: ForwardOptions
) -> jax.Array:
    tokens, positions, k_start, k_end = arrays
    return forward(weights, config, tokens, positions, k_start, k_end, options)


def packed_states(batch: Batch, config: ModelConfig, **options: Any) -> np.ndarray:
    """Hidden states of the batch's first microbatch."""
    arrays = tuple(
        x[0] for x in (batch.tokens_MBT, batch.positions_MBT, batch.k_start_MBT, batch.k_end_MBT)
    )
    return np.asarray(hidden_states(params(0, config), arrays, config, ForwardOptions(**options)))


def states_alone(one: EncodedPair, side: int, config: ModelConfig) -> np.ndarray:
    """Hidden states that predict one completion, computed as one plain causal sequence."""
    ids = np.concatenate([one.prompt_ids, (one.chosen_ids, one.rejected_ids)[side]])
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)] = ids
    slots = np.arange(64, dtype=np.int32)[None]
    arrays = (tokens, slots, np.zeros_like(slots), slots + 1)
    states = np.asarray(
        hidden_states(params(0, config), arrays, config, ForwardOptions(attention="dense"))
    )
    return states[0, len(one.prompt_ids) - 1 : len(ids) - 1]


def check_packed(config: ModelConfig, share_prefix: bool) -> None:
    """Each loss token of packed sequences is predicted from the state of its completion alone."""
    batch = pack(PAIRS, share_prefix=share_prefix, size=384)
    states = packed_states(batch, config)
    for place, index in enumerate(batch.index_MBP[0, 0]):
        for side in range(2):
            slots = batch.slots_MBS[0, 0][batch.sides_MBS[0, 0] == 2 * place + side]
            alone = states_alone(PAIRS[index], side, config)
            np.testing.assert_allclose(states[0, slots], alone, atol=5e-5)


@pytest.mark.parametrize("name", KINDS)
def test_packed_hidden_states_equal_those_of_each_completion_alone(name: str) -> None:
    """Windows too, which cut prompts and answers."""
    assert KINDS[name].sliding_window in (None, 9) and max(
        len(pair.prompt_ids) for pair in PAIRS
    ) > 9 < min(map(len, PAIRS))
    for share_prefix in (True, False):
        check_packed(KINDS[name], share_prefix)


@pytest.mark.parametrize("name", KINDS)
def test_hidden_states_equal_a_float64_decoder_by_hand(name: str) -> None:
    config = KINDS[name]
    tokens = np.random.default_rng(4).integers(0, 64, 24).astype(np.int32)
    slots = np.arange(24, dtype=np.int32)[None]
    arrays = (tokens[None], slots, np.zeros_like(slots), slots + 1)
    states = hidden_states(params(0, config), arrays, config, ForwardOptions(attention="dense"))
    np.testing.assert_allclose(states[0], by_hand(params(0, config), config, tokens), atol=5e-5)


def test_a_sliding_window_of_nine_is_a_token_and_the_eight_before_it() -> None:
    windowed, plain = model(**MISTRAL), model(**MISTRAL | {"sliding_window": None})
    slots = np.arange(64, dtype=np.int32)[None]
    tokens, first = slots + 0, np.zeros_like(slots)
    ours = hidden_states(
        params(0, windowed), (tokens, slots, first, slots + 1), windowed, ForwardOptions()
    )
    nine = (tokens, slots, np.maximum(slots - 8, 0), slots + 1)
    np.testing.assert_allclose(
        ours,
        hidden_states(params(0, windowed), nine, plain, ForwardOptions(attention="dense")),
        atol=2e-5,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_logical_axes_and_shapes_are_one_tree(name: str) -> None:
    config = model(**FAMILIES[name])
    shapes, axes = abstract_params(config, "bfloat16"), logical_axes(config)
    named = {
        path: axes_of
        for path, axes_of in jax.tree_util.tree_leaves_with_path(
            axes, is_leaf=lambda node: isinstance(node, tuple)
        )
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        assert len(named.pop(path)) == len(leaf.shape) and leaf.dtype == jnp.bfloat16, path
    assert not named
    assert ("head" in shapes) is not config.tied_head
    attn = shapes["layers"]["attn"]
    assert ("q_bias" in attn) is config.qkv_bias and ("q_norm" in attn) is (
        config.qk_norm != "none"
    )


def test_random_weights_have_the_configs_initializer_range() -> None:
    config = model(**QWEN3, num_hidden_layers=1)
    weights = jax.jit(init_params, static_argnums=(0, 2))(config, jax.random.key(0), "float32")
    shapes = abstract_params(config, "float32")
    assert jax.tree.map(lambda w: (w.shape, w.dtype), weights) == jax.tree.map(
        lambda w: (w.shape, w.dtype), shapes
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = jax.tree_util.keystr(path)
        if "norm" in name or "bias" in name:
            assert (leaf == (1 if "norm" in name else 0)).all(), name
        else:
            np.testing.assert_allclose(leaf.std(), config.initializer_range, rtol=0.1, err_msg=name)
            assert abs(leaf.mean()) < 0.02, name


def test_the_head_is_the_embedding_where_they_are_tied() -> None:
    for changes, name in (({}, "head"), (QWEN3, "embed")):
        weights = params(0, model(**changes))
        assert head_weight(weights) is weights[name]["weight"]


@pytest.mark.parametrize("remat", REMAT)
def test_remat_does_not_change_the_hidden_states(remat: str) -> None:
    batch = pack(PAIRS, size=384)
    np.testing.assert_allclose(
        packed_states(batch, model(), remat=remat),
        packed_states(batch, model(), attention="dense"),
        atol=2e-5,
    )


def test_bfloat16_matmuls_stay_near_float32() -> None:
    batch = pack(PAIRS, size=384)
    exact, rounded = (
        packed_states(batch, model()),
        packed_states(batch, model(), compute_dtype="bfloat16"),
    )
    assert rounded.dtype == np.float32
    off = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-5 < off < 0.05


def test_a_reference_stored_in_bfloat16_computes_the_same_bits_as_its_float32_source() -> None:
    config, batch = model(**FAMILIES["llama with biases"]), pack(PAIRS, size=384)
    arrays = tuple(
        x[0] for x in (batch.tokens_MBT, batch.positions_MBT, batch.k_start_MBT, batch.k_end_MBT)
    )
    options = ForwardOptions(compute_dtype="bfloat16")
    held = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), params(0, config))
    ours, theirs = (
        hidden_states(weights, arrays, config, options) for weights in (params(0, config), held)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_rope_angles_follow_positions_not_the_index_in_the_sequence() -> None:
    cos, sin = rope_tables(jnp.array([[3, 0, 7]], jnp.int32), 8, 100.0, None)
    angles = np.array([3, 0, 7])[:, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angles), atol=1e-6)


def test_rope_scaling() -> None:
    frequencies = jnp.array([1.0, 0.1, 0.02, 0.001], jnp.float32)
    linear = RopeScaling(kind="linear", factor=4.0)
    np.testing.assert_allclose(
        scale_frequencies(frequencies, linear, 1e4), frequencies / 4, rtol=1e-6
    )
    llama3 = RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=1000,
    )
    turns = (
        1000 * np.array([1.0, 0.1, 0.02, 0.001]) / (2 * np.pi)
    )  # 159, 16, 3.2, 0.16: kept, kept, blended, divided
    blend = (turns[2] - 1) / 3
    wanted = [1.0, 0.1, 0.02 * (blend + (1 - blend) / 8), 0.001 / 8]
    np.testing.assert_allclose(scale_frequencies(frequencies, llama3, 1e4), wanted, rtol=1e-5)
