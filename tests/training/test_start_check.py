"""The start check: policy and reference are the same model, answer by answer, in nats."""

import itertools
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.losses.registry import LOSSES, needs_reference
from jaxdpo.training.completion_logps import CompletionLogps
from jaxdpo.training.loop import train
from jaxdpo.training.start_check import check_resume, check_start, tolerance
from jaxdpo.training.startup_checks import Fault
from jaxdpo.training.state import FrozenState
from jaxdpo.training.step_loss import loss_sums
from jaxdpo.training.step_metrics import PAIR_LOGPS, averages, logps_of_pairs, metric_sums
from jaxdpo.training.trainer import Trainer
from tests.runs import interrupt, metrics, settings
from tests.tiny import Setup, Stepper, pack, pairs, params, table

PAIRS = pairs(4, seed=3)
BATCH = pack(PAIRS)
LOGPS = np.random.default_rng(0).uniform(-90, -5, (4, 2)).astype(np.float32)
MICRO = jax.tree.map(lambda x: x[0], BATCH)


def trainer_of(section: LossSection, reference: np.ndarray, dtype: str = "float32") -> Any:
    """What the check reads of a trainer: its step is the loss of these log-probs, and no model."""
    policy = jnp.asarray(LOGPS[BATCH.index_MBP[0]])

    def train_step(state: Any, fixed: Any, batch: Any, apply: Any) -> Any:
        collisions = policy * 1.5 if section.wpo else None
        ours = CompletionLogps(policy, policy, collisions, None)
        theirs = jnp.asarray(reference[BATCH.index_MBP[0]])
        sums = metric_sums(ours, theirs, MICRO, section)
        ours_M, theirs_M = jax.tree.map(lambda x: x[None], (ours, theirs))
        sums |= loss_sums(ours_M, theirs_M, BATCH, section)
        found = averages(sums)
        return state, found | {PAIR_LOGPS: logps_of_pairs(ours, theirs, MICRO)}

    model, loader = types.SimpleNamespace(compute_dtype=dtype), types.SimpleNamespace()
    loader.pairs_of = lambda step: np.arange(4)
    return types.SimpleNamespace(
        config=types.SimpleNamespace(loss=section, model=model),
        loader=loader,
        data=types.SimpleNamespace(train=table(PAIRS)),
        train_step=train_step,
        put_batch=lambda batch: batch,
        put_scalar=lambda value, dtype: value,
    )


def start(section: LossSection, reference: np.ndarray, dtype: str = "float32") -> list | None:
    trainer = trainer_of(section, reference, dtype)
    state: Any = None
    return check_start(trainer, state, FrozenState(), BATCH)[1]


@pytest.mark.parametrize("first", LOSSES)
def test_every_ordered_pair_of_two_losses_passes_the_start_check(first: str) -> None:
    for second in LOSSES:
        names = [first] if first == second else [first, second]
        section = LossSection(name=names)
        found = start(section, LOGPS)
        assert (found is not None) == needs_reference(section)
        assert found is None or found == LOGPS.tolist()


