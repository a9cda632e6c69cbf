"""A training run: start or resume, loop, evaluate, save, report.

The loop owns every side effect, in a fixed order: next batch, step, metrics of the step before, evaluation, save.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.data.packing import Batch
from jaxdpo.data.prepare import summary
from jaxdpo.distributed import processes
from jaxdpo.losses.registry import needs_reference
from jaxdpo.models.hf.folder import copy_model_files
from jaxdpo.models.params import Params
from jaxdpo.training.evaluate import evaluate, sample_answers
from jaxdpo.training.metric_logger import JsonLines, Logger
from jaxdpo.training.preemption import Interrupted, Stop, stop_on_signals
from jaxdpo.training.program import checkpoint_tree
from jaxdpo.training.reference_cache import CachedLogps
from jaxdpo.training.startup_checks import (
    Fault,
    check_closed_form,
    check_disk,
    check_processes_agree,
    check_same_run,
)
from jaxdpo.training.step import FrozenState, TrainState, move_reference
from jaxdpo.training.trainer import Trainer
from jaxdpo.training.watchdog import Watch
from jaxdpo.utils.compile_cache import keep_compiled_programs

MAX_BAD_STEPS = 3
SAVE, STOP = 1, 2  # what a process may want after a step; of several wishes the highest counts


@dataclasses.dataclass
class Run:
    """A run in progress: what the loop changes, and where it reports."""

    session: Trainer
    logger: Logger
    checkpoints: Checkpoints
    stop: Stop
    samples: JsonLines
    """samples.jsonl: answers at each evaluation."""
    skipped: JsonLines
    """nonfinite.jsonl: the ids of the pairs of each update that was skipped."""
    state: TrainState
    fixed: FrozenState
    cached: CachedLogps | None
    step: int = 0
    """Updates done."""
    tokens: int = 0
    """Tokens trained on, over all steps."""
    evaluated: bool = False
    """Whether the state that the run starts from was evaluated already."""
    pending: tuple[int, dict[str, jax.Array], int, float] | None = None
    """The newest step's number, metrics on the device, slots and seconds spent waiting for its batch; reported one step late."""
    reported_at: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.session.config

    def advance(self, step: int, batch: Batch, apply: jax.Array, waited: float) -> None:
        """Dispatch one update, then report the one before it, which the devices have finished by then."""
        fixed = self.fixed_for(step, batch)
        self.state, metrics = self.session.train_step(
            self.state, fixed, self.session.put_batch(batch), apply
        )
        previous, self.pending = self.pending, (step, metrics, batch.tokens_MBT.size, waited)
        self.step, self.stop.unsaved = step, True
        if self.fixed.reference is not None and _due(step, self.config.loss.ref_sync_every):
            self.fixed = self.fixed._replace(
                reference=move_reference(self.fixed.reference, self.state.params, self.config.loss)
            )
        self._report(previous)

    def fixed_for(self, step: int, batch: Batch) -> FrozenState:
        """What the step on this batch takes beside the state."""
        logps = (
            None if self.cached is None else self.cached.train[self.session.loader.pairs_of(step)]
        )
        return self.session.with_logps(self.fixed, logps, batch)

    def flush(self) -> None:
        """Report the newest step; the log is then up to date."""
        pending, self.pending = self.pending, None
        self._report(pending)

    def _report(self, pending: tuple[int, dict[str, jax.Array], int, float] | None) -> None:
        if pending is None:
            return
        step, on_device, num_slots, waited = pending
        metrics = {key: value.item() for key, value in jax.device_get(on_device).items()}
        now = time.perf_counter()
        seconds, self.reported_at = now - self.reported_at, now
        num_pairs, num_tokens = (
            len(self.session.loader.pairs_of(step)),
            self.session.loader.num_tokens(step),
        )
        self.tokens += num_tokens
        bad_steps = int(metrics.pop("bad_steps"))
        mfu = self.session.mfu(step, seconds)
        self.logger.log(
            step,
            {"epoch": self.session.loader.epoch(step)}
            | metrics
            | {
                "tokens": self.tokens,
                "padding_fraction": 1.0 - num_tokens / num_slots,
                "step_seconds": seconds,
                "pairs_per_second": num_pairs / seconds,
                "tokens_per_second": num_tokens / seconds,
                "wait_fraction": min(1.0, waited / seconds),
            }
            | ({} if mfu is None else {"mfu": mfu}),
        )
        if metrics["nonfinite"]:
            self._skipped(step, bad_steps)

    def _skipped(self, step: int, bad_steps: int) -> None:
        """Note which pairs a skipped update was to learn from; stop when several in a row were skipped."""
        self.skipped.write(
            {
                "step": step,
                "ids": [
                    str(self.session.data.train.ids[i]) for i in self.session.loader.pairs_of(step)
                ],
            }
        )
        self.logger.warn(
            f"step {step}: loss or gradient is not finite; the update was skipped. nonfinite.jsonl has the ids of its pairs"
        )
        if bad_steps >= MAX_BAD_STEPS:
            raise Fault(
                f"{bad_steps} steps in a row had no finite loss or gradient. The weights are as they were before them. "
                "Lower optim.learning_rate, set model.compute_dtype=float32, or look at the pairs in nonfinite.jsonl"
            )

    def evaluate(self, poll: Callable[[str], None]) -> float:
        """Measure on the validation pairs and log it; returns the validation loss.

        Raises:
            Interrupted: by `poll`, which is called between the parts with what is being done; nothing was logged then.
        """
        self.flush()
        started = time.perf_counter()
        means = evaluate(
            self.session, self.state.params, self.fixed, self.cached, lambda: poll("evaluation")
        )
        samples = sample_answers(
            self.session, self.state.params, self.fixed, lambda: poll("samples")
        )
        for sample in samples:
            self.samples.write({"step": self.step, **sample})
        self.logger.evaluation(self.step, means | {"seconds": time.perf_counter() - started})
        self.reported_at = time.perf_counter()
        return means["loss"]

    def save(self, eval_loss: float | None, then: Callable[[], object] = lambda: None) -> None:
        """Save the step in the background, after all its metrics are on disk; `then` is called when it is on disk itself."""
        self.flush()
        self.logger.flush()
        moving = self.fixed.reference if self.config.loss.ref_sync_every else None
        meta = {
            "config": cli.to_dict(self.config),
            "identity": self.session.identity,
            "position": {"step": self.step, "epoch": self.session.loader.epoch(self.step)},
            "counters": {"tokens": self.tokens},
        }
        self.checkpoints.save(self.step, checkpoint_tree(self.state, moving), meta, eval_loss, then)
        self.tell_notes()
        self.reported_at = time.perf_counter()

    def tell_notes(self) -> None:
        """Tell what was found wrong with checkpoints."""
        while self.checkpoints.notes:
            self.logger.warn(self.checkpoints.notes.pop(0))

    def close(self) -> None:
        """Close the files that a run opens itself."""
        self.samples.close()
        self.skipped.close()


