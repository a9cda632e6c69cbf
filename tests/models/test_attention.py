import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models.attention import IMPLEMENTATIONS, attention
from jaxdpo.models.attention_blocks import BLOCK
from jaxdpo.models.attention_inputs import Window
from tests.tiny import mesh, pack, pairs

Arrays = tuple[jax.Array, ...]

dense, blocks = (
    functools.partial(attention, implementation=name, scale=8**-0.5) for name in ("dense", "blocks")
)


def inputs(
    T: int,
    *,
    B: int = 2,
    N: int = 4,
    K: int = 2,
    H: int = 8,
    seed: int = 0,
    size: float = 1.0,
    dtype: str = "float32",
) -> Arrays:
    """Random q, k, v."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
    return tuple(jnp.asarray(size * rng.standard_normal(shape), dtype) for shape in shapes)


def any_intervals(T: int, B: int = 2, seed: int = 1) -> Arrays:
    """Random intervals of at least one token, anywhere in the sequence."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, T, (2, B, T)), axis=0).astype(np.int32)
    return jnp.asarray(ends[0]), jnp.asarray(ends[1] + 1)


def packed_intervals(T: int) -> Arrays:
    """Those of two packed sequences, with padding at their ends."""
    batch = pack(pairs(T // 40), num_rows=2, size=T)
    assert batch.tokens_MBT.shape == (1, 2, T)
    return jnp.asarray(batch.k_start_MBT[0]), jnp.asarray(batch.k_end_MBT[0])


@functools.cache
def compiled(attend: Callable) -> Callable:
    """(value, gradients) of a weighted sum of the output."""

    def loss(qkv: Arrays, bounds: Arrays, pull: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*qkv, *bounds)
        return jnp.vdot(out, pull), out

    def both(qkv: Arrays, bounds: Arrays, pull: jax.Array) -> tuple[jax.Array, Arrays]:
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(qkv, bounds, pull)
        return out, grads

    return jax.jit(both)


def value_and_grads(attend: Callable, qkv: Arrays, bounds: Arrays) -> list[np.ndarray]:
    pull = jnp.asarray(np.random.default_rng(3).standard_normal(qkv[0].shape), jnp.float32)
    out, grads = compiled(attend)(qkv, bounds, pull)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


def by_hand(qkv: Arrays, bounds: Arrays) -> np.ndarray:
    """Token by token in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    starts, ends = map(np.asarray, bounds)
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        keys = slice(starts[b, t], ends[b, t])
        scores = k[b, keys, n * k.shape[2] // N] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, keys, n * k.shape[2] // N] / weights.sum()
    return out


def test_every_implementation_is_tested() -> None:
    assert set(IMPLEMENTATIONS) == {
        "dense",
        "blocks",
        "splash",
    }  # test_attention_tpu.py has the last


@pytest.mark.parametrize("attend", [dense, blocks], ids=["dense", "blocks"])
def test_attention_is_the_softmax_over_the_interval(attend: Callable) -> None:
    qkv, bounds = inputs(70), any_intervals(70)
    np.testing.assert_allclose(
        value_and_grads(attend, qkv, bounds)[0], by_hand(qkv, bounds), atol=2e-6
    )


@pytest.mark.parametrize(
    "bounds", [any_intervals(200), packed_intervals(200)], ids=["any", "packed"]
)
def test_blocks_equal_dense_in_value_and_gradient(bounds: Arrays) -> None:
    qkv = inputs(200)
    for name, ours, theirs in zip(
        "oqkv", *(value_and_grads(attend, qkv, bounds) for attend in (blocks, dense)), strict=True
    ):
        np.testing.assert_allclose(
            ours, theirs, atol=3e-6 * max(1.0, np.abs(theirs).max()), err_msg=name
        )


def test_blocks_equal_dense_in_bfloat16() -> None:
    qkv, bounds = inputs(200, dtype="bfloat16"), any_intervals(200)
    exact = value_and_grads(dense, tuple(x.astype(jnp.float32) for x in qkv), bounds)
    for attend in (blocks, dense):
        for name, ours, theirs in zip(
            "oqkv", value_and_grads(attend, qkv, bounds), exact, strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max(), err_msg=name)
    assert jax.eval_shape(blocks, *qkv, *bounds).dtype == jnp.float32


def test_scores_beyond_the_range_of_exp_give_no_nan() -> None:
    qkv, bounds = inputs(200, size=40.0), any_intervals(200)
    ours, theirs = (value_and_grads(attend, qkv, bounds) for attend in (blocks, dense))
    for name, a, b in zip("oqkv", ours, theirs, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max(), err_msg=name)


def test_keys_outside_the_interval_have_no_influence() -> None:
    (q, k, v), (starts, ends) = inputs(200), packed_intervals(200)
    changed = 17 + int(np.asarray(ends)[0, 0])  # a slot of a later pair of the first row
    out, *_ = value_and_grads(blocks, (q, k, v), (starts, ends))
    other, *_ = value_and_grads(
        blocks, (q, k.at[0, changed].add(5.0), v.at[0, changed].add(5.0)), (starts, ends)
    )
    sees = np.asarray((starts <= changed) & (changed < ends))[0]
    assert 0 < sees.sum() < 200
    np.testing.assert_array_equal(out[0, ~sees], other[0, ~sees])
    assert (out[0, sees] != other[0, sees]).any(axis=(1, 2)).all()


def test_blocks_outside_all_intervals_are_not_read_even_if_nan() -> None:
    """NaN times a weight of 0 is NaN: a visit to the other pair's blocks would show."""
    half = 2 * BLOCK
    slots = jnp.broadcast_to(jnp.arange(2 * half, dtype=jnp.int32), (2, 2 * half))
    bounds = (slots // half * half, slots + 1)
    q, k, v = inputs(2 * half)
    poisoned = (
        q.at[:, half:].set(jnp.nan),
        k.at[:, half:].set(jnp.nan),
        v.at[:, half:].set(jnp.nan),
    )
    for clean, ours in zip(
        value_and_grads(blocks, (q, k, v), bounds),
        value_and_grads(blocks, poisoned, bounds),
        strict=True,
    ):
        np.testing.assert_array_equal(ours[:, :half], clean[:, :half])


def test_blocks_make_no_array_of_tokens_by_tokens() -> None:
    T = 1024
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs(T, B=1), *any_intervals(T, B=1))
    ]
    grad = jax.grad(lambda *args: blocks(*args).sum(), argnums=(0, 1, 2))
    for attend, there in ((grad, False), (dense, True)):
        text = str(jax.make_jaxpr(attend)(*shapes))
        sizes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([0-9,]+)\]", text)}
        assert any(sum(dim >= T for dim in dims) > 1 for dims in sizes) is there
        assert bool(max(np.prod(dims, dtype=int) for dims in sizes) >= T * T) is there


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 1, 4), (1, 1, 2, 2)])
def test_data_tensor_and_context_parallelism_give_the_same(
    sizes: tuple[int, ...],
) -> None:
    qkv, bounds = inputs(200, B=8), any_intervals(200, B=8)
    spread = jax.jit(functools.partial(blocks, mesh=mesh(*sizes)))
    np.testing.assert_allclose(spread(*qkv, *bounds), jax.jit(blocks)(*qkv, *bounds), atol=1e-6)


