"""Real runs of `python -m jaxdpo.train` under the faults of rented machines: what is lost?

    python -m benchmarks.faults [--kills 50] [--terms 20] [--flips 200] [--lanes 3] [--seed 0]

A tiny model is trained for several hundred steps (a hundred epochs). Runs of the same command are
ended by SIGKILL at random moments (among them saves, restores and the time before the first step)
and started again until they are done; others get SIGTERM. All but those that are ended during their
start share their imports (forks.py). Each must end with the bits of an uninterrupted run: every
array of the last checkpoint, every row of metrics.jsonl except the keys that depend on the clock.
The same comparison must notice a resume without moments, position or seed. Then bits are flipped,
and files truncated, emptied and deleted, in copies of a run.

Writes results/faults-<date>.json; the exit status is the number of failures. tests/test_faults.py
does a little of each.
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
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.fault_runs import ENVIRONMENT, Runs, interrupt, newest, printed
from benchmarks.forks import Server
from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.utils.manifest import find_damage

RESULTS = Path(__file__).parent / "results"

MUTATIONS = {
    "moments": """
import jax
from jaxdpo.checkpoints.checkpoint import Checkpoints
restore = Checkpoints.restore
def forget(self, abstract):
    step, tree, meta = restore(self, abstract)
    zeros = {name: jax.tree.map(lambda x: x * 0, tree["opt"][name]) for name in ("mu", "nu")}
    tree["opt"] = tree["opt"] | zeros
    return step, tree, meta
Checkpoints.restore = forget
""",
    "optimizer's count": """
from jaxdpo.checkpoints.checkpoint import Checkpoints
restore = Checkpoints.restore
def forget(self, abstract):
    step, tree, meta = restore(self, abstract)
    tree["opt"] = tree["opt"] | {"count": tree["opt"]["count"] * 0}
    return step, tree, meta
Checkpoints.restore = forget
""",
    "position in the data": """
from jaxdpo.data.loader import Loader
stream = Loader.stream
Loader.stream = lambda self, first, last: stream(self, 1, last - first + 1)
""",
    "seed of the order": """
import dataclasses
from jaxdpo.data.loader import Loader
stream = Loader.stream
def reseeded(self, first, last):
    return stream(dataclasses.replace(self, seed=self.seed + (first > 1)), first, last)
Loader.stream = reseeded
""",
}
"""Programs that leave something out of a resume: what was not saved, or not read."""


def lane(
    runs: Runs, run: Path, number: signal.Signals, kinds: list[str], seed: int
) -> dict[str, Any]:
    """One run that is interrupted at these moments, spread over its steps, and then finished."""
    draw = random.Random(seed)
    events = []
    with contextlib.closing(Server(ENVIRONMENT)) as server:
        for count, kind in enumerate(kinds):
            mark = 1 + (runs.total - 60) * count // len(kinds) + draw.randrange(10)
            events.append(interrupt(runs, run, number, kind, mark, draw, server))
        code = runs.finish(run, server)
    failures = [f"seed {seed}: {name}" for name in runs.differences(run)]
    if code:
        failures.append(f"seed {seed}: ended with {code}")
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
    """`count` interruptions, every kind equally often, spread over several concurrent runs."""
    draw = random.Random(seed)
    drawn = [kinds[i % len(kinds)] for i in range(count)]
    draw.shuffle(drawn)
    with concurrent.futures.ThreadPoolExecutor(num_lanes) as pool:
        parts = []
        for i in range(num_lanes):
            run = runs.folder / f"{name}{i}"
            parts.append(pool.submit(lane, runs, run, number, drawn[i::num_lanes], seed + i))
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
    """What the comparison notices of a resume that lacks something, for each of MUTATIONS."""
    seen, failures = {}, []
    for number, (name, program) in enumerate(MUTATIONS.items()):
        run = runs.folder / f"mutated{number}"
        shutil.copytree(stopped, run)
        code = runs.finish(run, server, program)
        differences = len(runs.differences(run)) if code == 0 else 0
        seen[name] = f"{differences} differences" if code == 0 else f"ended with {code}"
        if not differences:
            failures.append(f"left out and not noticed: {name}")
    return {"seen": seen, "failures": failures}


# --- damaged files ---


def flips(run: Path, count: int, seed: int) -> dict[str, Any]:
    """Flip single bits of the newest checkpoint, one at a time, and read it."""
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
    """Whether a reader accepts the checkpoint."""
    try:
        return restore_params(run)[0] == step
    except ValueError:
        return False


def truncate(path: Path) -> None:
    """Remove the second half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Remove a file's content."""
    os.truncate(path, 0)


def broken_files(runs: Runs, stopped: Path, server: Server, *, every: bool) -> dict[str, Any]:
    """Truncate, empty and delete a file of the newest checkpoint, add junk, and finish the run.

    Args:
        every: also damage every file in every way, and check that a reader refuses the checkpoint.
    """
    failures = []
    for number, harm in enumerate((truncate, empty, Path.unlink)):
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
                failures.append(f"{harm.__name__} {path.relative_to(folder)}: not noticed")
            path.write_bytes(good)
        harm(max(files, key=lambda path: path.stat().st_size))
        for junk in ("999999", "-1", "12.saving", "x"):
            (run / "checkpoints" / junk).mkdir()
        (run / "checkpoints" / "88").write_text("junk")
        code = runs.finish(run, server)
        if code != 0 or runs.differences(run):
            failures.append(f"{harm.__name__}: ended with {code}: {runs.differences(run)}")
        log = printed(run)
        if ".damaged" not in log or "999999 has no manifest.json" not in log:
            failures.append(f"{harm.__name__}: the damage was not logged")
    return {"failures": failures}


def main() -> int:
    """Do everything and write the result; returns the number of failures."""
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
        python = f"Python {platform.python_version()}"
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {python}",
            "steps": args.steps,
            "stopped at": stop["saved"],
            "left out of a resume": mutations(runs, stopped, server),
            "bit flips": flips(stopped, args.flips, args.seed),
            "truncated, empty and deleted files, junk": broken_files(
                runs, stopped, server, every=True
            ),
            "SIGTERM": lanes(
                runs, "term", signal.SIGTERM, term_moments, args.terms, args.lanes, args.seed
            ),
            "SIGKILL": lanes(
                runs, "kill", signal.SIGKILL, kill_moments, args.kills, args.lanes, args.seed
            ),
        }
    failures = []
    for part in result.values():
        if isinstance(part, dict):
            failures += part["failures"]
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
