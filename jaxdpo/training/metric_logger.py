"""Where the metrics of a run go: metrics.jsonl (JSONL), TensorBoard, the console, and warnings.

JsonLines writes files of JSON objects, Logger sends each row of metrics to all sinks (TensorBoard:
Logger._write), Health warns when a metric leaves its healthy range. The names are TRL's.

One more metric a step: computed on the devices, add it in step_metrics.metric_sums; known to the
host (times, counts), add it in Run._log (run.py). It needs nothing here, unless the console should
show it (CONSOLE_KEYS) or it depends on the clock (TIME_KEYS).

metrics.jsonl is the record: one JSON object a line, floats that read back as the same bits. A
resumed run first cuts the rows beyond the step it resumes from, so that no step is in it twice.
"""

import functools
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tensorboardX import SummaryWriter

from jaxdpo.config.schema import LogSection
from jaxdpo.distributed import processes
from jaxdpo.utils.console import Console, progress_bar, say, stdout
from jaxdpo.utils.files import atomic_write

TIME_KEYS = frozenset(
    {
        "step_seconds",
        "compile_seconds",
        "pairs_per_second",
        "tokens_per_second",
        "wait_fraction",
        "mfu",
        "eval/seconds",
    }
)
"""Metrics that depend on the clock: the only ones that may differ when a command is run twice."""

CONSOLE_KEYS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "kl/token_exact": "kl",
    "grad_norm": "grad",
    "pairs_per_second": "pairs/s",
}
"""Metric -> its name on the console, which shows these only."""

STATES = frozenset({"epoch", "tokens", "learning_rate"})
"""Metrics of a step that say where the run is: of several steps, the last one's is logged."""
SUMS = frozenset({"nonfinite", "compile_seconds"})
"""Metrics that are added up over the steps of a row. All others are averaged."""

LINES_PER_RUN = 20
"""Lines about steps on a console that is no terminal and so has no progress bar."""


