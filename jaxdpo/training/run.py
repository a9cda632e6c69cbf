"""A run in progress: its state on the devices, and the files in which it records what it does."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.data.packing import Batch
from jaxdpo.training.evaluate import evaluate, sample_answers
from jaxdpo.training.metric_logger import JsonLines, Logger
from jaxdpo.training.preemption import Stop
from jaxdpo.training.program import checkpoint_tree
from jaxdpo.training.ref_sync import sync_reference
from jaxdpo.training.reference_cache import CachedLogps
from jaxdpo.training.startup_checks import Fault
from jaxdpo.training.state import FrozenState, TrainState
from jaxdpo.training.step_metrics import PAIR_LOGPS
from jaxdpo.training.trainer import Trainer

MAX_BAD_STEPS = 3
"""Consecutive steps with a NaN or infinite loss or gradient after which a run stops: one bad batch
is skipped, but weights that overflow do so in every step."""


class Pending(NamedTuple):
    """A step that was dispatched and is not logged yet."""

    step: int
    metrics: dict[str, jax.Array]
    """Scalars on the devices."""
    num_positions: int
    """Token positions of its batch, padding included."""
    waited: float
    """Seconds that the loop waited for its batch."""
    compile_seconds: float | None
    """Seconds for its program, where it is the first step of this shape; they are no step time."""


@dataclasses.dataclass
class Run:
    """A run in progress: what the loop changes, and where it logs."""

    trainer: Trainer
    logger: Logger
    checkpoints: Checkpoints
    stop: Stop
    samples: JsonLines
    """samples.jsonl: completions generated at each evaluation."""
    skipped: JsonLines
    """nonfinite.jsonl: the ids of the pairs of each skipped update."""
    state: TrainState
    frozen: FrozenState
    cached: CachedLogps | None
    step: int = 0
    """Updates done."""
    start_logps: list | None = None
    """The reference's log-probs of the pairs of step 1, as the startup check measured them."""
    tokens: int = 0
    """Tokens trained on, over all steps."""
    evaluated: bool = False
    """Whether the state that the run starts from was evaluated already."""
    compiled: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    """Shapes of batches (microbatches, sequences, tokens) whose program exists already."""
    pending: Pending | None = None
    """The newest step, logged one step late so that the devices never wait for the host."""
    logged_at: float = dataclasses.field(default_factory=time.perf_counter)
    """When the last step was logged; time.perf_counter(). Step times are measured from here."""

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.trainer.config

    def advance(self, step: int, batch: Batch, apply: jax.Array, waited: float) -> None:
        """Dispatch one update, then log the one before it, which the devices finish meanwhile."""
        frozen = self.frozen_for(step, batch)
        on_devices = self.trainer.put_batch(batch)
        is_new = batch.tokens_MBT.shape not in self.compiled
        if is_new:
            # A program is compiled now, or read: first log what ran before, as nothing overlaps.
            self.flush()
            self.compiled.add(batch.tokens_MBT.shape)
        started = time.perf_counter()
        # Returns at once. Its metrics are not read here: that would wait for the devices.
        self.state, metrics = self.trainer.train_step(self.state, frozen, on_devices, apply)
        del metrics[PAIR_LOGPS]  # read by the startup check only
        compile_seconds = None
        if is_new:
            self.logged_at = time.perf_counter()
            compile_seconds = self.logged_at - started
        previous = self.pending
        self.pending = Pending(step, metrics, batch.tokens_MBT.size, waited, compile_seconds)
        self.step = step
        self.stop.unsaved = True
        # TR-DPO: every so many steps the reference moves towards the policy.
        if self.frozen.reference is not None and is_due(step, self.config.loss.ref_sync_every):
            synced = sync_reference(self.frozen.reference, self.state.params, self.config.loss)
            self.frozen = self.frozen._replace(reference=synced)
        self._log(previous)

    def frozen_for(self, step: int, batch: Batch) -> FrozenState:
        """What the step on this batch reads beside the state."""
        logps = None
        if self.cached is not None:
            logps = self.cached.train[self.trainer.loader.pairs_of(step)]
        return self.trainer.with_logps(self.frozen, logps, batch)

    def flush(self) -> None:
        """Log the newest step; the log is then up to date."""
        pending = self.pending
        self.pending = None
        self._log(pending)

    def _log(self, pending: Pending | None) -> None:
        """Log a dispatched step, when the devices have finished it. None: there is none."""
        if pending is None:
            return
        step = pending.step
        metrics = {}
        for key, value in jax.device_get(pending.metrics).items():
            metrics[key] = value.item()
        bad_steps = int(metrics.pop("bad_steps"))

        # The devices work on one step after the other, so from log to log is a step's time.
        now = time.perf_counter()
        seconds = now - self.logged_at
        self.logged_at = now

        loader = self.trainer.loader
        num_pairs = len(loader.pairs_of(step))
        num_tokens = loader.num_tokens(step)
        self.tokens += num_tokens
        row: dict[str, Any] = {"epoch": loader.epoch(step)}
        row |= metrics
        row["tokens"] = self.tokens
        row["padding_fraction"] = 1.0 - num_tokens / pending.num_positions
        row["step_seconds"] = seconds
        if pending.compile_seconds is not None:
            row["compile_seconds"] = pending.compile_seconds
        row["pairs_per_second"] = num_pairs / seconds
        row["tokens_per_second"] = num_tokens / seconds
        row["wait_fraction"] = min(1.0, pending.waited / seconds)
        mfu = self.trainer.mfu(step, seconds)
        if mfu is not None:
            row["mfu"] = mfu
        self.logger.log(step, row)
        if metrics["nonfinite"]:
            self._log_skipped(step, bad_steps)

    def _log_skipped(self, step: int, bad_steps: int) -> None:
        """Record the pairs of a step whose update was skipped for a NaN.

        Raises:
            Fault: MAX_BAD_STEPS in a row were skipped.
        """
        ids = self.trainer.data.train.ids
        pairs = self.trainer.loader.pairs_of(step)
        self.skipped.write({"step": step, "ids": [str(ids[i]) for i in pairs]})
        self.logger.warn(
            f"step {step}: loss or gradient is not finite; the update was skipped. "
            "nonfinite.jsonl has the ids of its pairs"
        )
        if bad_steps >= MAX_BAD_STEPS:
            raise Fault(
                f"{bad_steps} steps in a row had no finite loss or gradient. "
                "The weights are as they were before them. Lower optim.learning_rate, "
                "set model.compute_dtype=float32, or look at the pairs in nonfinite.jsonl"
            )

    def evaluate(self, poll: Callable[[str], None]) -> float:
        """Evaluate on the validation pairs, generate samples and log both; the validation loss.

        Args:
            poll: called between the parts with what is being done.

        Raises:
            Interrupted: by `poll`, when SIGTERM came. Nothing was logged then.
        """
        self.flush()
        started = time.perf_counter()
        params = self.state.params
        means = evaluate(self.trainer, params, self.frozen, self.cached, lambda: poll("evaluation"))
        samples = sample_answers(self.trainer, params, self.frozen, lambda: poll("samples"))
        for sample in samples:
            self.samples.write({"step": self.step, **sample})
        self.logger.evaluation(self.step, means | {"seconds": time.perf_counter() - started})
        self.logged_at = time.perf_counter()
        return means["loss"]

    def save(self, eval_loss: float | None, then: Callable[[], object] | None = None) -> None:
        """Save a checkpoint in the background.

        Args:
            eval_loss: the validation loss of this state; None: it was not evaluated.
            then: called when the checkpoint is on disk.
        """
        # First the rows: a resumed run continues their files, so a checkpoint must not be ahead.
        self.flush()
        self.logger.flush()
        self.samples.sync()
        self.skipped.sync()
        synced = self.frozen.reference if self.config.loss.ref_sync_every else None
        # The position in the data is not saved: it follows from the step and the config.
        meta = {
            "config": cli.to_dict(self.config),
            "identity": self.trainer.identity,
            "counters": {"tokens": self.tokens, "total_steps": self.trainer.total_steps},
            "start_logps": self.start_logps,
        }
        self.checkpoints.save(self.step, checkpoint_tree(self.state, synced), meta, eval_loss, then)
        self.log_notes()
        self.logged_at = time.perf_counter()

    def log_notes(self) -> None:
        """Log what was found wrong with checkpoints on disk."""
        while self.checkpoints.notes:
            self.logger.warn(self.checkpoints.notes.pop(0))

    def close(self) -> None:
        """Close the files that a run opens itself."""
        self.samples.close()
        self.skipped.close()


def is_due(step: int, every: int) -> bool:
    """Whether something happens after this step that happens every so many steps (0: never)."""
    return every > 0 and step % every == 0
