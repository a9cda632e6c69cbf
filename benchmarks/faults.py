"""Everything that a rented machine does to a run, done to real runs of `python -m jaxdpo.train`: what is lost, and what is told.

    python -m benchmarks.faults [--kills 50] [--terms 20] [--flips 200] [--lanes 3] [--seed 0]

A tiny model is trained for several hundred steps, a hundred epochs. Runs of the same command are ended by SIGKILL at random moments
of their progress, among them saves, restores and the time before the first step, and are started again until they are through; others
get SIGTERM. (All but those that are ended at any time of their start share their imports: forks.py.) All must end with the bits of a
run that nobody touched: every array of the last checkpoint, every row of metrics.jsonl but for the keys that depend on the clock. The
same comparison must see what a resume without moments, position or seed gets wrong. Then bits are flipped, files cut, emptied and
deleted in copies of a run. Writes results/faults-<date>.json; the exit status is the number of failures. tests/test_faults.py does a
little of each.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.forks import Forked, Server
from benchmarks.kill_and_resume import different_arrays, different_rows
from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.utils.manifest import find_damage
from tests.runs import folder_with_inputs

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SAVE_EVERY = 7
PATIENCE = 300.0
"""Seconds after which a process that does nothing is a failure."""

ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "HF_HUB_OFFLINE": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}

MUTATIONS = {
    "moments": "import jax\nfrom jaxdpo.checkpoints.checkpoint import Checkpoints\nrestore = Checkpoints.restore\n"
    "def forget(self, abstract):\n    step, tree, meta = restore(self, abstract)\n"
    "    tree['opt'] = tree['opt'] | {name: jax.tree.map(lambda x: x * 0, tree['opt'][name]) for name in ('mu', 'nu')}\n"
    "    return step, tree, meta\nCheckpoints.restore = forget",
    "optimizer's count": "from jaxdpo.checkpoints.checkpoint import Checkpoints\nrestore = Checkpoints.restore\n"
    "def forget(self, abstract):\n    step, tree, meta = restore(self, abstract)\n"
    "    tree['opt'] = tree['opt'] | {'count': tree['opt']['count'] * 0}\n"
    "    return step, tree, meta\nCheckpoints.restore = forget",
    "position in the data": "from jaxdpo.data.loader import Loader\nstream = Loader.stream\n"
    "Loader.stream = lambda self, first, last: stream(self, 1, last - first + 1)",
    "seed of the order": "import dataclasses\nfrom jaxdpo.data.loader import Loader\nstream = Loader.stream\n"
    "Loader.stream = lambda self, first, last: stream(dataclasses.replace(self, seed=self.seed + (first > 1)), first, last)",
}
"""Programs that leave something out of a resume: what was not saved, or not read."""


class Runs:
    """The inputs that all runs share, and the untouched run that they are compared with."""

    def __init__(self, folder: Path, total: int):
        """Make the inputs, and train without a fault."""
        self.folder, self.total = folder_with_inputs(folder), total
        self.untouched = folder / "untouched"
        process = self.start(self.untouched)
        assert process.wait() == 0, told(self.untouched)

    def start(
        self, run: Path, server: Server | None = None, mutation: str = ""
    ) -> subprocess.Popen[bytes] | Forked:
        """The command for this run folder, printing into it: as it is typed, or in a fork of the server, perhaps changed."""
        places = [
            f"run_dir={run}",
            f"model.path={self.folder / 'model'}",
            f"data.train=[{self.folder / 'rows.jsonl'}]",
        ]
        caches = [
            f"train.compilation_cache={self.folder / 'programs'}",
            f"data.cache={self.folder / 'pairs'}",
        ]
        sizes = [
            "data.max_length=32",
            "data.packed_length=64",
            "data.num_packed_lengths=1",
            "data.eval_fraction=0.3",
            "train.batch_size=2",
        ]
        often = [f"train.steps={self.total}", f"checkpoint.save_every={SAVE_EVERY}"]
        often += [
            "eval.every=25",
            "eval.samples=1",
            "eval.sample_tokens=4",
            "optim.learning_rate=1e-3",
            "log.tensorboard=false",
        ]
        words = [*places, *caches, *sizes, *often]
        run.mkdir(exist_ok=True, parents=True)
        if server is not None:
            return server.start(words, mutation, run / "out.txt")
        with (run / "out.txt").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "jaxdpo.train", *words],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=out,
                stderr=out,
            )

    def finish(self, run: Path, server: Server | None = None, mutation: str = "") -> int:
        """Run the command to its end; its exit status."""
        return self.start(run, server, mutation).wait(PATIENCE)

    def differences(self, run: Path) -> list[str]:
        """What is not as in the untouched run."""
        rows = different_rows(run, self.untouched)
        return different_arrays(run, self.untouched, self.total) + [
            f"metrics of step {step}" for step in rows
        ]


def told(run: Path) -> str:
    """What the processes of a run have printed."""
    return (run / "out.txt").read_text(errors="replace") if (run / "out.txt").exists() else ""


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
    return max(
        (
            int(path.parent.name)
            for path in (run / "checkpoints").glob("*/manifest.json")
            if path.parent.name.isdecimal()
        ),
        default=0,
    )


def phase(run: Path) -> str:
    """What the heartbeat says."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / "heartbeat.json").read_text())["phase"]
    return ""


