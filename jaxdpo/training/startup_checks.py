"""Startup checks: what a run has to pass before its first step.

The same run on all processes and as in its checkpoints, and room for checkpoints. That policy and
reference agree is checked in start_check.py.
"""

import json
from typing import Any

import jax
import numpy as np

from jaxdpo.checkpoints.arrays import Tree, num_bytes
from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.config import cli
from jaxdpo.distributed import processes
from jaxdpo.training import optim
from jaxdpo.training.identity import identity_changes
from jaxdpo.training.trainer import Trainer
from jaxdpo.utils import files
from jaxdpo.utils.tree import flatten

FREE_FIELDS = (
    "run_dir",
    # Names of what the identity compares by its content.
    "model.path",
    "model.revision",
    "lora.path",
    "data.train",
    "data.eval",
    "data.chat_template",
    # What is logged, stored and measured.
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


LENGTH_FIELDS = ("train.steps", "train.epochs")
"""Options that may change once all steps are done: the run then goes on."""


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


def check_same_run(trainer: Trainer, meta: dict[str, Any]) -> list[str]:
    """Refuse to resume a run with another config, model or data.

    Args:
        meta: of the checkpoint.

    Returns:
        What the user should know: that a finished run goes on for more steps.

    Raises:
        ValueError: with every difference.
    """
    fields = changed_fields(meta["config"], cli.to_dict(trainer.config))
    notes = []
    step, planned = meta["step"], meta["counters"].get("total_steps")
    if planned == trainer.total_steps:
        # train.steps in place of train.epochs, or the other way round: the same run.
        fields = [field for field in fields if field[0] not in LENGTH_FIELDS]
    elif planned == step < trainer.total_steps:
        notes.append(_more_steps(trainer, planned))
        fields = [field for field in fields if field[0] not in LENGTH_FIELDS]
    lines = []
    for path, old, new in fields:
        lines.append(f"  {path}: {old} in the checkpoint, {new} now")
        if path in LENGTH_FIELDS:
            lines[-1] += f". {_how_to_go_on(trainer, step, planned)}"
    for line in identity_changes(meta["identity"], trainer.identity):
        lines.append(f"  {line}")
    if lines:
        raise ValueError(
            f"run_dir={trainer.config.run_dir}: holds checkpoints of a different run:\n"
            + "\n".join(lines)
            + "\nSet these back, or use another run_dir"
        )
    return notes


def _more_steps(trainer: Trainer, done: int) -> str:
    """That a finished run goes on, and what that does to its learning rate."""
    section, total = trainer.config.optim, trainer.total_steps
    before, after = optim.schedule(section, done), optim.schedule(section, total)
    with jax.transfer_guard("allow"):
        last = np.asarray(before(done - 1)).item()
        following = np.asarray(after(done)).item()
    text = (
        f"the run was finished after step {done} and goes on to step {total}, with its weights, "
        "its optimizer and its reference as they are. "
        f"optim.schedule={section.schedule} is now that of {total} steps: the learning rate was "
        f"{last:.3g} in step {done} and is {following:.3g} in step {done + 1}"
    )
    if section.schedule != "constant":
        text += f", and falls to 0 at step {total}. A run of {total} steps from the start differs"
    return text


def _how_to_go_on(trainer: Trainer, step: int, planned: int | None) -> str:
    """What to do about another number of steps, which only a finished run may have."""
    if planned is not None and trainer.total_steps <= step:
        return f"{step} steps are done already, and this would be {trainer.total_steps}"
    return "A run may get more steps when it is finished: let it end first"


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