@pytest.mark.parametrize(
    "section",
    [
        LossSection(beta=0.01),
        LossSection(beta=1e-5),
        LossSection(name=["simpo", "sigmoid"]),
        LossSection(name=["sft", "ipo"], weights=[1.0, 1e-6]),
        LossSection(name="aot"),
        LossSection(ld_alpha=0.5, wpo=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [0.19, -0.19, 0.01, np.nan, np.inf])
def test_a_reference_off_in_one_answer_fails_whatever_the_loss(
    section: LossSection, size: float
) -> None:
    for pair, side in itertools.product(range(4), range(2)):
        reference = LOGPS.copy()
        reference[pair, side] += np.float32(size)
        name = ("chosen", "rejected")[side]
        with pytest.raises(Fault, match=rf"the {name} answer of pair {pair} .*; 1 of 8 answers"):
            start(section, reference)


def test_differences_that_cancel_in_the_mean_fail() -> None:
    apart = np.array([[0.19], [-0.19], [0.19], [-0.19]], np.float32)
    with pytest.raises(Fault, match="8 of 8 answers differ"):
        start(LossSection(beta=0.01), LOGPS + apart)


def test_rounding_passes_and_more_of_it_in_bfloat16() -> None:
    rng = np.random.default_rng(1)
    last_digits = LOGPS + rng.uniform(-1e-4, 1e-4, LOGPS.shape).astype(np.float32)
    assert start(LossSection(), last_digits) is not None
    assert start(LossSection(name="dpop", beta=5.0), last_digits) is not None
    coarse = LOGPS + rng.uniform(-0.05, 0.05, LOGPS.shape).astype(np.float32)
    with pytest.raises(Fault, match="rounding in float32"):
        start(LossSection(), coarse)
    assert start(LossSection(), coarse, "bfloat16") is not None
    assert tolerance(np.array(-40.0), np.array(9), "bfloat16") < 0.19


def test_a_loss_that_is_not_what_it_must_be_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxdpo.losses.registry.LN2", 0.7)
    with pytest.raises(Fault, match=r"but loss is 0\.693147, not 0\.7"):
        start(LossSection(), LOGPS)


@pytest.mark.parametrize("size", [0.19, np.nan])
def test_a_resume_refuses_another_reference(size: float) -> None:
    trainer = trainer_of(LossSection(), LOGPS + np.float32(1.0))
    state: Any = None
    check_resume(trainer, state, FrozenState(), BATCH, (LOGPS + np.float32(1.0)).tolist())
    off = LOGPS + np.float32(1.0)
    off[2, 1] += np.float32(size)
    with pytest.raises(Fault, match=r"not the one that this run started with: the rejected answer"):
        check_resume(trainer, state, FrozenState(), BATCH, off.tolist())
    # Nothing to compare: a loss without a reference, or one that moves.
    check_resume(trainer, state, FrozenState(), BATCH, None)
    moving = trainer_of(LossSection(ref_sync_every=1), LOGPS)
    check_resume(moving, state, FrozenState(), BATCH, off.tolist())


@pytest.mark.slow
def test_the_step_gives_the_log_probs_of_each_pair_at_its_number() -> None:
    stepper = Stepper(Setup(), policy=params(0), reference=params(1))
    some = pairs(5, low=3, high=9)
    found = {}
    for size, places in ((1024, 5), (32, 7)):
        batch = stepper.put(pack(some, size=size, places=places))
        _, metrics = stepper.train_step(stepper.state, stepper.frozen, batch, np.asarray(False))
        found[size] = np.asarray(metrics[PAIR_LOGPS])
        stepper.reset()
    whole, parts = found.values()
    assert whole.shape == (5, 2, 2) and parts.shape == (7, 2, 2) and not parts[5:].any()
    np.testing.assert_allclose(whole, parts[:5], rtol=1e-5)
    assert (np.abs(whole[..., 0] - whole[..., 1]) > 0.01).all() and len(np.unique(whole)) == 20


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("names", [["simpo", "sigmoid"], ["cpo", "sigmoid"], ["orpo", "ipo"]])
def test_runs_of_mixed_losses_start(shared: Path, tmp_path: Path, names: list[str]) -> None:
    some = settings(shared, tmp_path, loss__name=names, train__steps=1, eval__every=0)
    assert train(some) is True
    assert len(metrics(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("kind", ["frozen", "cached"])
def test_a_resumed_run_finds_that_its_reference_is_another(
    shared: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = settings(shared, tmp_path, reference=kind, eval__every=0, loss__beta=0.01)
    interrupt(some, 3)
    with monkeypatch.context() as patch:
        put = Trainer.with_logps
        if kind == "cached":
            patch.setattr(
                Trainer,
                "with_logps",
                lambda self, fixed, logps, batch: put(self, fixed, logps + np.float32(0.19), batch),
            )
        else:
            again = Trainer.reference_again
            patch.setattr(
                Trainer,
                "reference_again",
                lambda self, base: jax.tree.map(lambda w: 1.02 * w, again(self, base)),
            )
        with pytest.raises(Fault, match="not the one that this run started with"):
            train(some)
    assert train(some) is True
