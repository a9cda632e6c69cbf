"""The step is exact: packing, gradient accumulation, sharding and remat change no number."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.data.packing import Batch
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.losses import registry
from jaxdpo.losses.pair_logps import PairLogps
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward, head_weight
from jaxdpo.models.params import Params
from jaxdpo.training import step
from jaxdpo.training.completion_logps import StepOptions
from jaxdpo.training.state import FrozenState
from tests.families import tiny
from tests.tiny import Setup, Stepper, host, model, pack, pair, pairs, params

EQUAL = pairs(8, low=2, high=30)
WEIGHTED = [dataclasses.replace(one, weight=0.5 + 0.25 * i) for i, one in enumerate(EQUAL)]
SIZE = 1024  # holds all of them in either layout
LOSSES = {
    "mixed": LossSection(
        name=["ipo", "sft"], ld_alpha=0.5
    ),  # means and sums, token weights, both divisors
    "aot": LossSection(name="aot"),  # mixes pairs of different microbatches
    "wpo": LossSection(wpo=True),
    "simpo": LossSection(name="simpo"),  # without a reference
}


def pairs_for(loss: str) -> list[EncodedPair]:
    return EQUAL if loss == "aot" else WEIGHTED


def one_pair_a_row(some: Sequence[EncodedPair], share_prefix: bool) -> Batch:
    """As many microbatches as pairs."""
    parts = [pack([one], share_prefix=share_prefix, size=128) for one in some]
    return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


# --- against a plain computation: one side a row, all logits at once ---


@functools.partial(jax.jit, static_argnums=1)
def plain_loss_and_grads(
    some: dict[str, jax.Array], section: LossSection, policy: Params, reference: Params
) -> tuple[jax.Array, Params]:
    def token_logps(weights: Params) -> jax.Array:
        tokens = some["tokens"]
        slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden = forward(
            weights,
            model(),
            tokens,
            slots,
            jnp.zeros_like(slots),
            slots + 1,
            ForwardOptions(attention="dense"),
        )
        logps = jax.nn.log_softmax(
            jnp.einsum("BTD,VD->BTV", hidden, head_weight(weights)), axis=-1
        )[:, :-1]
        return jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]

    def sums(weights: Params, share: jax.Array) -> jax.Array:
        return jnp.sum(token_logps(weights) * share, axis=1).reshape(-1, 2)

    def loss(policy: Params) -> jax.Array:
        share = some["answer"] * jnp.where(
            some["common"] > 0, 1.0, 1.0 if section.ld_alpha is None else section.ld_alpha
        )
        ours, theirs = sums(policy, share), jax.lax.stop_gradient(sums(reference, share))
        lengths = some["answer"].sum(1).reshape(-1, 2)
        seen = PairLogps(
            chosen_logps_P=ours[:, 0],
            rejected_logps_P=ours[:, 1],
            ref_chosen_logps_P=theirs[:, 0],
            ref_rejected_logps_P=theirs[:, 1],
            chosen_lengths_P=lengths[:, 0],
            rejected_lengths_P=lengths[:, 1],
            mask_P=jnp.ones_like(lengths[:, 0]),
            chosen_nll_P=-sums(policy, some["answer"])[:, 0],
        )
        terms, w = registry.numerators(seen, section), some["weights"]
        return jnp.vdot(w, terms.pairs_P) / w.sum() + jnp.vdot(w, terms.chosen_tokens_P) / jnp.vdot(
            w, lengths[:, 0]
        )

    return jax.value_and_grad(loss)(policy)


def padded(some: Sequence[EncodedPair]) -> dict[str, jax.Array]:
    """Chosen and rejected of each pair as padded rows; masks over tokens 1 on."""
    tokens = np.zeros((2 * len(some), 64), np.int32)
    answer, common = (np.zeros((2 * len(some), 63), np.float32) for _ in range(2))
    for i, one in enumerate(some):
        shorter = min(len(one.chosen_ids), len(one.rejected_ids))
        for row, ids in enumerate((one.chosen_ids, one.rejected_ids), 2 * i):
            p, n = len(one.prompt_ids), len(ids)
            tokens[row, : p + n] = [*one.prompt_ids, *ids]
            answer[row, p - 1 : p + n - 1] = 1
            common[row, p - 1 : p - 1 + min(n, shorter)] = 1
    weights = np.array([one.weight for one in some], np.float32)
    return {
        key: jnp.asarray(x)
        for key, x in {
            "tokens": tokens,
            "answer": answer,
            "common": common,
            "weights": weights,
        }.items()
    }


class Frozen(LossSection):
    """A loss section that jit can take as static: lists make the plain one unhashable."""

    __hash__ = object.__hash__


def ours(loss: str, batch: Batch, **forward_options: Any) -> tuple[dict[str, float], Params]:
    """Metrics and gradients of a batch."""
    chunk = forward_options.pop("chunk", None)
    options = StepOptions(
        model=model(),
        loss=LOSSES[loss],
        optim=OptimSection(),
        forward=ForwardOptions(**forward_options),
        total_steps=1,
        chunk=chunk,
    )
    reference = params(1) if registry.needs_reference(LOSSES[loss]) else None
    sums, grads = jax.jit(
        lambda policy, reference, batch: step.loss_and_grads(
            policy, FrozenState(reference=reference), batch, options
        )
    )(params(0), reference, batch)
    return host(step.averages(sums)), jax.device_get(grads)


@functools.cache
def packed(loss: str) -> tuple[dict[str, float], Params]:
    """The form that training uses: everything in one shared row."""
    return ours(loss, pack(pairs_for(loss), size=SIZE))


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of two trees, each leaf relative to its largest value."""
    leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(a - b).max() / max(1e-6, np.abs(b).max())) for a, b in leaves)


