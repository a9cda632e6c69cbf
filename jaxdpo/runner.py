"""A training run: start or resume, loop, evaluate, save, report.

The loop owns every side effect, in a fixed order: next batch, step, metrics of the step before, evaluation, save.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from jaxdpo import losses, options
from jaxdpo.checkpoint import Checkpoints, changed_fields
from jaxdpo.config import Config
from jaxdpo.data.packing import Batch
from jaxdpo.data.prepare import summary
from jaxdpo.metrics import JsonLines, Logger
from jaxdpo.models.decoder import Params
from jaxdpo.models.hf_folder import copy_model_files
from jaxdpo.reference import CachedLogps, Interrupted
from jaxdpo.session import Session, checkpoint_tree
from jaxdpo.step import Fixed, TrainState, move_reference, needs_reference

MAX_BAD_STEPS = 3
CLOSED_FORM_TOLERANCE = 1e-3


class Fault(Exception):
    """The run cannot go on; the message says why and what to do."""


class Stop:
    """Set by SIGTERM or Ctrl-C: finish the step, save and leave. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        del frame
        signal.signal(number, signal.SIG_DFL)
        self.requested = True
        os.write(2, b"\nstopping after this step; signal again to stop at once\n")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within it SIGTERM and SIGINT ask for a stop instead of ending the process."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class Run:
    """A run in progress: what the loop changes, and where it reports."""

    session: Session
    logger: Logger
    checkpoints: Checkpoints
    samples: JsonLines
    """samples.jsonl: answers at each evaluation."""
    skipped: JsonLines
    """nonfinite.jsonl: the ids of the pairs of each update that was skipped."""
    state: TrainState
    fixed: Fixed
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
        self.state, metrics = self.session.train_step(self.state, fixed, self.session.put_batch(batch), apply)
        previous, self.pending = self.pending, (step, metrics, batch.tokens_MBT.size, waited)
        self.step = step
        if self.fixed.reference is not None and _due(step, self.config.loss.tr_every):
            self.fixed = self.fixed._replace(reference=move_reference(self.fixed.reference, self.state.params, self.config.loss))
        self._report(previous)

    def fixed_for(self, step: int, batch: Batch) -> Fixed:
        """What the step on this batch takes beside the state."""
        logps = None if self.cached is None else self.cached.train[self.session.loader.pairs_of(step)]
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
        num_pairs, num_tokens = len(self.session.loader.pairs_of(step)), self.session.loader.num_tokens(step)
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
        self.skipped.write({"step": step, "ids": [str(self.session.data.train.ids[i]) for i in self.session.loader.pairs_of(step)]})
        self.logger.warn(f"step {step}: loss or gradient is not finite; the update was skipped. nonfinite.jsonl has the ids of its pairs")
        if bad_steps >= MAX_BAD_STEPS:
            raise Fault(
                f"{bad_steps} steps in a row had no finite loss or gradient. The weights are as they were before them. "
                "Lower optim.learning_rate, set model.compute_dtype=float32, or look at the pairs in nonfinite.jsonl"
            )

    def evaluate(self) -> float:
        """Measure on the validation pairs and log it; returns the validation loss."""
        self.flush()
        started = time.perf_counter()
        means = self.session.evaluate(self.state.params, self.fixed, self.cached)
        for sample in self.session.samples(self.state.params, self.fixed):
            self.samples.write({"step": self.step, **sample})
        self.logger.evaluation(self.step, means | {"seconds": time.perf_counter() - started})
        self.reported_at = time.perf_counter()
        return means["loss"]

    def save(self, eval_loss: float | None) -> None:
        """Save the step in the background, after all its metrics are on disk."""
        self.flush()
        self.logger.flush()
        moving = self.fixed.reference if self.config.loss.tr_every else None
        meta = {
            "config": options.to_dict(self.config),
            "identity": self.session.identity,
            "position": {"step": self.step, "epoch": self.session.loader.epoch(self.step)},
            "counters": {"tokens": self.tokens},
        }
        self.checkpoints.save(self.step, checkpoint_tree(self.state, moving), meta, eval_loss)
        self.reported_at = time.perf_counter()

    def close(self) -> None:
        """Close the files that a run opens itself."""
        self.samples.close()
        self.skipped.close()


def train(config: Config) -> bool:
    """Train as the config says, from the newest checkpoint if there is one; False when a signal stopped it, saved.

    Raises:
        ValueError: model, data, mesh or checkpoint cannot be used.
        Fault: training went wrong.
    """
    run_dir = Path(config.run_dir).expanduser()
    keep_compiled_programs(config.train.compilation_cache)
    session = Session.open(config)
    with stop_on_signals() as stop, Checkpoints(run_dir, config.checkpoint.keep, config.checkpoint.keep_best) as checkpoints:
        newest = checkpoints.latest_step()
        if newest is not None:
            check_same_run(session, checkpoints.read_meta(newest))
        write_inputs(session, run_dir)
        with Logger(run_dir, config.log, session.total_steps, newest, has_reference=needs_reference(config.loss)) as logger:
            for note in [*checkpoints.notes, *session.warnings]:
                logger.warn(note)
            for line in describe(session):
                logger.info(line)
            try:
                opened = begin(session, logger, checkpoints, stop)
            except Interrupted:
                logger.info("stopped; what was computed of the reference is kept")
                return False
            with contextlib.closing(opened) as run:
                finished = loop(run, stop)
            checkpoints.wait()
            logger.info(
                f"{'done' if finished else 'stopped and saved'}: step {run.step} of {session.total_steps}, checkpoints in {run_dir}"
            )
    return finished


