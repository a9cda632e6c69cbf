"""LoRA adapters: their targets, their initial values, and that merging changes no result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.schema import LoraSection
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward
from jaxdpo.models.hf.lora_targets import find_targets, lora_of, projections
from jaxdpo.models.lora import Lora, MergedWeight, adapter_shapes, by_target, init_adapter, merge
from jaxdpo.models.params import Params
from jaxdpo.models.shardings import trained_shardings
from tests.families import TINY, quick_and_slow, tiny
from tests.tiny import mesh, params

LORA = Lora(rank=3, alpha=6.0, rslora=False, targets=("attn/q", "attn/o", "mlp/up"))


def random_adapter(config: ModelConfig, lora: Lora, size: float = 0.3) -> Params:
    """An adapter whose B is not zero; numpy arrays."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.float32(size) * rng.standard_normal(leaf.shape).astype(np.float32),
        adapter_shapes(config, lora),
    )


def hidden(weights: Params, config: ModelConfig, scale: float = 1.0) -> np.ndarray:
    tokens = (jnp.arange(24, dtype=jnp.int32)[None] * 7) % config.vocab_size
    slots = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), tokens.shape)
    options = ForwardOptions(attention="dense", lora_scale=scale)
    return np.asarray(
        forward(weights, config, tokens, slots, jnp.zeros_like(slots), slots + 1, options)
    )


def test_targets_by_our_names_and_those_of_transformers() -> None:
    llama, gpt2, phi, moe = tiny("llama"), tiny("gpt2"), tiny("phi3"), tiny("qwen3_moe")
    every = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    assert find_targets(llama, "all-linear") == every
    assert (
        find_targets(llama, ["v", "q"])
        == find_targets(llama, ["q_proj", "self_attn.v_proj"])
        == ("attn/q", "attn/v")
    )
    assert find_targets(llama, "down_proj") == ("mlp/down",)
    assert find_targets(phi, ["qkv_proj"]) == every[:3] and find_targets(
        phi, ["gate_up_proj", "o"]
    ) == ("attn/o", "mlp/gate", "mlp/up")
    assert find_targets(gpt2, "all-linear") == (*every[:4], "mlp/up", "mlp/down")
    assert find_targets(gpt2, ["c_attn"]) == every[:3] and find_targets(gpt2, ["c_proj"]) == (
        "attn/o",
        "mlp/down",
    )
    assert find_targets(gpt2, ["attn.c_proj"]) == ("attn/o",)
    assert find_targets(moe, "all-linear") == every[:4]  # never experts


def test_names_that_the_model_does_not_have_are_refused_with_those_it_has() -> None:
    with pytest.raises(ValueError) as caught:
        find_targets(tiny("gpt2"), ["q", "gate", "lm_head"])
    assert str(caught.value).split("\n") == [
        f"lora.targets={name}: the model has no such projection. "
        "Choose from all-linear, q, k, v, o, up, down, c_attn, c_proj, c_fc"
        for name in ("gate", "lm_head")
    ]


def test_defaults_of_the_lora_options() -> None:
    lora = lora_of(LoraSection(rank=8), tiny("llama"))
    assert (lora.rank, lora.alpha, lora.scale, len(lora.targets)) == (8, 16.0, 2.0, 7)
    assert (
        lora_of(LoraSection(rank=16, alpha=8.0, rslora=True, targets="q"), tiny("llama")).scale
        == 2.0
    )


@pytest.mark.parametrize("name", quick_and_slow(["llama", "gpt2", "gpt_oss"]))
def test_an_initial_adapter_changes_nothing(name: str) -> None:
    config = tiny(name)
    lora = lora_of(LoraSection(rank=4), config)
    adapter = init_adapter(adapter_shapes(config, lora), jax.random.key(0))
    assert set(by_target(adapter)) == set(projections(config)) == set(lora.targets)
    np.testing.assert_array_equal(
        hidden(params(0, config) | {"lora": adapter}, config, 2.0),
        hidden(params(0, config), config),
    )
    for target, update in by_target(adapter).items():
        bound = np.prod(update["a"].shape[1:-1]) ** -0.5
        assert not update["b"].any() and 0.9 * bound < np.abs(update["a"]).max() <= bound, target
        assert abs(update["a"].std() / bound - 3**-0.5) < 0.06


def test_initial_values_of_a_target_do_not_depend_on_the_others() -> None:
    config, key = tiny("llama"), jax.random.key(1)
    loras = (lora_of(LoraSection(rank=4, targets=targets), config) for targets in ("v", None))
    some, every = (by_target(init_adapter(adapter_shapes(config, lora), key)) for lora in loras)
    np.testing.assert_array_equal(some["attn/v"]["a"], every["attn/v"]["a"])
    assert not np.array_equal(every["attn/k"]["a"], every["attn/v"]["a"])


@pytest.mark.parametrize("name", TINY)
def test_merged_weights_compute_the_same(name: str) -> None:
    config = tiny(name)
    lora = lora_of(LoraSection(rank=4, alpha=2.0), config)
    base, adapter = params(0, config), random_adapter(config, lora)
    merged = merge(base, adapter, lora.scale)
    arrays = jax.tree.map(layer_by_layer, merged)
    got, wanted = hidden(base | {"lora": adapter}, config, lora.scale), hidden(arrays, config)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)
    assert np.abs(got - hidden(base, config)).mean() > 0.05
    assert merged["embed"] is base["embed"] and jax.tree.structure(merged) == jax.tree.structure(
        base
    )


def layer_by_layer(weight: Any) -> np.ndarray:
    """A merged weight as one array; others as they are."""
    return (
        np.stack([weight[layer,] for layer in range(len(weight.weight))])
        if isinstance(weight, MergedWeight)
        else weight
    )


def test_a_small_update_is_not_lost_in_a_bfloat16_weight() -> None:
    """Merged weights stay float32 until the file's dtype is known."""
    config = tiny("llama")
    base = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params(0, config))
    adapter = random_adapter(config, LORA)
    merged = merge(base, adapter, 1e-5)["layers"]["attn"]["q"][1,]
    update = adapter["layers"]["attn"]["q"]
    exact = base["layers"]["attn"]["q"][1].astype(np.float64) + 1e-5 * np.tensordot(
        update["a"][1], update["b"][1].astype(np.float64), 1
    )
    assert merged.dtype == np.float32 and merged.shape == exact.shape
    np.testing.assert_allclose(merged, exact, rtol=1e-6, atol=1e-8)
    assert not np.array_equal(merged, base["layers"]["attn"]["q"][1].astype(np.float32))


def test_an_adapter_is_sharded_as_its_weights_except_its_rank() -> None:
    config, some = tiny("llama"), mesh(fsdp=4, tensor=2)
    weights, adapter = (
        trained_shardings(config, some)["layers"],
        trained_shardings(config, some, LORA)["layers"],
    )
    for part, name, inputs in (("attn", "q", 1), ("mlp", "up", 1), ("attn", "o", 2)):
        whole, a, b = (
            tuple(place.spec)
            for place in (weights[part][name], adapter[part][name]["a"], adapter[part][name]["b"])
        )
        assert a == (*whole[: 1 + inputs], None) and b == (whole[0], None, *whole[1 + inputs :])
        assert any(whole)
