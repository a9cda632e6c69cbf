"""Which slots hold tokens, and the loss that spreads them over experts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.data.packing import Batch
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward_moe
from jaxdpo.models.moe import balance_loss
from jaxdpo.models.params import Params
from jaxdpo.training import step
from jaxdpo.training.completion_logps import StepOptions, token_mask
from jaxdpo.training.state import FrozenState
from tests.families import tiny
from tests.tiny import Setup, Stepper, host, pack, pair, pairs, params

MOE = tiny("qwen3_moe")
SOME = pairs(4, low=2, high=20, vocab=96)
SIZE = 256  # holds all of them


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_token_mask_is_true_where_pairs_are_packed(share_prefix: bool) -> None:
    batch = pack(SOME, share_prefix=share_prefix, num_rows=2, size=128)
    again = 1 if not share_prefix else 0
    taken = sum(len(one) + again * len(one.prompt_ids) for one in SOME)
    real = np.asarray(token_mask(batch))
    assert real.shape == batch.tokens_MBT.shape and real.sum() == taken
    assert (np.diff(real.astype(int), axis=-1) <= 0).all()  # from the row's start
    assert not np.asarray(batch.tokens_MBT)[~real].any()


def test_the_token_mask_of_an_empty_sequence_and_of_completions_of_one_token() -> None:
    batch = pack([pair(1, 1, 1)], num_rows=2, size=64)
    assert np.asarray(token_mask(batch)).sum(axis=-1).tolist() == [[3, 0]] or np.asarray(
        token_mask(batch)
    ).sum(axis=-1).tolist() == [[0, 3]]


@functools.cache
def program(coef: float) -> Callable[..., Any]:
    options = StepOptions(
        model=MOE,
        loss=LossSection(router_aux_coef=coef),
        optim=OptimSection(),
        forward=ForwardOptions(),
        total_steps=1,
    )
    return jax.jit(lambda policy, fixed, batch: step.loss_and_grads(policy, fixed, batch, options))


def loss_and_grads(batch: Batch, coef: float) -> tuple[dict[str, float], Params]:
    sums, grads = program(coef)(params(0, MOE), FrozenState(reference=params(1, MOE)), batch)
    return host(step.averages(sums)), jax.device_get(grads)


@jax.jit
def balance(policy: Params, micro: Batch) -> jax.Array:
    slots = (micro.tokens_MBT, micro.positions_MBT, micro.k_start_MBT, micro.k_end_MBT)
    _, load = forward_moe(policy, MOE, *slots, ForwardOptions(), token_mask(micro))
    assert load is not None
    return balance_loss(load)


@pytest.mark.slow
def test_the_router_loss_is_added_with_its_weight() -> None:
    batch = pack(SOME, size=SIZE)
    (plain, plain_grads), (more, grads) = loss_and_grads(batch, 0.0), loss_and_grads(batch, 0.5)
    micro: Any = jax.tree.map(lambda x: x[0], batch)
    assert batch.tokens_MBT.shape[0] == 1
    value, wanted = jax.value_and_grad(balance)(params(0, MOE), micro)
    assert (
        plain["router/balance"]
        == pytest.approx(more["router/balance"])
        == pytest.approx(float(value), rel=1e-6)
    )
    assert (
        plain["router/balance"] > MOE.experts_per_token
    )  # as evenly as can be would give just that
    assert more["loss"] - plain["loss"] == pytest.approx(0.5 * float(value), rel=1e-5)
    for mine, without, own in zip(*map(jax.tree.leaves, (grads, plain_grads, wanted)), strict=True):
        np.testing.assert_allclose(mine - without, 0.5 * np.asarray(own), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_microbatches_count_by_their_tokens() -> None:
    parts = [pack([one], size=64) for one in SOME]
    batch = Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    each = [
        float(balance(params(0, MOE), jax.tree.map(lambda x, m=m: jnp.asarray(x[m]), batch)))
        for m in range(len(SOME))
    ]
    wanted = np.average(each, weights=[len(one) for one in SOME])
    metrics, _ = loss_and_grads(batch, 1.0)
    assert metrics["router/balance"] == pytest.approx(wanted, rel=1e-5)
    assert metrics["loss"] == pytest.approx(
        loss_and_grads(batch, 0.0)[0]["loss"] + wanted, rel=1e-5
    )


@pytest.mark.slow
def test_padding_counts_nowhere() -> None:
    near, far = (loss_and_grads(pack(SOME, size=size), 1.0) for size in (SIZE, 320))
    assert near[0] == pytest.approx(far[0], rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_a_coupled_loss_has_the_router_loss_too() -> None:
    batch = pack(SOME, size=SIZE)
    setup = Setup(config=MOE, loss=LossSection(name="aot"), size=SIZE)
    without = Stepper(setup).train(Stepper(setup).put(batch))
    run = Stepper(dataclasses.replace(setup, loss=LossSection(name="aot", router_aux_coef=2.0)))
    with_it = run.train(run.put(batch))
    assert with_it["loss"] == pytest.approx(
        without["loss"] + 2.0 * without["router/balance"], rel=1e-5
    )
    assert with_it["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)
    run.reset()
    assert run.evaluate(run.put(batch))["loss"] == pytest.approx(with_it["loss"], rel=1e-5)