def begin(session: Session, logger: Logger, checkpoints: Checkpoints, stop: Stop) -> Run:
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
        cached = session.cache_reference(view, logger.info, lambda: stop.requested)
    run_dir = Path(session.config.run_dir).expanduser()
    samples, skipped = (JsonLines(run_dir / f"{name}.jsonl", newest) for name in ("samples", "nonfinite"))
    if params is not None:
        run = Run(session, logger, checkpoints, samples, skipped, *session.start(params, base), cached)
        check_closed_form(run)
        return run
    moves = bool(session.config.loss.tr_every)
    restored = checkpoints.restore(session.abstract_state(with_reference=moves))
    assert restored is not None, "the newest step was there a moment ago"
    step, tree, meta = restored
    fixed = Fixed(base, tree.pop("reference") if moves else session.reference_again(base))
    logger.info(f"resuming after step {step}")
    counters = {"step": step, "tokens": meta["counters"]["tokens"], "evaluated": meta["eval_loss"] is not None}
    return Run(session, logger, checkpoints, samples, skipped, TrainState(**tree), fixed, cached, **counters)


def _start_view(session: Session, params: Params | None, base: Params | None) -> Params:
    """The reference whose log-probs are to be cached; loaded where no policy is at its start."""
    weights = session.weights
    return weights.start_view(weights.initial() if params is None else params, base)


def loop(run: Run, stop: Stop) -> bool:
    """Train to the last step; False when a signal asked to stop before."""
    config, total = run.config, run.session.total_steps
    apply = run.session.put_scalar(True, np.bool_)
    with jax.transfer_guard("disallow"):
        if _due(run.step, config.eval.every) and not run.evaluated:  # the first state, or one that a signal left no time for
            run.evaluate()
        batches = run.session.loader.stream(run.step + 1, total)
        run.reported_at = time.perf_counter()
        for step in range(run.step + 1, total + 1):
            asked = time.perf_counter()
            batch = next(batches)
            run.advance(step, batch, apply, time.perf_counter() - asked)
            last = step == total
            stopping = stop.requested and not last  # looked at once: a signal after this line is the next step's
            due = (last and config.eval.every > 0) or (_due(step, config.eval.every) and not stopping)
            eval_loss = run.evaluate() if due else None
            if last or stopping or _due(step, config.checkpoint.save_every):
                run.save(eval_loss)
            if stopping:
                return False
    return True


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_closed_form(run: Run) -> None:
    """Before the first update, policy and reference agree: the loss then has a known value and rewards are 0.

    Raises:
        Fault: they differ, so the run would train on something else than it should.
    """
    section, session = run.config.loss, run.session
    if not needs_reference(section):
        return
    batch = session.loader.batch(1)
    apply = session.put_scalar(False, np.bool_)
    run.state, metrics = session.train_step(run.state, run.fixed_for(1, batch), session.put_batch(batch), apply)
    values = {key: value.item() for key, value in jax.device_get(metrics).items()}
    forms, weights = losses.closed_forms(section), section.weights or [1.0] * len(section.names)
    expected = (
        sum(weight * forms[name] for name, weight in zip(section.names, weights, strict=True)) if len(forms) == len(weights) else None
    )
    known = {"rewards/chosen": 0.0, "rewards/rejected": 0.0}
    if expected is not None and not section.wpo:
        balance = (section.router_aux_coef or 0.0) * values.get("router/balance", 0.0)
        known = {"loss": expected + balance} | known
    near = {key: abs(values[key] - value) <= CLOSED_FORM_TOLERANCE * max(1.0, abs(value)) for key, value in known.items()}
    off = [f"{key} is {values[key]:.6g}, not {known[key]:.6g}" for key in known if not near[key]]  # a NaN is near nothing
    if off:
        raise Fault(
            f"policy and reference should agree before the first step, but {', '.join(off)}. Likely causes: weights that hold NaN or "
            "overflow in model.compute_dtype (try float32), or memory damaged on this machine. Nothing was trained"
        )


def check_same_run(session: Session, meta: dict[str, Any]) -> None:
    """Refuse to resume a run with another config, model or data.

    Raises:
        ValueError: with every difference.
    """
    changed = changed_fields(meta["config"], options.to_dict(session.config))
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


def write_inputs(session: Session, run_dir: Path) -> None:
    """config.yaml, data_report.json and model/ (config and tokenizer) of the run folder."""
    if jax.process_index() != 0:
        return
    template = session.config.data.chat_template
    (run_dir / "config.yaml").write_text(options.to_yaml(session.config), encoding="utf-8")
    (run_dir / "data_report.json").write_text(json.dumps(session.data.report, indent=1), encoding="utf-8")
    text = None if template is None else Path(template).expanduser().read_text(encoding="utf-8")
    copy_model_files(session.folder, run_dir / "model", text)


def describe(session: Session) -> list[str]:
    """What is about to run, as lines for the console."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items())
    loader, forward = session.loader, session.options.forward
    return [
        f"model: {session.model.family}, {session.weights.num_all():,} parameters, {forward.compute_dtype} products, remat {forward.remat}",
        *session.notes,
        f"devices: {session.mesh.size} {session.mesh.devices.flat[0].device_kind} ({mesh})",
        *summary(session.data.report),
        f"steps: {session.total_steps} of {loader.pairs_per_step} pairs, {loader.steps_per_epoch} an epoch; "
        f"rows of {', '.join(map(str, loader.packer.row_sizes))} tokens ({session.config.data.layout} prompts)",
    ]


def keep_compiled_programs(folder: str | None) -> None:
    """Keep compiled programs on disk, so that the next start finds them."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
