import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models import logprobs
from tests.tiny import mesh, pack, pairs

B, S, D, V = 2, 96, 16, 37
Arrays = dict[str, jax.Array]
EIGHT = logprobs.LMHeadOptions(8, jnp.dtype("float32"))


def inputs(seed: int = 0, size: float = 0.5) -> Arrays:
    rng = np.random.default_rng(seed)
    arrays = {
        "hidden": (B, S, D),
        "head": (V, D),
        "ref_hidden": (B, S, D),
        "ref_head": (V, D),
        "pull": (B, S),
    }
    made = {
        name: jnp.asarray(size * rng.standard_normal(shape), jnp.float32)
        for name, shape in arrays.items()
    }
    return made | {"targets": jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)}


def reference_logps(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(
        jax.nn.log_softmax(hidden @ head.T, axis=-1), targets[..., None], axis=-1
    )[..., 0]


@functools.partial(jax.jit, static_argnames=("chunk", "dtype"))
def ours(
    x: Arrays, chunks: jax.Array, chunk: int, dtype: str = "float32"
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Log-probs, and the gradients of their weighted sum."""

    def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        logps: Any = logprobs.token_logps(
            hidden, head, x["targets"], chunks, logprobs.LMHeadOptions(chunk, jnp.dtype(dtype))
        )
        return jnp.vdot(logps, x["pull"]), logps

    (_, logps), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        x["hidden"], x["head"]
    )
    return logps, grads


@jax.jit
def theirs(x: Arrays, computed: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The same by a plain log_softmax of all logits; `computed` is 0 in chunks that are not run."""

    def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        logps = reference_logps(hidden, head, x["targets"]) * computed
        return jnp.vdot(logps, x["pull"]), logps

    (_, logps), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        x["hidden"], x["head"]
    )
    return logps, grads


def check(x: Arrays, chunk: int, chunks: int) -> None:
    computed = (jnp.arange(S) < chunk * chunks).astype(jnp.float32)[None, :]
    got, wanted = ours(x, jnp.int32(chunks), chunk), theirs(x, computed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("chunk", [1, 8, 32, 96])
def test_values_and_gradients_equal_a_plain_log_softmax(chunk: int) -> None:
    check(inputs(), chunk, S // chunk)


@pytest.mark.parametrize("chunks", [0, 1, 2, 11, 12])
def test_the_number_of_chunks_is_a_value_and_tokens_after_them_count_nothing(chunks: int) -> None:
    check(inputs(), 8, chunks)


@pytest.mark.parametrize(("cap", "size"), [(8.0, 0.5), (2.0, 1.5), (30.0, 3.0)])
def test_soft_capped_values_and_gradients_equal_a_plain_log_softmax(
    cap: float, size: float
) -> None:
    """Gemma 2: cap * tanh(logit / cap), whose slope is far from 1 where logits reach the cap."""
    x, options = inputs(size=size), EIGHT._replace(cap=cap)

    def mine(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logps: Any = logprobs.token_logps(hidden, head, x["targets"], jnp.int32(S // 8), options)
        return jnp.sum(logps * x["pull"])

    def plain(hidden: jax.Array, head: jax.Array) -> jax.Array:
        capped = cap * jnp.tanh(hidden @ head.T / cap)
        logps = jax.nn.log_softmax(capped, axis=-1)
        targets = jnp.take_along_axis(logps, x["targets"][..., None], axis=-1)[..., 0]
        return jnp.sum(targets * x["pull"])

    got, wanted = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x["hidden"], x["head"])
        for loss in (mine, plain)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    # The test can fail: without the slope, the gradient is another.
    uncapped = jax.grad(lambda h: jnp.sum(reference_logps(h, x["head"], x["targets"]) * x["pull"]))
    assert float(jnp.abs(got[1][0] - uncapped(x["hidden"])).max()) > 1e-3


def test_extreme_logits_give_no_nan() -> None:
    x = inputs(size=30.0)  # logits of several thousand
    got, wanted = ours(x, jnp.int32(S // 8), 8), theirs(x, jnp.ones((1, S)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.isfinite(a).all()
        np.testing.assert_allclose(
            a, b, atol=1e-4 * float(jnp.abs(b).max())
        )  # exp of a logit of 4000 has no more digits


def test_bfloat16_matmuls_accumulate_in_float32() -> None:
    x = inputs()
    rounded = {
        name: x[name].astype(jnp.bfloat16).astype(jnp.float32) for name in ("hidden", "head")
    }
    got, exact = ours(x, jnp.int32(S // 8), 8, "bfloat16"), theirs(x | rounded, jnp.ones((1, S)))
    np.testing.assert_allclose(got[0], exact[0], atol=3e-6)  # the inputs are rounded, nothing else
    for a, b in zip(got[1], exact[1], strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.01 * float(jnp.abs(b).max()))


def test_gradients_against_finite_differences() -> None:
    x = inputs()
    _, (d_hidden, d_head) = ours(x, jnp.int32(S // 8), 8)
    exact = {name: np.asarray(value, np.float64) for name, value in x.items() if name != "targets"}
    targets, rng = np.asarray(x["targets"]), np.random.default_rng(5)
    for name, grad in (("hidden", d_hidden), ("head", d_head)):
        direction = rng.standard_normal(grad.shape)

        def value(step: float, name: str = name, direction: np.ndarray = direction) -> float:
            moved = exact | {name: exact[name] + step * direction}
            logits = moved["hidden"] @ moved["head"].T
            logps = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - np.log(
                np.exp(logits).sum(-1)
            )
            return float(np.vdot(logps, exact["pull"]))

        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        np.testing.assert_allclose(
            np.vdot(np.asarray(grad, np.float64), direction), slope, rtol=1e-5
        )


def test_token_kl_is_exact() -> None:
    x = inputs()
    kl = jax.jit(logprobs.token_kl, static_argnums=5)(
        x["hidden"], x["head"], x["ref_hidden"], x["ref_head"], jnp.int32(11), EIGHT
    )
    p, q = (
        np.asarray(x[h], np.float64) @ np.asarray(x[w], np.float64).T
        for h, w in (("hidden", "head"), ("ref_hidden", "ref_head"))
    )
    p, q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (p, q))
    exact = np.sum(np.exp(p) * (p - q), axis=-1)
    np.testing.assert_allclose(kl[:, :88], exact[:, :88], rtol=1e-5, atol=1e-6)
    assert exact.max() > 1 and not kl[:, 88:].any()


def test_token_kl_of_a_model_with_itself_is_zero() -> None:
    x = inputs()
    kl = logprobs.token_kl(x["hidden"], x["head"], x["hidden"], x["head"], jnp.int32(12), EIGHT)
    assert not kl.any()


def test_collision_logps_are_the_chance_that_two_samples_agree() -> None:
    x = inputs()
    got = jax.jit(logprobs.token_collision_logps, static_argnums=3)(
        x["hidden"], x["head"], jnp.int32(11), EIGHT
    )
    logits = np.asarray(x["hidden"], np.float64) @ np.asarray(x["head"], np.float64).T
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(got[:, :88], np.log(np.sum(probs**2, -1))[:, :88], rtol=1e-5)
    assert not got[:, 88:].any()


@pytest.mark.parametrize("sizes", [(8,), (1, 2, 2, 2), (1, 1, 4, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("size", "cap", "digits"), [(0.5, 20.0, 3e-6), (30.0, None, 1e-4)]
)  # as above: logits of several thousand
def test_meshes_that_shard_sequences_vocab_and_head_give_the_same(
    sizes: tuple[int, ...], size: float, cap: float | None, digits: float
) -> None:
    x = {
        name: value[:36] if "head" in name else jnp.tile(value, (4, 1, 1)[: value.ndim])
        for name, value in inputs(size=size).items()
    }
    x |= {"targets": x["targets"] % 36, "hidden": x["hidden"] + x["hidden"][::-1]}
    spread = logprobs.LMHeadOptions(8, jnp.dtype("float32"), cap, mesh(*sizes))

    @functools.partial(jax.jit, static_argnums=1)
    def everything(x: Arrays, head: logprobs.LMHeadOptions) -> Any:
        def loss(hidden: jax.Array, weight: jax.Array) -> Any:
            logps: Any = logprobs.token_logps(hidden, weight, x["targets"], jnp.int32(11), head)
            return jnp.vdot(logps, x["pull"]), logps

        (_, logps), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            x["hidden"], x["head"]
        )
        kl = logprobs.token_kl(
            x["hidden"], x["head"], x["ref_hidden"], x["ref_head"], jnp.int32(11), head
        )
        return (
            logps,
            grads,
            kl,
            logprobs.token_collision_logps(x["hidden"], x["head"], jnp.int32(11), head),
        )

    for a, b in zip(
        jax.tree.leaves(everything(x, spread)),
        jax.tree.leaves(everything(x, spread._replace(mesh=None))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=digits * max(1.0, float(jnp.abs(b).max())))


def test_loss_tokens_by_the_shard_that_predicts_them() -> None:
    slots = jnp.array(
        [[3, 2, 3, 4, 5, 0, 0, 0], [6, 5, 6, 7, 1, 0, 2, 0]], jnp.int32
    )  # 3 predicts two tokens, and 6 does
    sides = jnp.array([[0, 0, 1, 1, 1, -1, -1, -1], [0, 0, 1, 1, 2, 2, 3, -1]], jnp.int32)
    order, own = logprobs.loss_tokens_by_shard(
        slots, sides, sequence_length=8, max_pairs=2, num_shards=2
    )
    assert order.shape == (4, 6)  # 4 slots, and 2 more for those that predict two
    found = [
        row[mine].tolist() for row, mine in zip(np.asarray(order), np.asarray(own), strict=True)
    ]
    assert found == [[0, 1, 2], [3, 4], [4, 5, 6], [0, 1, 2, 3]]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("shares", [2, 8, 64])
def test_every_loss_token_of_packed_sequences_is_in_one_shard(
    share_prefix: bool, shares: int
) -> None:
    batch = pack(
        [*pairs(6, low=1, high=20), *pairs(9, seed=1, low=1, high=3)],
        share_prefix=share_prefix,
        num_rows=2,
        size=448,
    )
    slots, sides = batch.slots_MBS[0], batch.sides_MBS[0]
    order, own = (
        np.asarray(x)
        for x in logprobs.loss_tokens_by_shard(
            jnp.asarray(slots), jnp.asarray(sides), 448, 15, shares
        )
    )
    for row, share in np.ndindex(2, shares):
        found = order[row * shares + share][own[row * shares + share]]
        expected = np.flatnonzero((sides[row] >= 0) & (slots[row] * shares // 448 == share))
        np.testing.assert_array_equal(found, expected)


def test_num_chunks_counts_those_with_a_loss_token_in_any_sequence() -> None:
    sides = np.full((3, 32), -1, np.int32)
    assert int(logprobs.num_chunks(jnp.asarray(sides), 8)) == 0
    sides[1, :1] = 0
    assert int(logprobs.num_chunks(jnp.asarray(sides), 8)) == 1
    sides[0, :8], sides[2, :9] = 1, 2
    assert int(logprobs.num_chunks(jnp.asarray(sides), 8)) == 2
    sides[2, :] = 0
    assert int(logprobs.num_chunks(jnp.asarray(sides), 8)) == 4


def test_sums_by_completion() -> None:
    sides = jnp.array([[0, 0, 1, 2, 3, 3, -1], [3, 0, -1, -1, -1, -1, -1]], jnp.int32)
    values = jnp.array([[1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64]], jnp.float32)
    assert logprobs.sum_by_completion(values, sides, 2).tolist() == [
        [[3, 4], [8, 48]],
        [[2, 0], [0, 1]],
    ]


def test_gathered_hidden_states_are_those_of_the_indices() -> None:
    hidden = jnp.arange(2 * 5 * 3, dtype=jnp.float32).reshape(2, 5, 3)
    slots = jnp.array([[4, 0], [2, 2]], jnp.int32)
    np.testing.assert_array_equal(
        logprobs.gather_hidden(hidden, slots), np.stack([hidden[0, [4, 0]], hidden[1, [2, 2]]])
    )


@pytest.mark.parametrize("on_cpu", [False, True])
def test_chunks_shrink_with_the_vocabulary(on_cpu: bool) -> None:
    sizes = [
        logprobs.chunk_size(vocab, 4096, on_cpu)
        for vocab in (100, 2000, 32_000, 128_000, 256_000, 10**7)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 1024 and sizes[-1] == 64
    assert logprobs.chunk_size(100, 40, on_cpu) == 40