def same(got: tuple[dict[str, float], Params], wanted: tuple[dict[str, float], Params]) -> None:
    np.testing.assert_allclose(got[0]["loss"], wanted[0]["loss"], rtol=1e-6)
    for key, value in wanted[0].items():
        np.testing.assert_allclose(got[0][key], value, rtol=2e-6, atol=2e-6, err_msg=key)
    assert not wanted[1] or difference(got[1], wanted[1]) < 1e-5


@pytest.mark.parametrize("loss", ["mixed", pytest.param("aot", marks=pytest.mark.slow)])
def test_loss_and_gradients_equal_a_plain_padded_computation(loss: str) -> None:
    section = Frozen(
        **{
            field.name: getattr(LOSSES[loss], field.name)
            for field in dataclasses.fields(LossSection)
        }
    )
    value, grads = plain_loss_and_grads(padded(pairs_for(loss)), section, params(0), params(1))
    np.testing.assert_allclose(packed(loss)[0]["loss"], value, rtol=1e-6)
    assert difference(packed(loss)[1], jax.device_get(grads)) < 1e-5


@pytest.mark.parametrize("loss", ["mixed", pytest.param("wpo", marks=pytest.mark.slow)])
def test_separate_sequences_give_the_same_as_shared_prefixes(loss: str) -> None:
    same(ours(loss, pack(pairs_for(loss), share_prefix=False, size=SIZE)), packed(loss))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_cuts_shared_prompts_where_it_cuts_separate_ones(name: str) -> None:
    config = tiny(name)  # whose window of 9 tokens is shorter than most prompts
    shared, separate = (
        Stepper(Setup(config=config, share_prefix=share_prefix, size=256))
        for share_prefix in (True, False)
    )
    some = pairs(4, low=12, high=20)
    same((shared.train(shared.pack(some)), {}), (separate.train(separate.pack(some)), {}))
    wide = Stepper(Setup(config=dataclasses.replace(config, sliding_window=10), size=256))
    assert (
        abs(
            wide.train(wide.pack(some))["loss"] / separate.evaluate(separate.pack(some))["loss"] - 1
        )
        > 1e-4
    )