def train(config: Config, leave: Callable[[int], object] | None = None) -> bool:
    """Train as the config says, from the newest checkpoint if there is one; False when a signal stopped it, saved.

    Args:
        leave: how a thread may end the process with a status: where a signal finds nothing to save (75), and where a step does not
            end (70). None: signals are looked at between steps and other parts alone, and there is no watchdog.

    Raises:
        ValueError: model, data, mesh or checkpoint cannot be used.
        OSError: the disk is full; earlier checkpoints are intact.
        Fault: training went wrong.
    """
    keep_compiled_programs(config.train.compilation_cache)
    with stop_on_signals(leave) as stop:
        session = Trainer.open(config)
        if processes.any_of(stop.requested):
            return False
        check_processes_agree(session)
        with Checkpoints(
            config.run_dir, config.checkpoint.keep, config.checkpoint.keep_best
        ) as checkpoints:
            newest = checkpoints.latest_step()
            if newest is not None:
                check_same_run(session, checkpoints.read_meta(newest))
            notes = [
                *checkpoints.incomplete(),
                *check_disk(session, checkpoints, newest),
                *session.warnings,
            ]
            run_dir = Path(config.run_dir).expanduser()
            write_inputs(session, run_dir)
            with Logger(
                run_dir,
                config.log,
                session.total_steps,
                newest,
                has_reference=needs_reference(config.loss),
            ) as logger:
                for note in notes:
                    logger.warn(note)
                for line in describe(session):
                    logger.info(line)
                with Watch(run_dir, config.train.watchdog_minutes, leave) as watch:
                    return _train(session, logger, checkpoints, stop, watch)


def _train(
    session: Trainer, logger: Logger, checkpoints: Checkpoints, stop: Stop, watch: Watch
) -> bool:
    try:
        with watch.paused("start"):
            opened = begin(session, logger, checkpoints, stop)
    except Interrupted:
        logger.info("stopped; what was computed of the reference is kept")
        return False
    with contextlib.closing(opened) as run:
        finished = loop(run, watch)
        with watch.paused("save"):
            checkpoints.wait()
        run.tell_notes()
    ending = (
        "done"
        if finished
        else "stopped and saved"
        if stop.unsaved
        else "stopped; there was nothing new to save"
    )
    logger.info(
        f"{ending}: step {run.step} of {session.total_steps}, checkpoints in {checkpoints.folder}"
    )
    return finished