def test_tokens_that_context_does_not_divide_are_replicated() -> None:
    qkv, bounds = inputs(70), any_intervals(70)
    spread = jax.jit(functools.partial(blocks, mesh=mesh(context=4)))
    np.testing.assert_allclose(spread(*qkv, *bounds), jax.jit(blocks)(*qkv, *bounds), atol=1e-6)


def everything(T: int, seed: int = 5) -> tuple[Arrays, dict]:
    """Intervals of packed sequences, a window that cuts prompts and completions, cap, sinks."""
    batch = pack(pairs(T // 40), num_rows=2, size=T)
    window = Window(jnp.asarray(7, jnp.int32), jnp.asarray(batch.positions_MBT[0]))
    sinks = jnp.asarray(np.random.default_rng(seed).standard_normal(4), jnp.float32)
    return packed_intervals(T), {"window": window, "sinks_N": sinks, "cap": 3.0}


def test_sliding_window_soft_cap_and_sinks_by_hand() -> None:
    (q, k, v), (bounds, how) = inputs(200, size=2.0), everything(200)
    scores = (
        np.einsum("btnh,bsnh->btsn", *(np.asarray(x, np.float64) for x in (q, k.repeat(2, axis=2))))
        * 8**-0.5
    )
    scores = 3.0 * np.tanh(scores / 3.0)
    slots, positions, sinks = (
        np.arange(200),
        np.asarray(how["window"].positions_BT),
        np.asarray(how["sinks_N"], np.float64),
    )
    sees = (slots >= np.asarray(bounds[0])[..., None]) & (slots < np.asarray(bounds[1])[..., None])
    near = positions[:, :, None] - positions[:, None, :] < 7
    assert (sees & ~near).any()
    weights = np.exp(scores) * (sees & near)[..., None]
    weights /= weights.sum(2, keepdims=True) + np.exp(sinks)
    expected = np.einsum("btsn,bsnh->btnh", weights, np.asarray(v.repeat(2, axis=2), np.float64))
    for attend in (dense, blocks):
        np.testing.assert_allclose(attend(q, k, v, *bounds, **how), expected, atol=2e-6)


@pytest.mark.parametrize("implementation", [blocks, dense], ids=["blocks", "dense"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 1, 2, 4), (2, 1, 1, 2)])
def test_sliding_window_soft_cap_and_sinks_have_the_same_gradients_on_every_mesh(
    implementation: Callable, sizes: tuple[int, ...]
) -> None:
    qkv, (bounds, how) = inputs(200, B=4, size=2.0), everything(200)
    bounds = tuple(jnp.concatenate([x, x]) for x in bounds)
    positions = jnp.concatenate([how["window"].positions_BT] * 2)
    pull = jnp.asarray(np.random.default_rng(3).standard_normal(qkv[0].shape), jnp.float32)

    def gradients(attend: Callable) -> Arrays:
        def loss(qkv: Arrays, sinks: jax.Array) -> jax.Array:
            return jnp.vdot(
                attend(
                    *qkv,
                    *bounds,
                    window=Window(how["window"].size, positions),
                    sinks_N=sinks,
                    cap=3.0,
                ),
                pull,
            )

        d_qkv, d_sinks = jax.jit(jax.grad(loss, argnums=(0, 1)))(qkv, how["sinks_N"])
        return *d_qkv, d_sinks

    theirs, ours = gradients(dense), gradients(functools.partial(implementation, mesh=mesh(*sizes)))
    for name, a, b in zip(("q", "k", "v", "sinks"), ours, theirs, strict=True):
        np.testing.assert_allclose(
            a, b, atol=4e-6 * max(1.0, float(jnp.abs(b).max())), err_msg=name
        )