@pytest.mark.parametrize(
    "loss",
    [
        "mixed",
        pytest.param("aot", marks=pytest.mark.slow),
        pytest.param("wpo", marks=pytest.mark.slow),
        pytest.param("simpo", marks=pytest.mark.slow),
    ],
)
def test_gradient_accumulation_of_one_pair_a_microbatch_gives_the_same(loss: str) -> None:
    batch = one_pair_a_row(pairs_for(loss), True)
    assert batch.tokens_MBT.shape[0] == len(EQUAL)
    same(ours(loss, batch), packed(loss))


@pytest.mark.slow
def test_gradient_accumulation_over_separate_sequences_with_dense_attention_gives_the_same() -> (
    None
):
    same(ours("mixed", one_pair_a_row(WEIGHTED, False), attention="dense"), packed("mixed"))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [100, SIZE])
def test_the_chunk_size_does_not_matter(chunk: int) -> None:
    same(ours("mixed", pack(WEIGHTED, size=SIZE), chunk=chunk), packed("mixed"))


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_remat_does_not_matter(remat: str) -> None:
    same(ours("mixed", pack(WEIGHTED, size=SIZE), remat=remat), packed("mixed"))


@pytest.mark.slow
def test_blocks_and_dense_agree_in_bfloat16_and_stay_near_float32() -> None:
    exact, blocks, dense = (
        packed("simpo"),
        *(
            ours("simpo", pack(WEIGHTED, size=SIZE), compute_dtype="bfloat16", attention=name)
            for name in ("blocks", "dense")
        ),
    )
    for got in (blocks, dense):
        np.testing.assert_allclose(got[0]["loss"], exact[0]["loss"], rtol=0.05)
        assert {leaf.dtype for leaf in jax.tree.leaves(got[1])} == {np.dtype("float32")}
    cosines = [
        float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
        for got in (blocks, dense)
        for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(exact[1]), strict=True)
    ]
    assert min(cosines) > 0.99


@pytest.mark.slow
def test_padding_and_weights_of_zero_change_nothing() -> None:
    same(ours("mixed", pack(WEIGHTED, size=SIZE, places=13)), packed("mixed"))
    extra = [*WEIGHTED, dataclasses.replace(pair(5, 6, 7), weight=0.0)]
    more = ours("mixed", pack(extra, size=SIZE))
    np.testing.assert_allclose(more[0]["loss"], packed("mixed")[0]["loss"], rtol=1e-6)
    assert difference(more[1], packed("mixed")[1]) < 1e-5


@pytest.mark.slow
def test_a_weight_of_two_is_the_pair_twice() -> None:
    once = ours("mixed", pack([dataclasses.replace(EQUAL[0], weight=2.0), EQUAL[1]], size=512))
    twice = ours("mixed", pack([EQUAL[0], EQUAL[0], EQUAL[1]], size=512))
    np.testing.assert_allclose(once[0]["loss"], twice[0]["loss"], rtol=1e-6)
    assert difference(once[1], twice[1]) < 1e-5


# --- many devices ---