# --- moments ---

Moment = Callable[[Path, int, random.Random], Iterator[bool]]
"""Yields whether it has come; (run folder, step to have reached, randomness)."""


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
    before = told(run).count("\nsteps: ")
    while told(run).count("\nsteps: ") == before:
        yield False
    time.sleep(draw.uniform(0, 0.5))
    yield True


def at_the_start(run: Path, mark: int, draw: random.Random) -> Iterator[bool]:
    """At any time up to the first step."""
    time.sleep(draw.uniform(0, 8))
    yield True


def in_phase(name: str) -> Moment:
    """While the heartbeat says so."""

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
    """Start the command, and signal it at a moment; what came of it. With a server, imports can be interrupted at the start alone."""
    saved_before = newest(run)
    process = runs.start(run, None if kind == "start" else server)
    until = time.monotonic() + PATIENCE
    for come in MOMENTS[kind](run, mark, draw):
        if come or process.poll() is not None:
            break
        assert time.monotonic() < until, told(run)
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


def lane(
    runs: Runs, run: Path, number: signal.Signals, kinds: list[str], seed: int
) -> dict[str, Any]:
    """One run that is interrupted at these moments, one after the other, spread over its steps, and then goes to its end."""
    draw, events = random.Random(seed), []
    with contextlib.closing(Server(ENVIRONMENT)) as server:
        for count, kind in enumerate(kinds):
            mark = 1 + (runs.total - 60) * count // len(kinds) + draw.randrange(10)
            events.append(interrupt(runs, run, number, kind, mark, draw, server))
        code = runs.finish(run, server)
    failures = [f"seed {seed}: {name}" for name in runs.differences(run)] + (
        [f"seed {seed}: ended with {code}"] if code else []
    )
    for event in events:
        if number == signal.SIGKILL and event["code"] != -signal.SIGKILL:
            failures.append(f"seed {seed}: ended by itself: {event}")
        if number == signal.SIGTERM and (event["code"] != 75 or event["saved"] < event["logged"]):
            failures.append(f"seed {seed}: something was lost: {event}")
    return {"events": events, "failures": failures}


def lanes(
    runs: Runs,
    name: str,
    number: signal.Signals,
    kinds: list[str],
    count: int,
    num_lanes: int,
    seed: int,
) -> dict[str, Any]:
    """`count` interruptions, each kind as often as another, over several runs side by side."""
    draw = random.Random(seed)
    drawn = [kinds[i % len(kinds)] for i in range(count)]
    draw.shuffle(drawn)
    with concurrent.futures.ThreadPoolExecutor(num_lanes) as pool:
        parts = [
            pool.submit(
                lane, runs, runs.folder / f"{name}{i}", number, drawn[i::num_lanes], seed + i
            )
            for i in range(num_lanes)
        ]
        found = [part.result() for part in parts]
    events = [event for part in found for event in part["events"]]
    return {
        "interruptions": len(events),
        "by moment": {
            kind: sum(event["at"] == kind for event in events) for kind in dict.fromkeys(kinds)
        },
        "after the first epoch": sum(event["logged"] > 5 for event in events),
        "most seconds to the end": max((event["seconds"] for event in events), default=0),
        "failures": [failure for part in found for failure in part["failures"]],
        "events": events,
    }


def mutations(runs: Runs, stopped: Path, server: Server) -> dict[str, Any]:
    """A resume that lacks something must not pass for one that does not: what the comparison sees of each."""
    seen = {}
    for number, (name, program) in enumerate(MUTATIONS.items()):
        run = runs.folder / f"mutated{number}"
        shutil.copytree(stopped, run)
        code = runs.finish(run, server, program)
        seen[name] = (
            f"{len(runs.differences(run))} differences" if code == 0 else f"ended with {code}"
        )
    failures = [
        f"left out and not noticed: {name}"
        for name, found in seen.items()
        if not found[:1].isdigit() or found.startswith("0 ")
    ]
    return {"seen": seen, "failures": failures}


