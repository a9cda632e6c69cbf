"""Real runs of `python -m jaxdpo.train` that are interrupted at chosen moments, for faults.py."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.forks import Forked, Server
from benchmarks.kill_and_resume import different_arrays, different_rows
from tests.runs import folder_with_inputs

ROOT = Path(__file__).parent.parent
SAVE_EVERY = 7
PATIENCE = 300.0
"""Seconds after which a process that does nothing is a failure."""

ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "HF_HUB_OFFLINE": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}


class Runs:
    """The inputs that all runs share, and the uninterrupted run that they are compared with."""

    def __init__(self, folder: Path, total: int):
        """Make the inputs, and train without interruption."""
        self.folder, self.total = folder_with_inputs(folder), total
        self.uninterrupted = folder / "uninterrupted"
        process = self.start(self.uninterrupted)
        assert process.wait() == 0, printed(self.uninterrupted)

    def start(
        self, run: Path, server: Server | None = None, mutation: str = ""
    ) -> subprocess.Popen[bytes] | Forked:
        """Start training in this run folder, with its output in it.

        Args:
            server: fork from it; None: a process of its own, as a user starts it.
            mutation: a program to run in the fork before the command.
        """
        options = [
            f"run_dir={run}",
            f"model.path={self.folder / 'model'}",
            f"data.train=[{self.folder / 'rows.jsonl'}]",
            f"train.compilation_cache={self.folder / 'programs'}",
            f"data.cache={self.folder / 'pairs'}",
            "data.max_length=32",
            "data.packed_length=64",
            "data.num_packed_lengths=1",
            "data.eval_fraction=0.3",
            "train.batch_size=2",
            f"train.steps={self.total}",
            f"checkpoint.save_every={SAVE_EVERY}",
            "eval.every=25",
            "eval.samples=1",
            "eval.sample_tokens=4",
            "optim.learning_rate=1e-3",
            "log.tensorboard=false",
        ]
        run.mkdir(exist_ok=True, parents=True)
        if server is not None:
            return server.start(options, mutation, run / "out.txt")
        with (run / "out.txt").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "jaxdpo.train", *options],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=out,
                stderr=out,
            )

    def finish(self, run: Path, server: Server | None = None, mutation: str = "") -> int:
        """Run the command to its end; its exit status."""
        return self.start(run, server, mutation).wait(PATIENCE)

    def differences(self, run: Path) -> list[str]:
        """What differs from the uninterrupted run."""
        differences = different_arrays(run, self.uninterrupted, self.total)
        for step in different_rows(run, self.uninterrupted):
            differences.append(f"metrics of step {step}")
        return differences


def printed(run: Path) -> str:
    """What the processes of a run have printed."""
    out = run / "out.txt"
    return out.read_text(errors="replace") if out.exists() else ""


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl, from its end."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


def newest(run: Path) -> int:
    """The newest checkpoint; 0 when there is none."""
    steps = [0]
    for path in (run / "checkpoints").glob("*/manifest.json"):
        if path.parent.name.isdecimal():
            steps.append(int(path.parent.name))
    return max(steps)


def phase(run: Path) -> str:
    """The phase in the heartbeat file."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / "heartbeat.json").read_text())["phase"]
    return ""


# --- moments ---

Moment = Callable[[Path, int, random.Random], Iterator[bool]]
"""Yields False until the moment has come, then True.

Takes the run folder, the step that must be logged before, and a random generator.
"""


def in_a_step(run: Path, mark: int, draw: random.Random) -> Iterator[bool]:
    """Some milliseconds after a step."""
    while last_step(run) < mark:
        yield False
    time.sleep(draw.uniform(0, 0.02))
    yield True


def in_a_save(run: Path, mark: int, draw: random.Random) -> Iterator[bool]:
    """While a checkpoint is being written."""
    while last_step(run) < mark or not list((run / "checkpoints").glob("*.saving")):
        yield False
    time.sleep(draw.uniform(0, 0.03))
    yield True


def before_the_first_step(run: Path, mark: int, draw: random.Random) -> Iterator[bool]:
    """While weights or a checkpoint are read, programs compiled, policy and reference compared."""
    before = printed(run).count("\nsteps: ")
    while printed(run).count("\nsteps: ") == before:
        yield False
    time.sleep(draw.uniform(0, 0.5))
    yield True


def at_the_start(run: Path, mark: int, draw: random.Random) -> Iterator[bool]:
    """At any time up to the first step."""
    time.sleep(draw.uniform(0, 8))
    yield True


def in_phase(name: str) -> Moment:
    """While the heartbeat file names this phase."""

    def moment(run: Path, mark: int, draw: random.Random) -> Iterator[bool]:
        while last_step(run) < mark or phase(run) != name:
            yield False
        time.sleep(draw.uniform(0, 0.01))
        yield True

    return moment


MOMENTS: dict[str, Moment] = {
    "step": in_a_step,
    "save": in_a_save,
    "before the first step": before_the_first_step,
    "start": at_the_start,
    "evaluation": in_phase("evaluation"),
    "generation": in_phase("samples"),
}


def interrupt(
    runs: Runs,
    run: Path,
    number: signal.Signals,
    kind: str,
    mark: int,
    draw: random.Random,
    server: Server | None = None,
) -> dict[str, Any]:
    """Start the command and signal it at a moment; returns what happened.

    Args:
        number: the signal.
        kind: one of MOMENTS; "start" always takes a new process, as a fork skips the imports.
        mark: the step that must be logged before.
    """
    saved_before = newest(run)
    process = runs.start(run, None if kind == "start" else server)
    until = time.monotonic() + PATIENCE
    for come in MOMENTS[kind](run, mark, draw):
        if come or process.poll() is not None:
            break
        assert time.monotonic() < until, printed(run)
        time.sleep(0.003)
    logged = last_step(run)
    process.send_signal(number)
    started = time.monotonic()
    code = process.wait(PATIENCE)
    seconds = round(time.monotonic() - started, 2)
    return {
        "at": kind,
        "logged": logged,
        "saved before": saved_before,
        "saved": newest(run),
        "code": code,
        "seconds": seconds,
    }
