"""The start check: before the first step, policy and reference are the same model.

Their log-probs of the first step's answers are compared, answer by answer, in nats and before any
beta: a mean over pairs hides differences that cancel, and beta 0.01 hides a hundred times more. A
resume compares the reference with the log-probs that its start has left in the checkpoint.

docs/losses.md says what this proves, and what it cannot.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.data.packing import Batch
from jaxdpo.losses import registry
from jaxdpo.losses.registry import needs_reference
from jaxdpo.training.startup_checks import Fault
from jaxdpo.training.state import FrozenState, TrainState
from jaxdpo.training.step_metrics import PAIR_LOGPS
from jaxdpo.training.trainer import Trainer

FLOOR = 1e-3
"""Nats that any two float32 programs may differ by, for answers of some tens of tokens."""
ROUNDINGS_PER_TOKEN = 8
"""How many roundings (eps of the compute dtype) a token's log-prob may be off by: 0.06 nats in
bfloat16. The roundings of an answer's tokens add up as their square root."""
ROUNDINGS_OF_SUM = 32
"""How many float32 roundings the sum over an answer may be off by, which grow with the sum."""
CLOSED_FORM_TOLERANCE = 1e-3
"""Relative, above 1; else absolute: the loss is a sum of float32 numbers."""
SIDES = ("chosen", "rejected")


def tolerance(logps: np.ndarray, lengths: np.ndarray, dtype: str) -> np.ndarray:
    """By how much the log-probs of the same answers under the same weights may differ, nats.

    Args:
        logps: of the answers.
        lengths: their completion tokens; the same shape.
        dtype: model.compute_dtype.

    >>> tolerance(np.array([-50.0]), np.array([25]), "float32").round(4).tolist()
    [0.0012]
    >>> tolerance(np.array([-50.0]), np.array([25]), "bfloat16").round(2).tolist()
    [0.31]
    """
    per_token = ROUNDINGS_PER_TOKEN * float(jnp.finfo(dtype).eps)
    of_sum = ROUNDINGS_OF_SUM * float(jnp.finfo("float32").eps)
    return FLOOR + per_token * np.sqrt(lengths) + of_sum * np.abs(logps)


def check_start(
    trainer: Trainer, state: TrainState, fixed: FrozenState, batch: Batch
) -> tuple[TrainState, list | None]:
    """Before the first update, policy and reference agree on every answer of the first step.

    The first step is computed and not applied. Where the log-probs are the same bits, the loss is
    compared with its known value too: ln 2 for DPO, `closed_form` of the losses' registry.

    Args:
        state: donated to the step.
        fixed, batch: what the first step takes.

    Returns:
        (the state as it was, the reference's log-probs [pairs, 2] for `check_resume`, nats; None
        where the loss reads no reference.)

    Raises:
        Fault: they differ, so the run would train on something else than it should.
    """
    if not needs_reference(trainer.config.loss):
        return state, None
    state, logps, values = _measured(trainer, state, fixed, batch)
    policy, reference = logps[..., 0], logps[..., 1]
    if found := _difference(trainer, policy, reference, "the policy", "the reference"):
        raise Fault(
            f"policy and reference should agree before the first step, but {found}. "
            "Likely causes: weights that hold NaN or overflow in model.compute_dtype "
            "(try float32), a damaged reference_cache/ in the run folder (delete it), "
            "or memory damaged on this machine. Nothing was trained"
        )
    if not math.isfinite(values["loss"]):
        raise Fault(
            f"policy and reference agree before the first step, but the loss is {values['loss']}. "
            "Look at the loss options and at the columns weight and margin of the first pairs. "
            "Nothing was trained"
        )
    known = _known_loss(trainer, values)
    if known is not None and np.array_equal(policy, reference):
        loss = values["loss"]
        if abs(loss - known) > CLOSED_FORM_TOLERANCE * max(1.0, abs(known)):
            raise Fault(
                f"policy and reference agree before the first step, but loss is {loss:.6g}, not "
                f"{known:.6g}. Likely cause: memory damaged on this machine. Nothing was trained"
            )
    return state, reference.tolist()


