from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdpo.config.schema import OptimSection
from jaxdpo.models.lora import Lora, adapter_shapes
from jaxdpo.models.params import abstract_params, param_shapes
from jaxdpo.training import optim
from jaxdpo.utils.tree import flatten
from tests.families import TINY, tiny

Tree = dict[str, np.ndarray]
PARAMS: Tree = {
    "weight": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32),
    "scale": np.array([1.0, 2.0], np.float32),
    "q_bias": np.array([0.1, 0.2], np.float32),
    "k_norm": np.array([1.5], np.float32),
}


def gradients(seed: int, size: float = 1.0) -> Tree:
    rng = np.random.default_rng(seed)
    return {
        name: (size * rng.standard_normal(w.shape)).astype(np.float32) for name, w in PARAMS.items()
    }


def run(
    section: OptimSection, grads: list[Tree], rate: float = 0.01, params: Tree = PARAMS
) -> tuple[Tree, dict]:
    """Our updates, one for each gradient."""
    step = jax.jit(
        lambda g, opt, w: optim.update(
            g, optim.global_norm(g), opt, w, jnp.float32(rate), section, jnp.bool_(True)
        )
    )
    weights, opt = jax.tree.map(jnp.asarray, params), optim.init(params, section)
    for g in grads:
        weights, opt = step(g, opt, weights)
    return jax.tree.map(np.asarray, weights), opt


def adamw_by_hand(section: OptimSection, grads: list[Tree], rate: float = 0.01) -> Tree:
    """1711.05101 algorithm 2 in float64, after a clip by global norm."""
    weights = {name: w.astype(np.float64) for name, w in PARAMS.items()}
    mu, nu = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for t, g in enumerate(grads, 1):
        norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in g.values()))
        shrink = min(1.0, section.max_grad_norm / norm) if section.max_grad_norm else 1.0
        for name, w in weights.items():
            mu[name] = section.b1 * mu[name] + (1 - section.b1) * shrink * g[name]
            nu[name] = section.b2 * nu[name] + (1 - section.b2) * np.square(shrink * g[name])
            step = (mu[name] / (1 - section.b1**t)) / (
                np.sqrt(nu[name] / (1 - section.b2**t)) + section.eps
            )
            decay = section.weight_decay * w if name == "weight" else 0.0
            weights[name] = w - rate * (step + decay)
    return weights


@pytest.mark.parametrize(
    "section",
    [
        OptimSection(),
        OptimSection(max_grad_norm=0),
        OptimSection(b1=0.8, b2=0.99, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5),
    ],
)
def test_updates_equal_adamw_in_float64(section: OptimSection) -> None:
    grads = [gradients(seed, size) for seed, size in enumerate((1.0, 0.1, 3.0, 0.01))]
    ours, opt = run(section, grads)
    for name, theirs in adamw_by_hand(section, grads).items():
        np.testing.assert_allclose(ours[name], theirs, rtol=2e-6, atol=2e-6, err_msg=name)
    assert int(opt["count"]) == 4


def test_weight_decay_moves_matrices_only() -> None:
    zero = jax.tree.map(np.zeros_like, PARAMS)
    moved, _ = run(OptimSection(weight_decay=0.5), [zero], rate=0.1)
    np.testing.assert_allclose(moved["weight"], PARAMS["weight"] * 0.95, rtol=1e-6)
    for name in ("scale", "q_bias", "k_norm"):
        np.testing.assert_array_equal(moved[name], PARAMS[name])


NOT_MATRICES = ("norm", "bias", "scale", "sinks")


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_zero_gradients_and_decay_leave_every_vector_of_every_family_alone(
    family: str, rank: int
) -> None:
    """A weight is that of one layer (or expert): stacking adds an axis to each."""
    config = tiny(family)
    shapes = abstract_params(config, "float32")
    is_matrix = {name: bool(shape.inputs) for name, shape in param_shapes(config).items()}
    if rank:
        lora = Lora(rank=rank, alpha=1.0, rslora=False, targets=("attn/q", "attn/o"))
        shapes = adapter_shapes(config, lora)
        is_matrix = dict.fromkeys(flatten(shapes, "/"), True)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    zeros = jax.tree.map(np.zeros_like, ones)
    section = OptimSection(weight_decay=0.5)
    moved, _ = run(section, [zeros], rate=0.1, params=ones)
    decayed = {name: bool((w < 1).all()) for name, w in flatten(moved, "/").items()}
    assert decayed == is_matrix
    for name, w in flatten(moved, "/").items():
        assert decayed[name] or (w == 1).all(), name
        # By the names of the field, in case the module's own declaration is wrong.
        assert decayed[name] != any(part in name.split("/")[-1] for part in NOT_MATRICES), name


