"""The training loop: start or resume, then batch, step, log, evaluate, checkpoint, again.

The loop owns every side effect, in a fixed order. For each step:

1. the next batch, packed beforehand by the loader's threads
2. the step is dispatched; the metrics of the step before are logged while it runs
3. SIGTERM (preemption) or a request for a checkpoint, agreed on by all processes
4. evaluation, if due
5. checkpoint, if due or wanted, for a new best validation loss, or if the run stops

Step k describes update k, its loss taken before that update.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.checkpoints.run_lock import RunLock
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.distributed import processes
from jaxdpo.losses.registry import needs_reference
from jaxdpo.training.metric_logger import Logger
from jaxdpo.training.preemption import Interrupted, Stop, stop_on_signals
from jaxdpo.training.resume import start_or_resume
from jaxdpo.training.run import Run, is_due
from jaxdpo.training.run_files import describe, write_inputs
from jaxdpo.training.startup_checks import check_disk, check_processes_agree, check_same_run
from jaxdpo.training.trainer import Trainer
from jaxdpo.training.watchdog import Watchdog
from jaxdpo.utils.compile_cache import keep_compiled_programs

SAVE = 1
STOP = 2
"""Votes of the processes after a step, the highest of which counts; 0 is to go on."""


def train(config: Config, leave: Callable[[int], object] | None = None) -> bool:
    """Train as the config says, from the newest checkpoint if there is one.

    Args:
        leave: ends the process with an exit status, from any thread: 75 when SIGTERM finds nothing
            to save, 70 when a step hangs. None: signals take effect between steps and other parts
            only, and there is no watchdog.

    Returns:
        True at the end of training; False when SIGTERM or SIGINT stopped it, saved.

    Raises:
        ValueError: model, data, mesh or checkpoint cannot be used, or another process is using
            the run folder.
        OSError: the disk is full; earlier checkpoints are intact.
        Fault: training went wrong.
    """
    keep_compiled_programs(config.train.compilation_cache)
    with stop_on_signals(leave) as stop, RunLock(config.run_dir, cli.to_dict(config)) as lock:
        trainer = Trainer.open(config)
        if processes.any_of(stop.requested):
            return False
        check_processes_agree(trainer)
        lock.confirm()
        run_dir = Path(config.run_dir).expanduser()
        keep, keep_best = config.checkpoint.keep, config.checkpoint.keep_best
        with Checkpoints(config.run_dir, keep, keep_best) as checkpoints:
            newest = checkpoints.latest_step()
            notes = []
            if newest is not None:
                notes = check_same_run(trainer, checkpoints.read_meta(newest))
            warnings = [
                *notes,
                *checkpoints.incomplete(),
                *check_disk(trainer, checkpoints, newest),
                *trainer.warnings,
            ]
            write_inputs(trainer, run_dir)
            with Logger(
                run_dir,
                config.log,
                trainer.total_steps,
                newest,
                has_reference=needs_reference(config.loss),
            ) as logger:
                for warning in warnings:
                    logger.warn(warning)
                for line in describe(trainer):
                    logger.info(line)
                with Watchdog(run_dir, config.train.watchdog_minutes, leave) as watchdog:
                    return _train(trainer, logger, checkpoints, stop, watchdog)


def _train(
    trainer: Trainer, logger: Logger, checkpoints: Checkpoints, stop: Stop, watchdog: Watchdog
) -> bool:
    """Everything between the open log and its last line."""
    try:
        with watchdog.paused("start"):
            opened = start_or_resume(trainer, logger, checkpoints, stop)
    except Interrupted:
        logger.info("stopped; the reference log-probs computed so far are saved")
        return False
    with contextlib.closing(opened) as run:
        finished = loop(run, watchdog)
        with watchdog.paused("save"):
            checkpoints.wait()
        run.log_notes()
    if finished:
        ending = "done"
    elif stop.unsaved:
        ending = "stopped and saved"
    else:
        ending = "stopped; there was nothing new to save"
    logger.info(
        f"{ending}: step {run.step} of {trainer.total_steps}, checkpoints in {checkpoints.folder}"
    )
    return finished


def loop(run: Run, watchdog: Watchdog) -> bool:
    """Train to the last step; False when a signal asked to stop before it."""
    total = run.trainer.total_steps
    eval_every = run.config.eval.every or 0
    save_every = run.config.checkpoint.save_every
    votes = processes.Votes()
    # Always True here. The startup check runs the same compiled step with False, which measures
    # and leaves the weights as they are.
    apply = run.trainer.put_scalar(True, np.bool_)
    # Implicit transfers stall the devices, unnoticed, in every step; here they raise.
    with jax.transfer_guard("disallow"):
        # The starting policy, or a state whose evaluation a signal cut off.
        if not run.evaluated and _evaluation_due(run.step, total, eval_every):
            try:
                eval_loss = _evaluate(run, watchdog)
            except Interrupted:
                return False
            if run.step > 0:
                run.checkpoints.measured(run.step, eval_loss)

        batches = run.trainer.loader.stream(run.step + 1, total)
        run.logged_at = time.perf_counter()
        for step in range(run.step + 1, total + 1):
            watchdog.beat(step - 1, "train")

            # 1. The next batch.
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked

            # 2. Dispatch the step, and log the one before it.
            run.advance(step, batch, apply, waited)

            # 3. What the processes want. Read once: a signal that comes later is the next step's.
            vote = votes.cast(_vote(run.stop, watchdog))
            is_last = step == total
            stopping = vote == STOP and not is_last
            save_wanted = vote == SAVE

            # 4. Evaluation. A run that stops evaluates after it has resumed: preemption leaves
            # little time.
            eval_loss = None
            if _evaluation_due(step, total, eval_every) and not stopping:
                try:
                    eval_loss = _evaluate(run, watchdog)
                except Interrupted:
                    stopping = True

            # 5. Checkpoint.
            is_best = eval_loss is not None and run.checkpoints.is_best(eval_loss)
            if is_last or stopping or save_wanted or is_best or is_due(step, save_every):
                then = watchdog.saved if save_wanted else None
                with watchdog.paused("save"):
                    run.save(eval_loss, then)
            if stopping:
                return False
    return True


def _vote(stop: Stop, watchdog: Watchdog) -> int:
    """What this process wants after a step."""
    if stop.requested:
        return STOP
    if watchdog.save_wanted():
        return SAVE
    return 0


def _evaluation_due(step: int, total: int, every: int) -> bool:
    """Whether the state after this step is evaluated: every so many steps, and the last one."""
    return is_due(step, every) or (every > 0 and step == total)


def _evaluate(run: Run, watchdog: Watchdog) -> float:
    """The validation loss of the run's state.

    Raises:
        Interrupted: a signal came.
    """

    def poll(phase: str) -> None:
        watchdog.beat(run.step, phase)
        run.stop.poll()

    return run.evaluate(poll)