def check_resume(
    trainer: Trainer, state: TrainState, fixed: FrozenState, batch: Batch, known: list | None
) -> TrainState:
    """On a resume, the reference gives the first step's answers what it gave them at the start.

    The policy has moved since, and nothing is known of it but what its checkpoint's manifest
    proves. Nothing is compared where the reference moves too (loss.ref_sync_every).

    Args:
        state: donated to the step.
        fixed, batch: what the first step takes.
        known: as `check_start` returned it.

    Returns:
        The state as it was.

    Raises:
        Fault: it does not.
    """
    if known is None or trainer.config.loss.ref_sync_every:
        return state
    state, logps, _ = _measured(trainer, state, fixed, batch)
    reference, before = logps[..., 1], np.asarray(known, np.float32)
    if found := _difference(trainer, reference, before, "the reference now", "it at the start"):
        raise Fault(
            f"the reference is not the one that this run started with: {found}. Likely causes: "
            "a damaged reference_cache/ in the run folder (delete it), or memory damaged on this "
            "machine. Nothing was trained since the checkpoint"
        )
    return state


def _measured(
    trainer: Trainer, state: TrainState, fixed: FrozenState, batch: Batch
) -> tuple[TrainState, np.ndarray, dict[str, float]]:
    """Log-probs of the first step's pairs [pairs, 2, 2 (policy, reference)], and its metrics."""
    apply = trainer.put_scalar(False, np.bool_)
    state, metrics = trainer.train_step(state, fixed, trainer.put_batch(batch), apply)
    found = jax.device_get(metrics)
    logps = found.pop(PAIR_LOGPS)[: len(trainer.loader.pairs_of(1))]
    return state, logps, {key: value.item() for key, value in found.items()}


def _difference(
    trainer: Trainer, ours: np.ndarray, theirs: np.ndarray, our_name: str, their_name: str
) -> str | None:
    """Which answer's log-probs [pairs, 2] differ most beyond rounding; None if none do."""
    pairs = trainer.loader.pairs_of(1)
    lengths = trainer.data.train.lengths[pairs, 1:]
    dtype = trainer.config.model.compute_dtype
    allowed = tolerance(np.where(np.isfinite(theirs), theirs, 0.0), lengths, dtype)
    excess = np.abs(ours - theirs) / allowed
    excess = np.where(np.isfinite(excess), excess, np.inf)  # NaN agrees with nothing
    if (excess <= 1.0).all():
        return None
    row, side = np.unravel_index(np.argmax(excess), excess.shape)
    return (
        f"the {SIDES[side]} answer of pair {trainer.data.train.ids[int(pairs[row])]} "
        f"({lengths[row, side]} tokens) has {ours[row, side]:.6g} nats under {our_name} and "
        f"{theirs[row, side]:.6g} under {their_name}, where rounding in {dtype} explains "
        f"{allowed[row, side]:.2g}; {int((excess > 1.0).sum())} of {excess.size} answers differ"
    )


def _known_loss(trainer: Trainer, values: dict[str, float]) -> float | None:
    """The loss where policy and reference agree; None where it depends on the data.

    Args:
        values: the metrics that were measured: the router's balance, a part of the loss, is not
            known beforehand.
    """
    section = trainer.config.loss
    forms = registry.closed_forms(section)
    depends_on_data = section.wpo or bool(trainer.data.train.margins.any())
    if len(forms) < len(section.names) or depends_on_data:
        return None
    weights = section.weights or [1.0] * len(section.names)
    loss = (section.router_aux_coef or 0.0) * values.get("router/balance", 0.0)
    for name, weight in zip(section.names, weights, strict=True):
        loss += weight * forms[name]
    return loss
