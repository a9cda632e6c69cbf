"""The driver's side of the workers: start one, time its start, request rounds."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent
FOREIGN_LIMIT = 0.05
"""Share of the cores that others may use while something is measured."""


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
    Rival(
        name="TRL float32, gradient checkpointing", ours=False, dtype="float32", checkpointing=True
    ),
    Rival(
        name="TRL bf16, gradient checkpointing", ours=False, dtype="bfloat16", checkpointing=True
    ),
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
    batch_size: int
    max_length: int


class Worker:
    """A process that trains when asked to. It idles otherwise, so that only one works at a time."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
        self._log = log
        began, busy = time.perf_counter(), busy_seconds()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                cwd=BENCHMARKS,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        answer = self._answer()
        seconds = time.perf_counter() - began
        self.start = {"seconds": seconds, **answer, "foreign": self._foreign(busy, 0.0, seconds)}
        """Its report of the first step, with the seconds from the process's start until then."""

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        "foreign" in the answer is the share of the cores that other processes used meanwhile.
        """
        assert self._process.stdin is not None
        began, busy, own = time.perf_counter(), busy_seconds(), process_seconds(self._process.pid)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer | {"foreign": self._foreign(busy, own, time.perf_counter() - began)}

    def quit(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _foreign(self, busy: float, own: float, seconds: float) -> float:
        others = (busy_seconds() - busy) - (process_seconds(self._process.pid) - own)
        return round(max(0.0, others) / (seconds * len(os.sched_getaffinity(0))), 4)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(
                f"a worker ended (status {self._process.wait()}); its last output:\n{tail}"
            )
        return json.loads(line)


def start(setup: Setup, rival: Rival, cache: str, steps: list[list[int]] | None = None) -> Worker:
    """Start a rival's worker; returns when it has trained its first step.

    Args:
        setup: what all workers share.
        rival: which.
        cache: ours: name of the compilation cache, empty or filled by an earlier worker.
        steps: TRL's: rows of each step. Default: those of the plan.
    """
    slug = rival.name.replace(" ", "-").replace(",", "")
    if rival.ours:
        command = [
            sys.executable,
            "-m",
            "versus.ours",
            f"--run-dir={setup.scratch / f'run-{slug}-{time.time_ns()}'}",
        ]
        command += [
            f"--cache={setup.scratch / f'cache-{cache}'}",
            f"--batch-size={setup.batch_size}",
        ]
        command += [f"--max-length={setup.max_length}"]
    else:
        command = [
            setup.trl_python,
            "-m",
            "versus.theirs",
            f"--head={rival.head}",
            f"--threads={setup.cores}",
        ]
        if rival.checkpointing:
            command.append("--checkpointing")
        if steps:
            command.append(f"--steps={json.dumps(steps)}")
    command += [f"--folder={setup.folder}", f"--dtype={rival.dtype}"]
    return Worker(command, setup.scratch / f"{slug}-{time.time_ns()}.log", environment(setup.cores))


def busy_seconds() -> float:
    """CPU seconds since boot that this process's cores were busy, or taken by the hypervisor."""
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in mine:
            user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(limit: float) -> float:
    """Wait until the cores were idle for two seconds, at most `limit`; returns the seconds."""
    began, calm = time.perf_counter(), 0
    while calm < 2 and time.perf_counter() - began < limit:
        busy = busy_seconds()
        time.sleep(1.0)
        idle = busy_seconds() - busy < FOREIGN_LIMIT * len(os.sched_getaffinity(0))
        calm = calm + 1 if idle else 0
    return time.perf_counter() - began


def environment(cores: int) -> dict[str, str]:
    """A worker's environment: CPU only, no network, OpenMP on all measured cores."""
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
