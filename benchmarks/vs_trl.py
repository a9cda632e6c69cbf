"""jaxdpo and TRL side by side on CPU: speed, peak memory, start-up time.

    python benchmarks/vs_trl.py --trl-python <python with trl> --data <hh-rlhf .jsonl.gz>

The same 56M-parameter Llama with the same random weights, the same tokenizer, the same real pairs
in the same order (token ids are compared), 8 pairs a step, the same AdamW. Every rival is a process
of its own for the whole run; the rounds go around all of them, one working at a time, and a ratio
is taken within a round. A round has two halves: pairs in random order, and in batches of similar
length. Each side's mean log-prob of every step is compared, to be sure that both did the same work.
Before anything is timed the script waits until the machine is idle; a round in which other
processes used more than 5% of the cores is repeated.

Writes benchmarks/results/vs_trl-<date>.json with every number and vs_trl-<date>.md with the tables.
See versus/ours.py and versus/theirs.py for how each side is run.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from versus.machine import commit, hardware, tell
from versus.report import markdown, verdicts
from versus.workers import (
    BENCHMARKS,
    FOREIGN_LIMIT,
    RIVALS,
    SPARING,
    Rival,
    Setup,
    Worker,
    start,
    wait_until_quiet,
)

HH_FILE = "hh-rlhf/harmless-base-test.jsonl.gz"
OURS = ("jaxdpo", "jax", "jaxlib", "numpy")
THEIRS = ("trl", "torch", "transformers", "accelerate", "datasets")
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Largest relative difference of log-probs between the sides."""
SPARE = 2
"""Rounds that may be run per round wanted: those disturbed by other work do not count."""
ATTEMPTS = 3
"""Starts of a worker, until one is undisturbed."""
PATIENCE = 120.0
"""Seconds to wait for other work to end, each time."""


