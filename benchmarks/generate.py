"""Decoding speed beside transformers on CPU: tokens/s of greedy decoding at batch sizes 1 and 16.

    python benchmarks/generate.py --torch-python <python with torch and transformers>

The same 56M-parameter Llama with the same random weights, the same prompts, completions of one
length. Every rival is a process of its own for the whole run; the rounds go around all of them, one
working at a time, and a ratio is taken within a round. The completions are compared: in float32
they must be equal. Before anything is timed the script waits until the machine is idle; a round in
which other processes used more than 5% of the cores is repeated.

Writes benchmarks/results/generate-<date>.json with every number and generate-<date>.md with the
table. See versus/generate_ours.py and versus/generate_theirs.py for how each side is run.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from versus.machine import commit, hardware, tell
from versus.workers import BENCHMARKS, FOREIGN_LIMIT, Worker, environment, wait_until_quiet

BATCHES = (1, 16)
DTYPES = ("float32", "bfloat16")
AIM = 3.0
"""The speed-up to reach with the larger batch."""
VOCAB = 32_000
SPARE = 3
"""Rounds that may be run for each that is wanted."""
PATIENCE = 120.0
"""Seconds to wait for other work to end, each time."""


def main(argv: list[str]) -> None:
    """Run the whole comparison and write its files."""
    args = arguments(argv)
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)  # the workers inherit it
    results = {
        "config": configuration(args),
        "hardware": hardware(len(cores)),
        "versions": versions(args.torch_python),
    }
    with tempfile.TemporaryDirectory(prefix="generate-") as scratch:
        results["rounds"] = measure(Path(scratch), args)
    results["agreement"] = agreement(results["rounds"])
    for item in results["rounds"]:
        for answer in item["answers"].values():
            del answer["answers"]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"generate-{results['config']['date']}{args.suffix}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch-python",
        required=True,
        help="the python of an environment that has torch and transformers",
    )
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed rounds wanted")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results")
    parser.add_argument("--suffix", default="", help="put after the date in the files' names")
    return parser.parse_args(argv)


def measure(scratch: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start all rivals, warm each up, and go around until enough rounds were undisturbed."""
    tell("making the model")
    code = (
        "import pathlib, sys; from versus.prepare import make_weights; "
        "make_weights(pathlib.Path(sys.argv[1]), 0)"
    )
    folder = scratch / "model"
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=BENCHMARKS,
        check=True,
        env=environment(args.cores),
    )
    workers = {
        f"{side} {dtype}": start(side, dtype, folder, scratch, args)
        for dtype in DTYPES
        for side in ("ours", "transformers")
    }
    draw = random.Random(0)
    prompts = {
        batch: [[draw.randrange(1, VOCAB) for _ in range(args.prompt)] for _ in range(batch)]
        for batch in BATCHES
    }
    for worker in workers.values():
        for batch in BATCHES:
            worker.ask(do="answer", prompts=prompts[batch], new=args.new)
    done: list[dict[str, Any]] = []
    while sum(item["clean"] for item in done) < args.rounds and len(done) < SPARE * args.rounds:
        answers = {}
        for batch in BATCHES:
            for name, worker in workers.items():
                wait_until_quiet(PATIENCE)
                answers[f"{name}, batch {batch}"] = worker.ask(
                    do="answer", prompts=prompts[batch], new=args.new
                )
        foreign = max(answer["foreign"] for answer in answers.values())
        done.append({"answers": answers, "foreign": foreign, "clean": foreign <= FOREIGN_LIMIT})
        speeds = ", ".join(
            f"{name} {tokens(answer) / answer['seconds']:.0f}" for name, answer in answers.items()
        )
        tell(
            f"round {len(done)}, tokens/s: {speeds}; others used at most {foreign:.1%} of the cores"
        )
    for worker in workers.values():
        worker.quit()
    return done


def start(side: str, dtype: str, folder: Path, scratch: Path, args: argparse.Namespace) -> Worker:
    """A rival's process, its model loaded."""
    module = {
        "ours": [sys.executable, "-m", "versus.generate_ours"],
        "transformers": [args.torch_python, "-m", "versus.generate_theirs"],
    }[side]
    threads = [] if side == "ours" else [f"--threads={args.cores}"]
    command = [*module, f"--folder={folder}", f"--dtype={dtype}", *threads]
    return Worker(command, scratch / f"{side}-{dtype}.log", environment(args.cores))


def tokens(answer: dict[str, Any]) -> int:
    """New tokens of an answer to a request."""
    return sum(map(len, answer["answers"]))


