"""Startup checks: what a run has to pass before its first step.

The same run on all processes and as in its checkpoints, room for checkpoints, and the ln 2 check:
policy and reference agree.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdpo.checkpoints.arrays import Tree, num_bytes
from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.config import cli
from jaxdpo.data.packing import Batch
from jaxdpo.distributed import processes
from jaxdpo.losses import registry
from jaxdpo.losses.registry import needs_reference
from jaxdpo.training.state import FrozenState, TrainState
from jaxdpo.training.trainer import Trainer
from jaxdpo.utils import files
from jaxdpo.utils.tree import flatten

CLOSED_FORM_TOLERANCE = 1e-3

FREE_FIELDS = (
    "run_dir",
    "checkpoint.",
    "eval.",
    "log.",
    "train.compilation_cache",
    "train.watchdog_minutes",
    "data.cache",
    "data.num_proc",
    # From here on: where and in which order the same sums are computed. The result is the same up
    # to rounding.
    "mesh.",
    "train.offload",
    "model.attention",
    "model.remat",
    "data.share_prefix",
    "data.packed_length",
    "data.num_packed_lengths",
    # Guards that the run has passed already.
    "data.max_dropped_fraction",
    "data.missing_eos",
)
"""Options that may change between a run and its resume; "mesh." stands for the whole section."""


class Fault(Exception):
    """The run cannot go on; the message says why and what to do."""


def check_processes_agree(trainer: Trainer) -> None:
    """Processes that do not run the same steps would wait for each other for ever.

    Raises:
        ValueError: with what is not the same on all of them.
    """
    known = trainer.identity | {
        "config": json.dumps(cli.to_dict(trainer.config), sort_keys=True),
        "number of steps": str(trainer.total_steps),
        "validation pairs": trainer.data.eval.fingerprint(),
    }
    if found := processes.differing(known):
        raise ValueError(
            f"the {jax.process_count()} processes of this run do not have the same "
            f"{', '.join(found)}. Start all with the same options, on the same files and the same "
            "version of jaxdpo"
        )


def check_same_run(trainer: Trainer, meta: dict[str, Any]) -> None:
    """Refuse to resume a run with another config, model or data.

    Args:
        meta: of the checkpoint.

    Raises:
        ValueError: with every difference.
    """
    lines = []
    for path, old, new in changed_fields(meta["config"], cli.to_dict(trainer.config)):
        lines.append(f"  {path}: {old} in the checkpoint, {new} now")
    for key, now in trainer.identity.items():
        before = meta["identity"].get(key, "none")
        if before != now:
            hashes = f"hash {before[:12]}, now {now[:12]}"
            lines.append(f"  {key}: not what the checkpoint was trained with ({hashes})")
    if lines:
        raise ValueError(
            f"run_dir={trainer.config.run_dir}: holds checkpoints of a different run:\n"
            + "\n".join(lines)
            + "\nSet these back, or use another run_dir"
        )


def changed_fields(saved: Tree, current: Tree) -> list[tuple[str, Any, Any]]:
    """Options that differ from a checkpoint's config and change what is computed.

    Args:
        saved: the config in a checkpoint's meta, as nested dict.
        current: the config of this run, as nested dict.

    Returns:
        (path, saved value, current value) of each, by path; "(absent)" stands for an option that
        one side lacks.
    """
    old = flatten(saved)
    new = flatten(json.loads(json.dumps(current)))  # as the checkpoint's went through JSON
    changed = []
    for path in sorted(old.keys() | new.keys()):
        before, now = old.get(path, "(absent)"), new.get(path, "(absent)")
        if before != now and not _is_free(path):
            changed.append((path, before, now))
    return changed


def _is_free(path: str) -> bool:
    """Whether FREE_FIELDS has the option, or its section."""
    for field in FREE_FIELDS:
        if path == field or (field.endswith(".") and path.startswith(field)):
            return True
    return False


def check_disk(trainer: Trainer, checkpoints: Checkpoints, newest: int | None) -> list[str]:
    """Find out now whether checkpoints will fit, and whether a small one comes back from the folder
    as it was saved; returns warnings.

    Args:
        newest: step of the newest checkpoint.

    Raises:
        ValueError: the next one will not.
    """
    if newest == trainer.total_steps:
        return []
    section = trainer.config.checkpoint
    moves = bool(trainer.config.loss.ref_sync_every)
    size = num_bytes(trainer.abstract_state(with_reference=moves))
    # While a checkpoint is written, those that it will replace are still there.
    num_more = max(1, section.keep + section.keep_best + 1 - checkpoints.count())
    warning = processes.on_first(
        lambda: files.check_room(checkpoints.folder, trainer.config.run_dir, size, num_more)
    )
    checkpoints.prove()
    return [] if warning is None else [warning]


def check_closed_form(
    trainer: Trainer, state: TrainState, fixed: FrozenState, batch: Batch
) -> TrainState:
    """The ln 2 check: before the first update the loss has a known value, and rewards are 0.

    Policy and reference agree then: the loss is ln 2 for DPO, and `closed_form` of the losses'
    registry for others. The first step is computed and not applied.

    Args:
        state: donated to the step.
        fixed, batch: what the first step takes.

    Returns:
        The state as it was.

    Raises:
        Fault: they differ, so the run would train on something else than it should.
    """
    if not needs_reference(trainer.config.loss):
        return state
    apply = trainer.put_scalar(False, np.bool_)
    state, metrics = trainer.train_step(state, fixed, trainer.put_batch(batch), apply)
    values = {key: value.item() for key, value in jax.device_get(metrics).items()}
    wrong = []
    for key, known in _known_metrics(trainer, values).items():
        is_near = abs(values[key] - known) <= CLOSED_FORM_TOLERANCE * max(1.0, abs(known))
        if not is_near:  # a NaN is near nothing
            wrong.append(f"{key} is {values[key]:.6g}, not {known:.6g}")
    if wrong:
        raise Fault(
            f"policy and reference should agree before the first step, but {', '.join(wrong)}. "
            "Likely causes: weights that hold NaN or overflow in model.compute_dtype "
            "(try float32), or memory damaged on this machine. Nothing was trained"
        )
    return state


def _known_metrics(trainer: Trainer, values: Mapping[str, float]) -> dict[str, float]:
    """What metrics must be where policy and reference agree.

    Args:
        values: the metrics that were measured: the router's balance, a part of the loss, is not
            known beforehand.
    """
    section = trainer.config.loss
    known = {}
    forms = registry.closed_forms(section)
    depends_on_data = section.wpo or bool(trainer.data.train.margins.any())
    if len(forms) == len(section.names) and not depends_on_data:
        weights = section.weights or [1.0] * len(section.names)
        loss = (section.router_aux_coef or 0.0) * values.get("router/balance", 0.0)
        for name, weight in zip(section.names, weights, strict=True):
            loss += weight * forms[name]
        known["loss"] = loss
    known["rewards/chosen"] = known["rewards/rejected"] = 0.0
    return known
