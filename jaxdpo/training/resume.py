"""The first state of a run: the starting policy and its reference, or the newest checkpoint.

A resume needs no position in the data: the step says it, as the order of the pairs of each epoch
follows from the seed (data/loader.py).
"""

import functools
from pathlib import Path

from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.distributed import processes
from jaxdpo.models.params import Params
from jaxdpo.training.metric_logger import JsonLines, Logger
from jaxdpo.training.preemption import Stop
from jaxdpo.training.reference_cache import CachedLogps
from jaxdpo.training.run import Run
from jaxdpo.training.start_check import check_resume, check_start
from jaxdpo.training.state import FrozenState, TrainState
from jaxdpo.training.trainer import Trainer


def start_or_resume(trainer: Trainer, logger: Logger, checkpoints: Checkpoints, stop: Stop) -> Run:
    """Load the weights onto the devices: from the newest checkpoint, if there is one.

    Raises:
        Interrupted: SIGTERM came while a cached reference was computed.
        Fault: policy and reference do not agree before the first step.
    """
    weights, newest = trainer.weights, checkpoints.latest_step()
    base = weights.base()
    params = weights.initial() if newest is None else None
    cached = None
    if weights.reference_kind == "cached":
        # Before a checkpoint is restored: the reference is the starting policy and no later one.
        cached = trainer.cache_reference(
            functools.partial(_starting_policy, trainer, params, base),
            logger.info,
            lambda: processes.any_of(stop.requested),
        )
    if params is None:
        return _resume(trainer, logger, checkpoints, stop, base, cached)
    samples, skipped = _open_logs(trainer, None, None)
    state, frozen = trainer.start(params, base)
    run = Run(trainer, logger, checkpoints, stop, samples, skipped, state, frozen, cached)
    batch = trainer.loader.batch(1)
    frozen_1 = run.frozen_for(1, batch)
    run.state, run.start_logps = check_start(trainer, run.state, frozen_1, batch)
    if run.start_logps is not None:
        run.compiled.add(batch.tokens_MBT.shape)
    return run


def _resume(
    trainer: Trainer,
    logger: Logger,
    checkpoints: Checkpoints,
    stop: Stop,
    base: Params | None,
    cached: CachedLogps | None,
) -> Run:
    """The run as its newest checkpoint left it."""
    # TR-DPO moves the reference, so it is in the checkpoint; otherwise it is loaded again.
    synced = bool(trainer.config.loss.ref_sync_every)
    restored = checkpoints.restore(trainer.abstract_state(with_reference=synced))
    assert restored is not None, "the newest step was there a moment ago"
    step, tree, meta = restored
    for note in checkpoints.notes:
        logger.warn(note)
    checkpoints.notes.clear()
    reference = tree.pop("reference") if synced else trainer.reference_again(base)

    # A signal may have cut off the evaluation of this step: it is then repeated, samples included.
    evaluated = meta["eval_loss"] is not None or processes.from_first(logger.evaluated(step))
    samples, skipped = _open_logs(trainer, step if evaluated else step - 1, step)
    logger.info(f"resuming after step {step}")
    run = Run(
        trainer,
        logger,
        checkpoints,
        stop,
        samples,
        skipped,
        TrainState(**tree),
        FrozenState(base, reference),
        cached,
        step=step,
        start_logps=meta["start_logps"],
        tokens=meta["counters"]["tokens"],
        evaluated=evaluated,
    )
    if step < trainer.total_steps:
        batch = trainer.loader.batch(1)
        frozen_1 = run.frozen_for(1, batch)
        run.state = check_resume(trainer, run.state, frozen_1, batch, run.start_logps)
    return run


def _open_logs(
    trainer: Trainer, sampled_step: int | None, step: int | None
) -> tuple[JsonLines, JsonLines]:
    """samples.jsonl and nonfinite.jsonl, cut after these steps."""
    folder = Path(trainer.config.run_dir).expanduser()
    samples = JsonLines(folder / "samples.jsonl", sampled_step)
    return samples, JsonLines(folder / "nonfinite.jsonl", step)


def _starting_policy(trainer: Trainer, params: Params | None, base: Params | None) -> Params:
    """The reference to cache; on a resume, which has no policy yet, the policy is loaded for it."""
    weights = trainer.weights
    return weights.start_view(weights.initial() if params is None else params, base)