def test_gradient_clipping_keeps_small_gradients_and_the_direction_of_large_ones() -> None:
    section = OptimSection(b1=0.0, max_grad_norm=2.0)
    for norm, kept in ((1.0, 1.0), (2.0, 1.0), (8.0, 0.25)):
        grads = {"w": jnp.array([norm, 0.0])}
        _, opt = optim.update(
            grads,
            optim.global_norm(grads),
            optim.init(grads, section),
            grads,
            jnp.float32(0.0),
            section,
            jnp.bool_(True),
        )
        np.testing.assert_allclose(opt["mu"]["w"], [norm * kept, 0.0], rtol=1e-6)


def test_changed_share_counts_the_weights_that_an_update_moves() -> None:
    old = {"a": jnp.asarray([1.0, 1.0, 0.001], jnp.bfloat16), "b": jnp.zeros((1,), jnp.bfloat16)}
    new = jax.tree.map(lambda w: (w.astype(jnp.float32) + 1e-3).astype(jnp.bfloat16), old)
    assert float(optim.changed_share(old, new)) == 0.5  # 1 + 1e-3 is 1 in 8 bits
    assert float(optim.changed_share(old, old)) == 0.0


def test_global_norm_is_over_all_leaves() -> None:
    assert float(optim.global_norm({"a": jnp.array([3.0]), "b": jnp.array([[0.0, 4.0]])})) == 5.0


def test_moments_in_bfloat16_keep_the_second_in_float32() -> None:
    section = OptimSection(mu_dtype="bfloat16")
    ours, opt = run(section, [gradients(0), gradients(1)])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(opt["mu"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(opt["nu"])} == {"float32"}
    exact, _ = run(OptimSection(), [gradients(0), gradients(1)])
    for name, w in exact.items():
        np.testing.assert_allclose(ours[name], w, atol=2e-4)


def test_bfloat16_weights_stay_bfloat16() -> None:
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS)
    ours, opt = run(OptimSection(), [gradients(0)], params=params)
    assert {w.dtype.name for w in ours.values()} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(opt["mu"])} == {"float32"}


def rates(section: OptimSection, total: int) -> list[float]:
    schedule = optim.schedule(section, total)
    return [np.asarray(schedule(jnp.float32(k))).item() for k in range(total)]


def test_schedules() -> None:
    cosine = rates(OptimSection(learning_rate=2.0), 10)
    np.testing.assert_allclose(cosine, [1 + np.cos(np.pi * k / 10) for k in range(10)], atol=1e-6)
    np.testing.assert_allclose(
        rates(OptimSection(learning_rate=2.0, schedule="linear"), 4),
        [2.0, 1.5, 1.0, 0.5],
        atol=1e-6,
    )
    assert rates(OptimSection(learning_rate=2.0, schedule="constant"), 3) == [2.0] * 3


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [1, 4])
def test_warm_up_rises_to_the_peak_and_then_the_schedule_begins(kind: str, warmup: int) -> None:
    got = rates(OptimSection(learning_rate=1.0, schedule=kind, warmup_steps=warmup), 12)  # type: ignore[arg-type]
    np.testing.assert_allclose(got[:warmup], [(k + 1) / warmup for k in range(warmup)], rtol=1e-6)
    plain = rates(OptimSection(learning_rate=1.0, schedule=kind), 12 - warmup)  # type: ignore[arg-type]
    np.testing.assert_allclose(got[warmup:], plain, atol=1e-6)


@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 2), (0.5, 6), (0.01, 1), (0.99, 11)])
def test_warmup_ratio_is_a_share_of_the_steps_rounded_up(ratio: float, steps: int) -> None:
    ours = rates(OptimSection(learning_rate=1.0, warmup_ratio=ratio), 12)
    np.testing.assert_allclose(ours, rates(OptimSection(learning_rate=1.0, warmup_steps=steps), 12))
    assert np.isfinite(rates(OptimSection(learning_rate=1.0, warmup_ratio=ratio), 1)).all()


def test_a_single_step_and_a_warm_up_as_long_as_the_run_have_no_nan() -> None:
    assert rates(OptimSection(learning_rate=1.0), 1) == [1.0]
    assert np.isfinite(rates(OptimSection(learning_rate=1.0, warmup_steps=3), 3)).all()


def test_optax_agrees() -> None:
    section, grads = (
        OptimSection(weight_decay=0.0, max_grad_norm=0.0),
        [gradients(seed) for seed in range(3)],
    )
    ours, _ = run(section, grads)
    adamw = optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    weights: Any = jax.tree.map(jnp.asarray, PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        opt = adamw.init(weights)
        for g in grads:
            updates, opt = adamw.update(jax.tree.map(jnp.asarray, g), opt, weights)
            weights = optax.apply_updates(weights, updates)
    for name, w in ours.items():
        np.testing.assert_allclose(w, weights[name], rtol=1e-6, atol=1e-7)