def main(argv: list[str]) -> None:
    """Run the whole comparison and write its files."""
    args = arguments(argv)
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)  # the workers inherit it
    with tempfile.TemporaryDirectory(prefix="vs_trl-") as scratch:
        setup = Setup(
            folder=Path(scratch) / "inputs",
            scratch=Path(scratch),
            trl_python=args.trl_python,
            cores=len(cores),
            batch_size=args.batch_size,
            max_length=args.max_length,
        )
        results = {
            "config": configuration(args),
            "hardware": hardware(len(cores)),
            "versions": versions(args.trl_python),
        }
        plan = prepare(setup, args)
        results |= {"data": plan["facts"]} | measure(setup, args, plan)
    results["same_work"] = same_work(results["rounds"])
    results["verdicts"] = verdicts(results)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"vs_trl-{results['config']['date']}{args.suffix}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    default = Path(os.environ["JAXDPO_DATA"]) / HH_FILE if "JAXDPO_DATA" in os.environ else None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl-python",
        required=True,
        help="the python of an environment that has trl (1.16) and torch",
    )
    parser.add_argument(
        "--data",
        default=default,
        required=default is None,
        help=f"pairs; default: $JAXDPO_DATA/{HH_FILE}",
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="undisturbed rounds wanted, each of both orders"
    )
    parser.add_argument("--steps-per-round", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results")
    parser.add_argument("--suffix", default="", help="put after the date in the files' names")
    return parser.parse_args(argv)


def prepare(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Make model, tokenizer and pairs in a process of its own; returns the plan."""
    tell("making the model and the pairs")
    command = [
        sys.executable,
        "-m",
        "versus.prepare",
        f"--data={args.data}",
        f"--out={setup.folder}",
    ]
    command += [f"--rounds={SPARE * args.rounds}", f"--steps-per-round={args.steps_per_round}"]
    command += [f"--batch-size={args.batch_size}", f"--max-length={args.max_length}"]
    subprocess.run(command, cwd=BENCHMARKS, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return json.loads((setup.folder / "plan.json").read_text(encoding="utf-8"))


def count(plan: dict[str, Any], steps: list[list[int]]) -> dict[str, int]:
    """Tokens of steps: real ones (a shared prompt once), and those of padded batches."""
    lengths = [[[len(ids) for ids in plan["ids"][str(row)]] for row in step] for step in steps]
    longest = [max(prompt + max(answers) for prompt, *answers in step) for step in lengths]
    return {
        "real": sum(sum(pair) for step in lengths for pair in step),
        "padded": sum(2 * len(s) * n for s, n in zip(steps, longest, strict=True)),
    }


def measure(setup: Setup, args: argparse.Namespace, plan: dict[str, Any]) -> dict[str, Any]:
    """Start all rivals, go around them, and measure TRL with gradient checkpointing."""
    starts: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    for rival in RIVALS:
        cache = ""
        if rival.ours:
            label = f"{rival.name}, nothing compiled"
            cold = launch(setup, rival, label, starts)
            starts[label]["all_programs"] = cold.ask(do="prepare")
            cold.quit()
            cache = starts[label]["cache"]
        workers[rival.name] = launch(setup, rival, rival.name, starts, cache)
        starts[rival.name]["all_programs"] = workers[rival.name].ask(do="prepare")
    done = rounds(workers, plan, args)
    for worker in workers.values():
        worker.quit()
    steps = plan["phases"]["random"]
    heaviest = max(
        steps[1 : 1 + len(done) * args.steps_per_round],
        key=lambda step: count(plan, [step])["padded"],
    )
    sparing = {
        rival.name: recomputing(setup, rival, [steps[0], heaviest], starts) for rival in SPARING
    }
    return {"starts": starts, "rounds": done, "sparing": sparing}


def launch(
    setup: Setup,
    rival: Rival,
    label: str,
    starts: dict[str, dict[str, Any]],
    cache: str = "",
    steps: list[list[int]] | None = None,
) -> Worker:
    """Start a worker and record its start time; repeat if other work disturbed it."""
    attempt = 1
    while True:
        wait_until_quiet(PATIENCE)
        name = cache or f"{rival.dtype}-{attempt}"
        worker = start(setup, rival, name, steps)
        starts[label] = worker.start | {"cache": name}
        tell(
            f"{label}: {worker.start['seconds']:.1f} s to the end of the first step, "
            f"others {worker.start['foreign']:.1%}"
        )
        if worker.start["foreign"] <= FOREIGN_LIMIT or attempt == ATTEMPTS:
            return worker
        worker.quit()
        attempt += 1


def rounds(
    workers: dict[str, Worker], plan: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Go around until enough rounds were undisturbed or no spare ones are left.

    Returns for each round what every rival answered, by phase.
    """
    done: list[dict[str, Any]] = []
    size = args.steps_per_round
    while sum(item["clean"] for item in done) < args.rounds and len(done) < SPARE * args.rounds:
        item: dict[str, Any] = {"phases": {}}
        for phase, steps in plan["phases"].items():
            first = len(done) * size + (phase == "random")
            answers = {}
            for name, worker in workers.items():
                wait_until_quiet(PATIENCE)
                answers[name] = worker.ask(do="round", phase=phase, steps=size)
            item["phases"][phase] = {
                "answers": answers,
                "tokens": count(plan, steps[first : first + size]),
            }
            speeds = ", ".join(
                f"{name} {args.batch_size * size / answers[name]['seconds']:.2f}"
                for name in workers
            )
            tell(f"round {len(done) + 1}, {phase}, pairs/s: {speeds}")
        item["foreign"] = max(
            answer["foreign"]
            for found in item["phases"].values()
            for answer in found["answers"].values()
        )
        item["clean"] = item["foreign"] <= FOREIGN_LIMIT
        done.append(item)
        tell(f"round {len(done)}: others used at most {item['foreign']:.1%} of the cores")
    return done


def recomputing(
    setup: Setup, rival: Rival, steps: list[list[int]], starts: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """Seconds and peak memory of the step with the most padded tokens, in a process of its own."""
    worker = launch(setup, rival, rival.name, starts, steps=steps)
    answer = worker.ask(do="round", phase="random", steps=1)
    worker.quit()
    return {"seconds": answer["seconds"], "peak_bytes": answer["peak_bytes"]}


def same_work(done: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative difference of a step's mean chosen log-prob from ours in float32, by rival.

    Raises:
        ValueError: it is so large that the sides cannot have trained on the same pairs.
    """
    worst = {}
    for rival in RIVALS:
        answers = [found["answers"] for item in done for found in item["phases"].values()]
        pairs = [
            pair
            for answer in answers
            for pair in zip(
                answer[rival.name]["logps"], answer[RIVALS[0].name]["logps"], strict=True
            )
        ]
        worst[rival.name] = max(abs(a / b - 1) for a, b in pairs)
        if worst[rival.name] > TOLERANCE[rival.dtype]:
            raise ValueError(
                f"{rival.name}: log-probs differ from ours by {worst[rival.name]:.2g}; "
                "the sides did not do the same work"
            )
    return worst


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the run, without paths of this machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/vs_trl.py --trl-python <python> "
        f"--rounds {args.rounds} --steps-per-round {args.steps_per_round} --cores {args.cores}",
        "commit": commit(),
        "rounds": args.rounds,
        "steps_per_round": args.steps_per_round,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "data": Path(args.data).name,
    }


def versions(trl_python: str) -> dict[str, str]:
    """Versions of both sides. Importing TRL puts its files into the page cache for all starts."""
    code = (
        "import sys, json, trl; from trl import DPOTrainer; "
        "from importlib.metadata import version; "
        "found = {'python (TRL)': sys.version.split()[0]}; "
        f"print(json.dumps(found | {{name: version(name) for name in {THEIRS}}}))"
    )
    theirs = subprocess.run([trl_python, "-c", code], capture_output=True, text=True, check=True)
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in OURS},
        **json.loads(theirs.stdout.splitlines()[-1]),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
