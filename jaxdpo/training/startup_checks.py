"""What a run has to pass before its first step: the same run on all processes and as before, room for checkpoints, a right reference."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxdpo.checkpoints.checkpoint import Checkpoints, Tree, num_bytes
from jaxdpo.config import cli
from jaxdpo.data.packing import Batch
from jaxdpo.distributed import processes
from jaxdpo.losses import registry
from jaxdpo.losses.registry import needs_reference
from jaxdpo.training.step import FrozenState, TrainState
from jaxdpo.training.trainer import Trainer
from jaxdpo.utils import files

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
    # From here on: where and in which order the same sums are computed. The result is the same up to rounding.
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
"""Options that may change between a run and its resume (those ending in a dot: the whole section)."""


class Fault(Exception):
    """The run cannot go on; the message says why and what to do."""


def check_processes_agree(session: Trainer) -> None:
    """Processes that do not run the same steps would wait for each other for ever.

    Raises:
        ValueError: with what is not the same on all of them.
    """
    known = session.identity | {
        "config": json.dumps(cli.to_dict(session.config), sort_keys=True),
        "number of steps": str(session.total_steps),
        "validation pairs": session.data.eval.fingerprint(),
    }
    if found := processes.differing(known):
        raise ValueError(
            f"the {jax.process_count()} processes of this run do not have the same {', '.join(found)}. "
            "Start all with the same options, on the same files and the same version of jaxdpo"
        )


def check_same_run(session: Trainer, meta: dict[str, Any]) -> None:
    """Refuse to resume a run with another config, model or data.

    Raises:
        ValueError: with every difference.
    """
    changed = changed_fields(meta["config"], cli.to_dict(session.config))
    lines = [f"{path}: {old} in the checkpoint, {new} now" for path, old, new in changed]
    lines += [
        f"{key}: not what the checkpoint was trained with (hash {before[:12]}, now {now[:12]})"
        for key, now in session.identity.items()
        if (before := meta["identity"].get(key, "none")) != now
    ]
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise ValueError(
            f"run_dir={session.config.run_dir}: holds checkpoints of a different run:\n{listed}\nSet these back, or use another run_dir"
        )


def changed_fields(saved: Tree, current: Tree) -> list[tuple[str, Any, Any]]:
    """Options that differ between a checkpoint's config and the current one and change what is computed.

    Args:
        saved: the config in a checkpoint's meta, as nested dict.
        current: the config of this run, as nested dict.

    Returns:
        (path, saved value, current value) of each, by path; "(absent)" stands for an option that one side lacks.
    """
    old, new = dict(_flat(saved)), dict(_flat(json.loads(json.dumps(current))))
    pairs = [
        (path, old.get(path, "(absent)"), new.get(path, "(absent)"))
        for path in sorted(old.keys() | new.keys())
    ]
    return [(path, a, b) for path, a, b in pairs if a != b and not _is_free(path)]


def _flat(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_free(path: str) -> bool:
    return any(
        path.startswith(free) if free.endswith(".") else path == free for free in FREE_FIELDS
    )


def check_disk(session: Trainer, checkpoints: Checkpoints, newest: int | None) -> list[str]:
    """Find out now whether checkpoints will fit; warnings.

    Raises:
        ValueError: the next one will not.
    """
    if newest == session.total_steps:
        return []
    section = session.config.checkpoint
    size = num_bytes(
        session.abstract_state(with_reference=bool(session.config.loss.ref_sync_every))
    )
    num_more = max(1, section.keep + section.keep_best + 1 - checkpoints.count())
    warning = processes.on_first(
        lambda: files.check_room(checkpoints.folder, session.config.run_dir, size, num_more)
    )
    return [] if warning is None else [warning]


def check_closed_form(
    session: Trainer, state: TrainState, fixed: FrozenState, batch: Batch
) -> TrainState:
    """Before the first update, policy and reference agree: the loss then has a known value and rewards are 0.

    Args:
        state: given up to the step.
        fixed, batch: what the first step takes.

    Returns:
        The state as it was.

    Raises:
        Fault: they differ, so the run would train on something else than it should.
    """
    section = session.config.loss
    if not needs_reference(section):
        return state
    apply = session.put_scalar(False, np.bool_)
    state, metrics = session.train_step(state, fixed, session.put_batch(batch), apply)
    values = {key: value.item() for key, value in jax.device_get(metrics).items()}
    forms, weights = registry.closed_forms(section), section.weights or [1.0] * len(section.names)
    expected = (
        sum(weight * forms[name] for name, weight in zip(section.names, weights, strict=True))
        if len(forms) == len(weights)
        else None
    )
    known = {"rewards/chosen": 0.0, "rewards/rejected": 0.0}
    if expected is not None and not section.wpo and not session.data.train.margins.any():
        balance = (section.router_aux_coef or 0.0) * values.get("router/balance", 0.0)
        known = {"loss": expected + balance} | known
    near = {
        key: abs(values[key] - value) <= CLOSED_FORM_TOLERANCE * max(1.0, abs(value))
        for key, value in known.items()
    }
    off = [
        f"{key} is {values[key]:.6g}, not {known[key]:.6g}" for key in known if not near[key]
    ]  # a NaN is near nothing
    if off:
        raise Fault(
            f"policy and reference should agree before the first step, but {', '.join(off)}. Likely causes: weights that hold NaN or "
            "overflow in model.compute_dtype (try float32), or memory damaged on this machine. Nothing was trained"
        )
    return state