class JsonLines:
    """A JSONL file: one object a line, each with a "step"; unbuffered.

    Of several processes the first one writes; for the others every method does nothing.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        """Open for appending after the rows of an earlier run up to `resume_step` (None: none)."""
        self._path, self._on = path, processes.is_first()
        if self._on:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut(path, resume_step)

    @functools.cached_property
    def _file(self) -> BinaryIO:
        # Created with the first row, so that a run without rows leaves no file. Unbuffered, as a
        # buffer that a full disk refused would be written again, in parts, when it is closed.
        return self._path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. NaN and infinities become null, as JSON has none.

        Raises:
            OSError: with the file's name; the disk is full.
        """
        if not self._on:
            return
        row = {key: _finite_or_none(value) for key, value in row.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            left = memoryview(line.encode())
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            message = (
                f"a row could not be written ({error.strerror}). Checkpoints are intact, "
                "and the same command resumes from the newest"
            )
            raise OSError(error.errno, message, str(self._path)) from error

    def sync(self) -> None:
        """Return when every row is on the disk, safe from a power failure."""
        if self._on and "_file" in self.__dict__:
            os.fsync(self._file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """Every row, as it was written."""
        if not self._on or not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close the file, if a row has created it."""
        if "_file" in self.__dict__:
            self._file.close()


def _cut(path: Path, resume_step: int | None) -> None:
    """Drop the rows beyond a step (None: all), and a row that a kill left unfinished."""
    if not path.exists():
        return
    kept = []
    if resume_step is not None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= resume_step]
    with atomic_write(path) as file:
        file.writelines(kept)


def _step_of(line: str) -> float:
    """The step of a row; infinity for an unfinished row."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except ValueError:
        return math.inf


def _plain(value: Any) -> Any:
    """Arrays of one number (numpy, JAX) as the Python number of the same value."""
    return value.item() if hasattr(value, "item") else value


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Health:
    """Watches the metrics of a run and explains, once each, those outside their healthy range."""

    PATIENCE = 20
    """Consecutive steps with a negative reward of the chosen completions before it is warned about:
    small batches dip below 0 for a few steps in healthy runs."""
    WINDOW = 10
    """Steps over which the accuracy is averaged; that of one small batch is often 1."""
    FEW_CHANGED = 0.05
    """Share of bfloat16 weights that change in a step, below which a run stands still: AdamW moves
    all weights alike, so those that stay are those that the learning rate is too small for."""
    TOO_EASY = 0.95
    """Accuracy that preference data, whose labels people disagree on, do not allow so early."""

    def __init__(self, total_steps: int, has_reference: bool):
        self._early = total_steps // 10
        self._has_reference = has_reference
        self._total = total_steps
        self._below = 0
        self._changed: list[float] = []
        self._accuracies: deque[float] = deque(maxlen=self.WINDOW)
        self._warned: set[str] = set()

    def check(self, step: int, row: Mapping[str, Any]) -> list[str]:
        """Warnings that this row gives rise to; each kind is given once in a run."""
        found = {
            "non-finite": self._non_finite(step, row),
            "chosen-below": self._chosen_below_reference(row),
            "too-easy": self._too_easy(step, row),
            "no-gradient": self._no_gradient(step, row),
            "no-updates": self._no_updates(step, row),
        }
        new = {kind: text for kind, text in found.items() if text and kind not in self._warned}
        self._warned |= new.keys()
        return list(new.values())

    def _non_finite(self, step: int, row: Mapping[str, Any]) -> str | None:
        """NaN or infinity in loss or gradient."""
        bad = []
        for key in ("loss", "grad_norm"):
            if not math.isfinite(row.get(key, 0.0)):
                bad.append(f"{key} is {row[key]}")
        if not bad:
            return None
        return (
            f"step {step}: {' and '.join(bad)}; an update from it would destroy the weights. "
            "Usual causes: a learning rate that is too high, damaged weights, an overflow in "
            "bfloat16. Lower optim.learning_rate, add optim.warmup_steps, or set "
            "model.compute_dtype=float32"
        )

    def _chosen_below_reference(self, row: Mapping[str, Any]) -> str | None:
        reward = row.get("rewards/chosen", 0.0)
        self._below = self._below + 1 if self._has_reference and reward < 0 else 0
        if self._below < self.PATIENCE:
            return None
        return (
            f"for {self._below} steps the chosen answers have been less likely than under the "
            f"reference (rewards/chosen {reward:.3g}). The loss only asks for a gap between both "
            "answers, and lowering both is one way to widen it. If answers get worse: mix in the "
            "sft loss (loss.name=[sigmoid,sft]), try dpop or apo_zero, or lower optim.learning_rate"
        )

    def _no_gradient(self, step: int, row: Mapping[str, Any]) -> str | None:
        if row.get("grad_norm") != 0:
            return None
        return (
            f"step {step}: the gradient is exactly 0, so nothing is learned from its pairs. Usual "
            "causes: a loss that is flat there (hinge beyond its margin, log-ratios beyond the cap "
            "of an f-divergence), pairs of weight 0, or products that underflow in "
            "model.compute_dtype"
        )

    def _no_updates(self, step: int, row: Mapping[str, Any]) -> str | None:
        """bfloat16 weights that round their updates away."""
        if "weights/changed" not in row:
            return None
        self._changed.append(row["weights/changed"])
        enough = min(max(self.PATIENCE, self._early), self._total)
        if len(self._changed) < enough or max(self._changed) >= self.FEW_CHANGED:
            return None
        return (
            f"of the bfloat16 weights at most {max(self._changed):.2%} changed in any of "
            f"{len(self._changed)} steps (weights/changed; learning rate "
            f"{row.get('learning_rate', 0.0):.3g}): updates that are small beside their weight are "
            "rounded away. Set model.param_dtype=float32, or raise optim.learning_rate"
        )

    def _too_easy(self, step: int, row: Mapping[str, Any]) -> str | None:
        self._accuracies.append(row.get("rewards/accuracies", 0.0))
        mean = sum(self._accuracies) / len(self._accuracies)
        if step > self._early or len(self._accuracies) < self.WINDOW or mean <= self.TOO_EASY:
            return None
        return (
            f"accuracy is {mean:.2f} within the first tenth of the run: something easy tells "
            "chosen from rejected, such as length, a marker or the source. Compare lengths/chosen "
            "with lengths/rejected and read a few pairs (--dry-run); stop earlier or lower "
            "optim.learning_rate if that is what the policy should not learn"
        )


class Logger:
    """Sends rows of metrics to metrics.jsonl, TensorBoard and the console; a context manager."""

    def __init__(
        self,
        run_dir: str | Path,
        log: LogSection,
        total_steps: int,
        resume_step: int | None = None,
        *,
        has_reference: bool = True,
        console: Console | None = None,
    ):
        """Open the run's files.

        Args:
            run_dir: the run's folder; created if needed.
            log: how often to log, and where.
            total_steps: number of the last step.
            resume_step: step of the restored checkpoint; later rows are cut. None: a new run, all
                rows are cut.
            has_reference: whether rewards compare with a reference: a negative one then means less
                likely than under it.
            console: where text goes. Default: standard output, of the first process only.
        """
        folder = Path(run_dir).expanduser()
        self._log = log
        self._total = total_steps
        self._since: list[dict[str, Any]] = []
        self._rows = JsonLines(folder / "metrics.jsonl", resume_step)
        self._tensorboard = None
        if log.tensorboard and processes.is_first():
            # TensorBoard then ignores what an interrupted run wrote from this step on.
            first = 0 if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self._health = Health(total_steps, has_reference)
        if console is None:
            console = stdout() if processes.is_first() else Console(quiet=True)
        self._console = console
        self._progress = None
        if console.is_terminal:
            self._progress = progress_bar(console, total_steps, resume_step or 0)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Take the metrics of each update, in order; writes a row every `log.every` steps.

        The row is about the steps since the last one (of this start of the run): see `_summed_up`.
        """
        row = {key: _plain(value) for key, value in row.items()}
        self._since.append(row)
        if step % self._log.every == 0 or step in (1, self._total):
            self._write(step, _summed_up(self._since))
            self._since.clear()
        self._show(step, row)
        for text in self._health.check(step, row):
            self.warn(text)

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        """Write the metrics of an evaluation after update `step`, as eval/<key>."""
        row = {key: _plain(value) for key, value in row.items()}
        self._write(step, {f"eval/{key}": value for key, value in row.items()})
        self.info(f"eval {step}/{self._total}  {_summary(row)}")

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation after update `step` was written."""
        return any(row["step"] == step and "eval/loss" in row for row in self._rows.rows())

    def warn(self, text: str) -> None:
        """Show something that the user should act on."""
        say(self._console, f"warning: {text}", "yellow")

    def info(self, text: str) -> None:
        """Show a line."""
        say(self._console, text)

    def flush(self) -> None:
        """Return when all rows are on the disk: a checkpoint must not be ahead of its metrics."""
        self._rows.sync()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the files and remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._rows.close()

    def _write(self, step: int, row: Mapping[str, Any]) -> None:
        self._rows.write({"step": step, **row})
        if self._tensorboard is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._tensorboard.add_scalar(key, value, step)

    def _show(self, step: int, row: Mapping[str, Any]) -> None:
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=step, summary=_summary(row))
        elif step % max(1, self._total // LINES_PER_RUN) == 0 or step in (1, self._total):
            self.info(f"step {step}/{self._total}  {_summary(row)}")


def _summary(row: Mapping[str, Any]) -> str:
    """The console's metrics on one line."""
    return "  ".join(f"{name} {row[key]:.4g}" for key, name in CONSOLE_KEYS.items() if key in row)


def _summed_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of several steps as one row: means, but for STATES and SUMS.

    A step whose value is not finite was skipped (`nonfinite`), and does not count in the mean.
    """
    if len(rows) == 1:
        return rows[0]
    values: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    result = {}
    for key, column in values.items():
        finite = [value for value in column if math.isfinite(value)]
        if key in STATES or not finite:
            result[key] = column[-1]
        elif key in SUMS:
            result[key] = sum(finite)
        else:
            result[key] = sum(finite) / len(finite)
    return result