def agreement(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the completions' tokens before the first difference between the sides, by dtype.

    Raises:
        ValueError: in float32 they differ, so the sides did not do the same work.
    """

    def same(ours: list[int], theirs: list[int]) -> int:
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                return i
        return len(ours)

    shares = {}
    for dtype in DTYPES:
        sides = [
            rounds[0]["answers"][f"{side} {dtype}, batch {max(BATCHES)}"]["answers"]
            for side in ("ours", "transformers")
        ]
        shares[dtype] = sum(same(*pair) for pair in zip(*sides, strict=True)) / sum(
            map(len, sides[0])
        )
    if shares["float32"] < 1:
        raise ValueError(
            f"only {shares['float32']:.1%} of the float32 completions agree; "
            "the sides did not do the same work"
        )
    return shares


def speeds(results: dict[str, Any], name: str) -> list[float]:
    """Tokens a second in each round that counts: the undisturbed ones, or all if none is."""
    config, batch = results["config"], int(name.rpartition(" ")[2])
    used = [item for item in results["rounds"] if item["clean"]] or results["rounds"]
    return [batch * config["new"] / item["answers"][name]["seconds"] for item in used]


def markdown(results: dict[str, Any]) -> str:
    """The result file."""
    config, machine = results["config"], results["hardware"]
    rows = []
    for batch in BATCHES:
        for dtype in DTYPES:
            ours, theirs = (
                speeds(results, f"{side} {dtype}, batch {batch}")
                for side in ("ours", "transformers")
            )
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            cells = [
                f"{statistics.median(x):.0f} ({min(x):.0f} to {max(x):.0f})" for x in (ours, theirs)
            ]
            aim = f"at least {AIM:.0f}x" if batch == max(BATCHES) else ""
            faster = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            met = ("yes" if statistics.median(ratios) >= AIM else "**no**") if aim else ""
            rows.append(
                f"| {batch} | {dtype} | {cells[0]} | {cells[1]} | {faster} | {aim} | {met} |"
            )
    clean = sum(item["clean"] for item in results["rounds"])
    disturbed = ""
    if not clean:
        disturbed = "**Other work ran beside every round: these numbers mean little.**\n\n"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"# Decoding: jaxdpo and transformers side by side, {config['date']}\n\n"
        f"`{config['command']}` at commit {config['commit']}\n\n"
        f"- {machine['cpu']} (family/model {machine['family_model']}; "
        f"{', '.join(machine['isa'])}), {machine['cores_used']} of {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}; "
        f"load before the run {machine['load_before']:.2f}\n"
        f"- {versions}\n"
        "- Llama of 56M parameters (hidden 512, 8 layers, 8 heads, 4 kv heads, mlp 1408, "
        "vocabulary 32,000, untied head), random weights; "
        f"prompts of {config['prompt']} tokens, completions of {config['new']}, greedy\n\n"
        f"{disturbed}"
        "| batch | dtype | ours, tokens/s, median (range) | transformers, tokens/s "
        "| ours is faster by | wanted | met |\n"
        "| ---: | --- | ---: | ---: | ---: | --- | --- |\n" + "\n".join(rows) + "\n\n"
        "A call from prompts on the host to completions on the host, with prefill; new tokens "
        f"divided by its seconds. {clean} of {len(results['rounds'])} rounds were undisturbed and "
        "count. Both sides have the weights in the dtype named. Completions agree in all float32 "
        "tokens; in bfloat16, where rounding decides between near equals, they diverge after "
        f"{results['agreement']['bfloat16']:.0%} of their tokens.\n"
    )


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the run, without paths of this machine."""
    command = (
        "python benchmarks/generate.py --torch-python <python> "
        f"--rounds {args.rounds} --cores {args.cores}"
    )
    today = datetime.date.today().isoformat()
    return {
        "date": today,
        "command": command,
        "commit": commit(),
        "rounds": args.rounds,
        "prompt": args.prompt,
        "new": args.new,
    }


def versions(torch_python: str) -> dict[str, str]:
    """Versions of what is compared."""
    code = "import json; from importlib.metadata import version; "
    code += "print(json.dumps({name: version(name) for name in ('torch', 'transformers')}))"
    theirs = subprocess.run([torch_python, "-c", code], capture_output=True, text=True, check=True)
    ours = {name: version(name) for name in ("jaxdpo", "jax", "jaxlib", "numpy")}
    return {"python": platform.python_version(), **ours, **json.loads(theirs.stdout)}


if __name__ == "__main__":
    main(sys.argv[1:])
