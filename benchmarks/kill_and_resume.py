"""Kill a training run at random moments, resume it, and compare with an uninterrupted run.

    python benchmarks/kill_and_resume.py --model <Hugging Face folder> --data <pairs> [--kills 3]
                                         [option=value ...]

Two epochs are trained. The run under test is ended by SIGKILL `--kills` times, at random steps of
its own progress (the last one in epoch 2), and started again each time. In the end every array of
the last checkpoint, and every row of metrics.jsonl except the keys that depend on the clock, must
equal the uninterrupted run's, bit for bit. Writes results/kill_and_resume-<date>.json.
"""

import argparse
import datetime
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jaxdpo.training.metric_logger import TIME_KEYS

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run both, compare, write the result; 0 when they are equal."""
    args, options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "jaxdpo.train",
            f"model.path={args.model}",
            f"data.train=[{args.data}]",
            "train.epochs=2",
            *options,
        ]
        uninterrupted, killed = Path(folder) / "uninterrupted", Path(folder) / "killed"
        subprocess.run(
            [*command, f"run_dir={uninterrupted}"], check=True, stdout=subprocess.DEVNULL
        )
        total = max(row["step"] for row in rows(uninterrupted))
        draw = random.Random(args.seed)
        marks = sorted(draw.randint(2, total - 2) for _ in range(args.kills - 1))
        marks.append(draw.randint(total // 2 + 1, total - 1))
        kills = []
        for mark in sorted(marks):
            kills.append(kill_at([*command, f"run_dir={killed}"], killed, mark, draw))
        subprocess.run([*command, f"run_dir={killed}"], check=True, stdout=subprocess.DEVNULL)
        result = {
            "command": " ".join(["python -m jaxdpo.train", *options, "train.epochs=2"]),
            "steps": total,
            "killed after step": kills,
            "different arrays": different_arrays(uninterrupted, killed, total),
            "different metrics rows": different_rows(uninterrupted, killed),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"kill_and_resume-{datetime.date.today()}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))
    return int(bool(result["different arrays"] or result["different metrics rows"]))


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The script's own arguments, and those for jaxdpo.train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_known_args()


def kill_at(command: list[str], run: Path, mark: int, draw: random.Random) -> int:
    """Start the command and kill it shortly after it logged step `mark`; returns the last step."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and last_step(run) < mark:
            time.sleep(0.02)
        time.sleep(draw.random())
        process.send_signal(signal.SIGKILL)
    return last_step(run)


def last_step(run: Path) -> int:
    """Newest step in metrics.jsonl; 0 before there is one."""
    return max((row["step"] for row in rows(run)), default=0)


def rows(run: Path) -> list[dict[str, Any]]:
    """The complete rows of metrics.jsonl, without the keys that depend on the clock."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in parsed]


def different_rows(one: Path, other: Path) -> list[int]:
    """Steps whose rows differ, or that one run lacks."""
    a, b = rows(one), rows(other)
    different = {row["step"] for row in a if row not in b}
    different |= {row["step"] for row in b if row not in a}
    if len(a) != len(b):
        # A row that is there twice.
        different.add(-1)
    return sorted(different)


def different_arrays(one: Path, other: Path, step: int) -> list[str]:
    """Arrays of the checkpoint of `step` that differ in any bit."""
    ours, theirs = (flat(load(run / "checkpoints" / str(step) / "state")) for run in (one, other))
    different = ours.keys() ^ theirs.keys()
    for name in ours.keys() & theirs.keys():
        if ours[name].tobytes() != theirs[name].tobytes():
            different.add(name)
    return sorted(different)


def load(folder: Path) -> dict[str, Any]:
    """A checkpoint's arrays, by plain orbax."""
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder.resolve())


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays by path."""
    found: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = np.asarray(value)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
