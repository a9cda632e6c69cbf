"""Quantized weights: their error, their memory, and that the decoder reads them as arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.distributed import sharding
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward
from jaxdpo.models.hf.config_json import from_hf
from jaxdpo.models.params import Params, abstract_params, logical_axes
from jaxdpo.models.quantize import (
    NF4,
    QuantizedArray,
    is_quantized,
    quantize,
    quantize_params,
    quantized_axes,
)
from tests.families import tiny
from tests.tiny import HF, mesh, params

WEIGHT = np.random.default_rng(0).standard_normal((2, 5, 3, 128)).astype(np.float32)
WIDE = from_hf(
    HF | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 16}
)


def blocks_of(weight: np.ndarray) -> np.ndarray:
    """As blocks of 64 numbers."""
    return weight.reshape(-1, 64)


def test_int8_is_within_half_a_step() -> None:
    got = np.asarray(quantize(jnp.asarray(WEIGHT), "int8").dequantized(jnp.float32))
    largest = np.abs(blocks_of(WEIGHT)).max(axis=1, keepdims=True)
    assert (
        np.abs(blocks_of(got) - blocks_of(WEIGHT)) <= largest * (0.5 / 127 + 2**-8)
    ).all()  # the scale is a bfloat16
    assert np.abs(got - WEIGHT).mean() < 0.01


def test_nf4_takes_the_nearest_level() -> None:
    held = quantize(jnp.asarray(WEIGHT), "nf4")
    scales = np.repeat(np.asarray(held.scales).astype(np.float32), 64, axis=-1)
    nearest = np.abs(np.clip(WEIGHT / scales, -1, 1)[..., None] - NF4).argmin(axis=-1)
    np.testing.assert_array_equal(np.asarray(held.dequantized(jnp.float32)), NF4[nearest] * scales)
    assert held.codes.dtype == jnp.uint8 and held.codes.shape == (2, 5, 3, 64)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_levels_and_zeros_are_exact(kind: str) -> None:
    exact = jnp.asarray(
        np.tile(
            NF4 if kind == "nf4" else np.arange(-127.0, 1.0, 8.0).astype(np.float32) / 127,
            (2, 3, 4),
        )
        * 2.0
    )
    zeros = jnp.zeros((2, 3, 64))
    for weight in (exact, zeros):
        np.testing.assert_array_equal(
            np.asarray(quantize(weight, kind).dequantized(jnp.float32)), np.asarray(weight)
        )


def test_blocks_are_as_long_as_the_dimension_allows() -> None:
    for size, count in ((80, 5), (48, 3), (64, 1), (192, 3), (6, 3)):
        assert quantize(jnp.ones((1, 2, size)), "nf4").scales.shape == (1, 2, count)
    with pytest.raises(
        ValueError,
        match=r"model.quantize=nf4: packs two numbers into a byte, "
        r"but a weight's last dimension is 5. Use int8",
    ):
        quantize(jnp.ones((1, 2, 5)), "nf4")


def test_only_the_projections_of_layers_are_quantized() -> None:
    for config in (tiny("gemma2"), tiny("gpt2"), tiny("qwen3_moe")):
        shapes = jax.eval_shape(
            lambda tree: quantize_params(tree, "nf4"), abstract_params(config, "float32")
        )
        leaves = jax.tree_util.tree_flatten_with_path(
            shapes, is_leaf=lambda node: isinstance(node, QuantizedArray)
        )[0]
        names = {
            jax.tree_util.keystr(path, simple=True, separator="/"): isinstance(leaf, QuantizedArray)
            for path, leaf in leaves
        }
        assert all(is_quantized(name) is held for name, held in names.items())
        assert {name.split("/")[-1] for name, held in names.items() if held} >= {
            "q",
            "k",
            "v",
            "o",
            "up",
            "down",
        }
        assert not names["embed/weight"] and not any(
            held for name, held in names.items() if "norm" in name or "bias" in name
        )


def hidden(weights: Params, config: ModelConfig, options: ForwardOptions) -> Any:
    tokens = jnp.arange(24, dtype=jnp.int32)[None] % 16
    slots = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), tokens.shape)
    return forward(weights, config, tokens, slots, jnp.zeros_like(slots), slots + 1, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_decoder_computes_with_the_dequantized_weights(name: str, kind: str) -> None:
    config, options = tiny(name), ForwardOptions(attention="dense")
    held = quantize_params(jax.tree.map(jnp.asarray, params(0, config)), kind)
    arrays = jax.tree.map(
        lambda leaf: leaf.dequantized(jnp.float32) if isinstance(leaf, QuantizedArray) else leaf,
        held,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
    )
    got, wanted = (np.asarray(hidden(tree, config, options)) for tree in (held, arrays))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    plain = np.asarray(hidden(params(0, config), config, options))
    assert 0 < np.abs(got - plain).mean() < (0.05 if kind == "int8" else 0.5) * np.abs(plain).mean()


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.26), ("nf4", 0.135)])
def test_quantized_arguments_take_a_quarter_or_an_eighth_of_float32(
    kind: str, share: float
) -> None:
    options = ForwardOptions(attention="dense", remat="full")

    def argument_bytes(weights: Params) -> int:
        program = (
            jax.jit(lambda tree: hidden(tree, WIDE, options))
            .lower({"layers": weights} | rest)
            .compile()
        )
        found: Any = program.memory_analysis()
        return found.argument_size_in_bytes - sum(leaf.size * 4 for leaf in jax.tree.leaves(rest))

    shapes = abstract_params(WIDE, "float32")
    rest = {key: value for key, value in shapes.items() if key != "layers"}
    held = jax.eval_shape(lambda tree: quantize_params(tree, kind), shapes)
    assert argument_bytes(held["layers"]) < share * argument_bytes(shapes["layers"])


def test_one_layer_is_dequantized_at_a_time() -> None:
    """A gradient through quantized weights keeps no dequantized copy of all layers."""
    deep = from_hf(
        HF
        | {
            "hidden_size": 256,
            "intermediate_size": 512,
            "head_dim": 64,
            "vocab_size": 16,
            "num_hidden_layers": 32,
        }
    )
    held = jax.eval_shape(
        lambda tree: quantize_params(tree, "nf4"), abstract_params(deep, "float32")
    )
    options = ForwardOptions(attention="dense", remat="full")

    def loss(embed: jax.Array, tree: Params) -> jax.Array:
        return jnp.sum(jnp.square(hidden(tree | {"embed": {"weight": embed}}, deep, options)))

    program = jax.jit(jax.grad(loss)).lower(held["embed"]["weight"], held).compile()
    one_layer = (
        sum(leaf.size for leaf in jax.tree.leaves(abstract_params(deep, "float32")["layers"]))
        / 32
        * 4
    )
    found: Any = program.memory_analysis()
    assert found.temp_size_in_bytes < 8 * one_layer


def test_codes_and_scales_are_sharded_as_their_weight() -> None:
    some = mesh(fsdp=4, tensor=2)
    axes = quantized_axes(logical_axes(WIDE))
    shapes = jax.eval_shape(
        lambda tree: quantize_params(tree, "nf4"), abstract_params(WIDE, "float32")
    )
    places = sharding.param_shardings(some, axes, shapes)
    full = sharding.param_shardings(some, logical_axes(WIDE), abstract_params(WIDE, "float32"))
    gate = places["layers"]["mlp"]["gate"]
    assert gate.codes == full["layers"]["mlp"]["gate"]
    assert tuple(gate.codes.spec) == (None, "fsdp", "tensor") and tuple(gate.scales.spec) == (
        None,
        "fsdp",
        None,
    )
    weight = jax.device_put(
        np.asarray(params(0, WIDE)["layers"]["mlp"]["gate"]), full["layers"]["mlp"]["gate"]
    )
    spread = jax.jit(quantize, static_argnums=1, out_shardings=gate)(weight, "nf4")
    alone = quantize(jnp.asarray(np.asarray(weight)), "nf4")
    assert spread.codes.sharding == gate.codes
    np.testing.assert_array_equal(np.asarray(spread.codes), np.asarray(alone.codes))
