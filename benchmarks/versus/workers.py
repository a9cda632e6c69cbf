"""The driver's side of the workers: start one, time its start, ask it for rounds."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """One column of the comparison."""

    name: str
    ours: bool
    dtype: str
    head: str = "installed"
    """TRL only: which positions its LM head scores; see theirs.py."""
    checkpointing: bool = False
    """TRL only: gradient checkpointing."""


RIVALS = [
    Rival(name="ours float32", ours=True, dtype="float32"),
    Rival(name="ours bf16", ours=True, dtype="bfloat16"),
    Rival(name="TRL float32", ours=False, dtype="float32"),
    Rival(name="TRL bf16", ours=False, dtype="bfloat16"),
    Rival(name="TRL best float32", ours=False, dtype="float32", head="completions"),
    Rival(name="TRL best bf16", ours=False, dtype="bfloat16", head="completions"),
]
SPARING = [
    Rival(name="TRL float32, gradient checkpointing", ours=False, dtype="float32", checkpointing=True),
    Rival(name="TRL bf16, gradient checkpointing", ours=False, dtype="bfloat16", checkpointing=True),
]
"""TRL with its default of recomputing activations: slower, but with less memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What all workers share."""

    folder: Path
    """What prepare.py wrote."""
    scratch: Path
    trl_python: str
    cores: int
    pairs_per_step: int
    max_length: int


class Worker:
    """A process that trains when asked to. It idles otherwise, so that only one works at a time."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
        began = time.perf_counter()
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, cwd=BENCHMARKS, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        self.first_step = self._answer()
        self.start_seconds = time.perf_counter() - began
        """From the start of the process to the end of the first step."""

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def quit(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"a worker ended (status {self._process.wait()}); its last words:\n{tail}")
        return json.loads(line)


def start(setup: Setup, rival: Rival, cache: str = "", steps: list[list[int]] | None = None) -> Worker:
    """Start a rival's worker; returns when it has trained its first step.

    Args:
        setup: what all workers share.
        rival: which.
        cache: ours: name of the compilation cache, empty or filled by an earlier worker.
        steps: TRL's: rows of each step. Default: those of the plan.
    """
    slug = rival.name.replace(" ", "-").replace(",", "")
    if rival.ours:
        command = [sys.executable, "-m", "versus.ours", f"--run-dir={setup.scratch / f'run-{slug}-{time.time_ns()}'}"]
        command += [f"--cache={setup.scratch / f'cache-{cache}'}", f"--pairs-per-step={setup.pairs_per_step}"]
        command += [f"--max-length={setup.max_length}"]
    else:
        command = [setup.trl_python, "-m", "versus.theirs", f"--head={rival.head}", f"--threads={setup.cores}"]
        command += ["--checkpointing"] * rival.checkpointing + ([f"--steps={json.dumps(steps)}"] if steps else [])
    command += [f"--folder={setup.folder}", f"--dtype={rival.dtype}"]
    return Worker(command, setup.scratch / f"{slug}-{time.time_ns()}.log", environment(setup.cores))


def environment(cores: int) -> dict[str, str]:
    """The variables that a worker sees: CPU only, no network, OpenMP on all the cores measured."""
    forced = {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": str(cores),
        "MKL_NUM_THREADS": str(cores),
    }
    dropped = ("NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    return {name: value for name, value in os.environ.items() if name not in dropped} | forced