# --- what happens to files ---


def flips(run: Path, count: int, seed: int) -> dict[str, Any]:
    """Flip single bits of the newest checkpoint, each for itself, and read it."""
    folder, draw = run / "checkpoints" / str(newest(run)), random.Random(seed)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    silent = []
    for _ in range(count):
        path = draw.choices(files, [path.stat().st_size for path in files])[0]
        good = path.read_bytes()
        bit = draw.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        if find_damage(folder) is None or restored_anyway(run, int(folder.name)):
            silent.append(f"{path.relative_to(folder)}, bit {bit}")
        path.write_bytes(good)
    assert find_damage(folder) is None
    return {"flips": count, "files": len(files), "silent": silent, "failures": silent}


def restored_anyway(run: Path, step: int) -> bool:
    """Whether a reader takes the checkpoint for good."""
    try:
        return restore_params(run)[0] == step
    except ValueError:
        return False


def cut(path: Path) -> None:
    """Half of a file is gone."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """All of a file is gone, but for its name."""
    os.truncate(path, 0)


def broken_files(runs: Runs, stopped: Path, server: Server, *, every: bool) -> dict[str, Any]:
    """Cut, empty and delete a file of the newest checkpoint, add junk, and run the command to its end.

    Args:
        every: also do each to each file, and look whether a reader is fooled.
    """
    failures = []
    for number, harm in enumerate((cut, empty, Path.unlink)):
        run = runs.folder / f"broken{number}"
        shutil.copytree(stopped, run)
        folder = run / "checkpoints" / str(newest(run))
        files = [
            path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size
        ]
        for path in files if every else []:
            good = path.read_bytes()
            harm(path)
            if restored_anyway(run, int(folder.name)):
                failures.append(f"{harm.__name__} {path.relative_to(folder)}: nobody noticed")
            path.write_bytes(good)
        harm(max(files, key=lambda path: path.stat().st_size))
        for junk in ("999999", "-1", "12.saving", "x"):
            (run / "checkpoints" / junk).mkdir()
        (run / "checkpoints" / "88").write_text("junk")
        code, words = runs.finish(run, server), told(run)
        problems = (
            []
            if code == 0 and not runs.differences(run)
            else [f"ended with {code}: {runs.differences(run)}"]
        )
        problems += (
            []
            if ".damaged" in words and "999999 has no manifest.json" in words
            else ["nothing was told"]
        )
        failures += [f"{harm.__name__}: {problem}" for problem in problems]
    return {"failures": failures}


def main() -> int:
    """Do everything, write the result; the number of failures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "kills": 50,
        "terms": 20,
        "flips": 200,
        "lanes": 3,
        "seed": 0,
        "steps": 500,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args, started = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as name, contextlib.closing(Server(ENVIRONMENT)) as server:
        runs = Runs(Path(name), args.steps)
        stopped = runs.folder / "stopped"
        stop = interrupt(
            runs, stopped, signal.SIGTERM, "step", args.steps // 2, random.Random(args.seed)
        )
        kill_moments = ["step", "save", "before the first step"] * 3 + ["start"]
        term_moments = ["step", "save", "before the first step", "evaluation", "generation"]
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "steps": args.steps,
            "stopped at": stop["saved"],
            "left out of a resume": mutations(runs, stopped, server),
            "bit flips": flips(stopped, args.flips, args.seed),
            "cut, empty and deleted files, junk": broken_files(runs, stopped, server, every=True),
            "SIGTERM": lanes(
                runs, "term", signal.SIGTERM, term_moments, args.terms, args.lanes, args.seed
            ),
            "SIGKILL": lanes(
                runs, "kill", signal.SIGKILL, kill_moments, args.kills, args.lanes, args.seed
            ),
        }
    failures = [
        failure
        for part in result.values()
        if isinstance(part, dict)
        for failure in part["failures"]
    ]
    result |= {"failures": failures, "minutes": round((time.monotonic() - started) / 60, 1)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"faults-{datetime.date.today()}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(
        json.dumps(
            {key: value for key, value in result.items() if key not in ("SIGTERM", "SIGKILL")},
            indent=1,
        )
    )
    return len(failures)


if __name__ == "__main__":
    raise SystemExit(main())