@functools.cache
def ten_steps(
    sizes: tuple[int, int, int],
) -> tuple[list[dict[str, float]], dict[str, float], Params]:
    run = Stepper(
        Setup(
            mesh=sizes,
            size=256 if sizes != (1, 1, 1) else SIZE,
            optim=OptimSection(learning_rate=1e-3, weight_decay=0.1),
        )
    )
    batch = run.pack(EQUAL)
    metrics = [run.train(batch) for _ in range(10)]
    return metrics, run.evaluate(batch), jax.tree.map(np.asarray, run.state.params)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        (2, 2, 2),
    ],
    ids=str,
)
def test_eight_devices_train_as_one_does(sizes: tuple[int, int, int]) -> None:
    got, wanted = ten_steps(sizes), ten_steps((1, 1, 1))
    assert (
        wanted[0][-1]["loss"] < 0.5 * wanted[0][0]["loss"]
    )  # it has moved far from where it began
    for mine, theirs in zip([*got[0], got[1]], [*wanted[0], wanted[1]], strict=True):
        for key, value in theirs.items():
            np.testing.assert_allclose(mine[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    assert difference(got[2], wanted[2]) < 1e-5


# --- what a step does to its state ---


@pytest.fixture(scope="module")
def stepper() -> Stepper:
    """Of the sigmoid loss; each test resets it to the weights it began with."""
    return Stepper(Setup(), policy=params(0), reference=params(0))


def snapshot(stepper: Stepper) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves((stepper.state.params, stepper.state.opt))]


def test_policy_equal_to_reference_gives_rewards_of_exactly_zero(stepper: Stepper) -> None:
    stepper.reset()
    first = stepper.train(stepper.pack(WEIGHTED))
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/accuracies"] == 0
    assert first["rewards/accuracies_ties_half"] == 0.5
    assert stepper.evaluate(stepper.pack(WEIGHTED))["kl/token_exact"] > 0


def test_a_step_that_is_not_applied_measures_and_changes_nothing(stepper: Stepper) -> None:
    stepper.reset()
    before = snapshot(stepper)
    measured = stepper.train(stepper.pack(WEIGHTED), apply=False)
    assert all(np.array_equal(a, b) for a, b in zip(snapshot(stepper), before, strict=True))
    assert int(stepper.state.step) == int(stepper.state.bad_steps) == 0
    assert stepper.train(stepper.pack(WEIGHTED)) == measured
    assert int(stepper.state.step) == 1 and not np.array_equal(snapshot(stepper)[0], before[0])


@pytest.mark.parametrize("weight", [np.inf, np.nan])
def test_a_nan_step_is_skipped_and_counted(stepper: Stepper, weight: float) -> None:
    stepper.reset()
    good, bad = (
        stepper.pack(WEIGHTED),
        stepper.pack([dataclasses.replace(EQUAL[0], weight=weight), *EQUAL[1:]]),
    )
    stepper.train(good)
    before = snapshot(stepper)
    for count in (1, 2):
        metrics = stepper.train(bad)
        assert (metrics["nonfinite"], metrics["bad_steps"]) == (1, count) and not np.isfinite(
            metrics["loss"]
        )
    assert all(np.array_equal(a, b) for a, b in zip(snapshot(stepper), before, strict=True))
    assert int(stepper.state.step) == 3  # the schedule goes on
    metrics = stepper.train(good)
    assert (metrics["nonfinite"], metrics["bad_steps"], int(stepper.state.bad_steps)) == (0, 0, 0)
    assert int(stepper.state.opt["count"]) == 2 and not np.array_equal(
        snapshot(stepper)[0], before[0]
    )


def test_an_infinite_gradient_is_skipped_although_the_loss_is_finite(stepper: Stepper) -> None:
    stepper.reset()
    huge = jax.tree.map(np.array, params(0))
    huge["head"]["weight"] *= np.float32(1e25)
    stepper.reset(huge)
    before = snapshot(stepper)
    metrics = stepper.train(stepper.pack(WEIGHTED))
    assert (
        metrics["nonfinite"] == 1
        and np.isfinite(metrics["loss"])
        and not np.isfinite(metrics["grad_norm"])
    )
    assert all(np.array_equal(a, b) for a, b in zip(snapshot(stepper), before, strict=True))


def test_the_state_given_is_donated(stepper: Stepper) -> None:
    stepper.reset()
    given = stepper.state
    stepper.train(stepper.pack(WEIGHTED))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.params, given.opt)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(stepper.reference))


def test_the_learning_rate_follows_the_schedule(stepper: Stepper) -> None:
    stepper.reset()
    rates = [stepper.train(stepper.pack(WEIGHTED))["learning_rate"] for _ in range(3)]
    np.testing.assert_allclose(
        rates, [1e-3 * (1 + np.cos(np.pi * k / 10)) / 2 for k in range(3)], rtol=1e-6
    )
