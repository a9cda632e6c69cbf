"""Mixtures of experts: by hand, expert by expert, and spread over devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.layers import gated_activation
from jaxdpo.models.moe import MoE, RouterLoad, balance_loss, grouped_matmul
from tests.families import tiny
from tests.tiny import mesh

B, T, E, IDLE = 8, 6, 8, 5
FAMILIES: dict[str, ModelConfig] = {
    "mixtral": tiny("mixtral", num_local_experts=E),
    "qwen3_moe": tiny("qwen3_moe", num_experts=E, num_experts_per_tok=3, norm_topk_prob=False),
    "gpt_oss": tiny("gpt_oss", num_local_experts=E, swiglu_limit=1.0),
}
Weights = dict[str, jax.Array]


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(
        nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(params=0), dtype=jnp.dtype("float32")))
    )


def inputs(config: ModelConfig) -> tuple[Weights, jax.Array]:
    """One layer's weights and tokens whose router prefers some experts, and expert IDLE never."""
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(abstract(config)[1])
    weights = {name: 0.3 * rng.standard_normal(leaf.shape[1:]) for name, leaf in shapes.items()}
    x_BTD = rng.standard_normal((B, T, config.hidden_size))
    x_BTD[..., 0], weights["router"][0], weights["router"][0, IDLE] = (
        1.0,
        np.linspace(0, 2, E),
        -50.0,
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (weights, x_BTD))


def run(
    weights: Weights,
    x_BTD: jax.Array,
    config: ModelConfig,
    dtype: str = "float32",
    where: Mesh | None = None,
) -> tuple[jax.Array, RouterLoad]:
    graph, state = abstract(config)
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)(x_BTD, None, jnp.dtype(dtype), where)


def every_expert(
    weights: Weights, x_BTD: jax.Array, config: ModelConfig
) -> tuple[jax.Array, RouterLoad]:
    """All experts for all tokens, then weighted with zeros for those not chosen."""

    def biased(name: str, x: jax.Array) -> jax.Array:
        return (
            x + weights[name].reshape((1,) * (x.ndim - weights[name].ndim) + weights[name].shape)
            if name in weights
            else x
        )

    probs_BTE = jax.nn.softmax(biased("router_bias", x_BTD @ weights["router"]))
    least = jnp.sort(probs_BTE, axis=-1)[..., E - config.experts_per_token, None]
    weights_BTE = jnp.where(probs_BTE >= least, probs_BTE, 0.0)
    if config.norm_topk:
        weights_BTE = weights_BTE / weights_BTE.sum(-1, keepdims=True)
    gate, up = (
        biased(f"{name}_bias", jnp.einsum("BTD,EDF->BTEF", x_BTD, weights[name]))
        for name in ("gate", "up")
    )
    inner_BTEF = gated_activation(config.activation, config.activation_limit, gate, up)
    out_BTED = biased("down_bias", jnp.einsum("BTEF,EFD->BTED", inner_BTEF, weights["down"]))
    load = RouterLoad((weights_BTE > 0).sum((0, 1)), probs_BTE.sum((0, 1)), jnp.asarray(B * T))
    return jnp.einsum("BTED,BTE->BTD", out_BTED, weights_BTE), load


@functools.partial(jax.jit, static_argnames=("how", "config", "dtype", "where"))
def value_and_grads(
    how: Any, weights: Weights, x_BTD: jax.Array, config: ModelConfig, **more: Any
) -> Any:
    """Output, load, and gradients of both by weights and tokens."""
    pull = jax.random.normal(jax.random.key(1), x_BTD.shape)

    def loss(weights: Weights, x_BTD: jax.Array) -> Any:
        y_BTD, load = how(weights, x_BTD, config, **more)
        return jnp.vdot(y_BTD, pull) + balance_loss(
            jax.tree.map(lambda x: x.astype(jnp.float32), load)
        ), (y_BTD, load)

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x_BTD)
    return out, grads


def check_equal(ours: Any, theirs: Any, rtol: float) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(
            a, b, atol=rtol * max(1e-3, np.abs(b).max()), rtol=0, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_through_their_experts_equal_all_experts_weighted(name: str) -> None:
    config = FAMILIES[name]
    ours, theirs = (value_and_grads(how, *inputs(config), config) for how in (run, every_expert))
    (_, load), (grads, _) = ours
    assert load.chosen_E[IDLE] == 0 and load.chosen_E.max() > 3 * jnp.sort(load.chosen_E)[1]
    assert load.chosen_E.sum() == B * T * config.experts_per_token
    assert not grads["gate"][IDLE].any() and grads["gate"][IDLE - 1].any()
    check_equal(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt_oss", sizes)
        for sizes in (
            (1, 1, 8),
            (2, 2, 2),
            (1, 8, 1),
            (1, 1, 1, 1, 8),
            (1, 2, 1, 1, 4),
            (1, 1, 2, 2, 2),
        )
    ]
    + [("qwen3_moe", (1, 1, 2, 2, 2))],  # without biases
)
def test_expert_parallelism_gives_the_same(name: str, sizes: tuple[int, ...]) -> None:
    config = FAMILIES[name]
    alone, spread = (
        value_and_grads(run, *inputs(config), config, where=where) for where in (None, mesh(*sizes))
    )
    check_equal(spread, alone, 1e-5)


def test_bfloat16_matmuls_stay_near_float32() -> None:
    config = FAMILIES["qwen3_moe"]
    weights, x_BTD = inputs(config)
    weights["router"] = weights["router"].astype(jnp.bfloat16).astype(jnp.float32)
    x_BTD = x_BTD.astype(jnp.bfloat16).astype(jnp.float32)  # so that both choose the same experts
    (y_BTD, load), grads = value_and_grads(run, weights, x_BTD, config, dtype="bfloat16")
    (exact, their_load), exact_grads = value_and_grads(run, weights, x_BTD, config)
    np.testing.assert_array_equal(load.chosen_E, their_load.chosen_E)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((y_BTD, grads)))
    assert (y_BTD != exact).any()
    check_equal((y_BTD, grads), (exact, exact_grads), 0.03)


def test_weight_gradients_of_bfloat16_matmuls_accumulate_in_float32() -> None:
    sizes = jnp.array([1000, 0, 20], jnp.int32)

    def total(weight: jax.Array) -> jax.Array:
        y: Any = grouped_matmul(jnp.dtype("bfloat16"), jnp.ones((1100, 1)), weight, sizes)
        return y.sum()

    value, grad = jax.value_and_grad(total)(jnp.ones((3, 1, 1)))
    assert value == 1020 and grad.dtype == jnp.float32
    assert grad.ravel().tolist() == [1000, 0, 20]  # bfloat16 sums would stop at 256


def test_an_even_load_has_the_number_of_choices_as_its_balance_loss() -> None:
    even = RouterLoad(jnp.full((E,), 3.0), jnp.full((E,), 1.5), jnp.asarray(12.0))
    assert balance_loss(even) == 2
    assert (
        balance_loss(
            even._replace(
                chosen_E=jnp.zeros((E,)).at[0].set(12.0), probs_E=jnp.zeros((E,)).at[0].set(12.0)
            )
        )
        == E
    )