def begin(session: Trainer, logger: Logger, checkpoints: Checkpoints, stop: Stop) -> Run:
    """Weights onto the devices: the starting policy and its reference, or the newest checkpoint.

    A cached reference is computed, or read and verified, before a checkpoint is restored, so that no policy but the first is near it.

    Raises:
        Interrupted: a signal came while it was computed.
    """
    weights, newest = session.weights, checkpoints.latest_step()
    base = weights.base()
    params = weights.initial() if newest is None else None
    cached = None
    if weights.reference_kind == "cached":
        view = functools.partial(_start_view, session, params, base)
        cached = session.cache_reference(
            view, logger.info, lambda: processes.any_of(stop.requested)
        )
    if params is not None:
        files = _files(session, None, None)
        run = Run(session, logger, checkpoints, stop, *files, *session.start(params, base), cached)
        batch = session.loader.batch(1)
        run.state = check_closed_form(session, run.state, run.fixed_for(1, batch), batch)
        return run
    moves = bool(session.config.loss.ref_sync_every)
    restored = checkpoints.restore(session.abstract_state(with_reference=moves))
    assert restored is not None, "the newest step was there a moment ago"
    step, tree, meta = restored
    for note in checkpoints.notes:
        logger.warn(note)
    checkpoints.notes.clear()
    evaluated = meta["eval_loss"] is not None or processes.from_first(logger.evaluated(step))
    files = _files(session, step, step if evaluated else step - 1)
    fixed = FrozenState(base, tree.pop("reference") if moves else session.reference_again(base))
    logger.info(f"resuming after step {step}")
    counters = {"step": step, "tokens": meta["counters"]["tokens"], "evaluated": evaluated}
    return Run(
        session, logger, checkpoints, stop, *files, TrainState(**tree), fixed, cached, **counters
    )


def _files(
    session: Trainer, step: int | None, sampled_step: int | None
) -> tuple[JsonLines, JsonLines]:
    """samples.jsonl and nonfinite.jsonl, with the rows up to these steps."""
    run_dir = Path(session.config.run_dir).expanduser()
    return JsonLines(run_dir / "samples.jsonl", sampled_step), JsonLines(
        run_dir / "nonfinite.jsonl", step
    )


def _start_view(session: Trainer, params: Params | None, base: Params | None) -> Params:
    """The reference whose log-probs are to be cached; loaded where no policy is at its start."""
    weights = session.weights
    return weights.start_view(weights.initial() if params is None else params, base)


def loop(run: Run, watch: Watch) -> bool:
    """Train to the last step; False when a signal asked to stop before."""
    config, total, stop, votes = run.config, run.session.total_steps, run.stop, processes.Votes()
    apply = run.session.put_scalar(True, np.bool_)
    with jax.transfer_guard("disallow"):
        # The first state, or one that a signal left no time for.
        if (
            _due(run.step, config.eval.every) or (run.step == total and config.eval.every)
        ) and not run.evaluated:
            try:
                _evaluate(run, watch)
            except Interrupted:
                return False
        batches = run.session.loader.stream(run.step + 1, total)
        run.reported_at = time.perf_counter()
        for step in range(run.step + 1, total + 1):
            watch.beat(step - 1, "train")
            asked = time.perf_counter()
            batch = next(batches)
            run.advance(step, batch, apply, time.perf_counter() - asked)
            wish = votes.cast(STOP if stop.requested else SAVE if watch.save_wanted() else 0)
            last = step == total
            stopping = (
                wish == STOP and not last
            )  # looked at once: a signal after this line is the next step's
            eval_loss = None
            if (last and config.eval.every > 0) or (_due(step, config.eval.every) and not stopping):
                try:
                    eval_loss = _evaluate(run, watch)
                except Interrupted:
                    stopping = True
            if last or stopping or wish == SAVE or _due(step, config.checkpoint.save_every):
                with watch.paused("save"):
                    run.save(eval_loss, watch.saved if wish == SAVE else lambda: None)
            if stopping:
                return False
    return True


def _evaluate(run: Run, watch: Watch) -> float:
    """The validation loss of the run's state.

    Raises:
        Interrupted: a signal came.
    """

    def poll(phase: str) -> None:
        watch.beat(run.step, phase)
        run.stop.poll()

    return run.evaluate(poll)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def write_inputs(session: Trainer, run_dir: Path) -> None:
    """config.yaml, data_report.json and model/ (config and tokenizer) of the run folder."""
    if not processes.is_first():
        return
    template = session.config.data.chat_template
    (run_dir / "config.yaml").write_text(cli.to_yaml(session.config), encoding="utf-8")
    (run_dir / "data_report.json").write_text(
        json.dumps(session.data.report, indent=1), encoding="utf-8"
    )
    text = None if template is None else Path(template).expanduser().read_text(encoding="utf-8")
    copy_model_files(session.folder, run_dir / "model", text)


def describe(session: Trainer) -> list[str]:
    """What is about to run, as lines for the console."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items())
    loader, forward = session.loader, session.options.forward
    prompts = "shared" if session.config.data.share_prefix else "separate"
    return [
        f"model: {session.model.family}, {session.weights.num_all():,} parameters, {forward.compute_dtype} products, remat {forward.remat}",
        *session.notes,
        f"devices: {session.mesh.size} {session.mesh.devices.flat[0].device_kind} ({mesh})",
        *summary(session.data.report),
        f"steps: {session.total_steps} of {loader.batch_size} pairs, {loader.steps_per_epoch} an epoch; "
        f"rows of {', '.join(map(str, loader.packer.packed_lengths))} tokens ({prompts} prompts)",
    ]
