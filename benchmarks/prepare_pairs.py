"""Preparation of pairs beside TRL's own: from a file of rows to token ids.

    python benchmarks/prepare_pairs.py --trl-python <python of an environment with trl>
                                       --tokenizer <folder> [--pairs 100000]

Synthetic dialogues in the style of hh-rlhf (plain text, Human: and Assistant: turns, words and
lengths drawn from the real pairs), one JSON lines file for both sides, the same fast tokenizer, two
processes each. Ours is `prepare` as `python -m jaxdpo.train` calls it, with an empty cache and then
with a full one; TRL's is DPOTrainer's `_prepare_dataset` with dataset_num_proc on rows loaded by
`datasets`, into an empty cache of its own. Timed alike: from the file to prepared rows, without
imports and loading the tokenizer; tokens are prompt + chosen + rejected as prepared.

Then ours with four times as many pairs: memory must not grow. Memory is the peak resident size of
the main process plus that of the largest worker times their number. Last, a run of the
56M-parameter model of vs_trl.py on the real pairs: the share of a step that it waits for its batch.

Writes results/prepare_pairs-<date>.json and .md.
"""

import argparse
import collections
import datetime
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from versus.machine import commit, hardware, tell
from versus.workers import BENCHMARKS, environment

SPEED_AIM, MEMORY_AIM, WAIT_AIM = 3.0, 1.5, 0.02
GROWTH = 4
"""Factor by which the memory test has more pairs."""


def main() -> None:
    """Measure both sides and write the files."""
    args = arguments()
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(len(os.sched_getaffinity(0))),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jaxdpo", "tokenizers", "transformers")},
        },
        "pairs": args.pairs,
        "processes": args.processes,
    }
    with tempfile.TemporaryDirectory(prefix="prepare-pairs-") as scratch:
        folder = Path(scratch)
        write_rows(folder / "rows.jsonl", args.data, args.pairs)
        write_rows(folder / "more.jsonl", args.data, GROWTH * args.pairs)
        ours = [sys.executable, "-m", "versus.pairs_ours"]
        results["ours"] = worker(ours, args, folder / "rows.jsonl", folder / "ours")
        results["ours again"] = worker(ours, args, folder / "rows.jsonl", folder / "ours")
        results["TRL"] = worker(
            [args.trl_python, "-m", "versus.pairs_theirs"],
            args,
            folder / "rows.jsonl",
            folder / "theirs",
        )
        results["ours, more"] = worker(ours, args, folder / "more.jsonl", folder / "ours")
        results["ours, more again"] = worker(ours, args, folder / "more.jsonl", folder / "ours")
        results["wait_fraction"] = measure_wait(args, folder)
    path = args.out / f"prepare_pairs-{results['date']}{args.suffix}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = os.environ.get("JAXDPO_DATA", ".")
    parser.add_argument(
        "--trl-python", required=True, help="the python of an environment that has trl"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(data) / "hh-rlhf" / "harmless-base-test.jsonl.gz",
        help="real hh-rlhf pairs",
    )
    parser.add_argument("--tokenizer", type=Path, default=Path(data) / "tokenizers" / "gpt2")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of the run that measures the wait"
    )
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results")
    parser.add_argument("--suffix", default="", help="put after the date in the files' names")
    return parser.parse_args()


def write_rows(path: Path, data: Path, count: int) -> None:
    """Rows of {prompt, chosen, rejected}: words and turn lengths are drawn from the real pairs."""
    with gzip.open(data, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line in file]
    words, counts = zip(
        *collections.Counter(word for text in texts for word in text.split()).most_common(),
        strict=True,
    )
    turns = [len(turn.split()) for text in texts for turn in text.split("\n\n")[1:]]
    rng, share = np.random.default_rng(count), np.array(counts) / sum(counts)
    bounds = share.cumsum()[:-1]

    def say(length: int) -> str:
        return " ".join(
            words[number] for number in bounds.searchsorted(rng.random(length), side="right")
        )

    tell(f"writing {count} pairs")
    with path.open("w", encoding="utf-8") as file:
        for lengths in rng.choice(turns, (count, 5)).tolist():
            human, assistant, again, chosen, rejected = (say(min(length, 60)) for length in lengths)
            prompt = f"\n\nHuman: {human}\n\nAssistant: {assistant}\n\nHuman: {again}\n\nAssistant:"
            row = {"prompt": prompt, "chosen": f" {chosen} yes", "rejected": f" {rejected} no"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def worker(command: list[str], args: argparse.Namespace, rows: Path, cache: Path) -> dict[str, Any]:
    """Run one side in a process of its own; returns its measurements."""
    tell(f"{command[-1]} on {rows.name}")
    command = [
        *command,
        f"--rows={rows}",
        f"--tokenizer={args.tokenizer}",
        f"--processes={args.processes}",
        f"--cache={cache}",
    ]
    done = subprocess.run(
        command, cwd=BENCHMARKS, env=environment(2), stdout=subprocess.PIPE, text=True, check=True
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    tell(f"{answer['seconds']:.1f} s, {answer['tokens']} tokens, {answer['gigabytes']:.2f} GB")
    return answer


def measure_wait(args: argparse.Namespace, folder: Path) -> float:
    """Median share of a step that the 56M model waits for its batch."""
    tell(f"{args.steps} steps of the 56M model")
    prepare = [
        sys.executable,
        "-m",
        "versus.prepare",
        f"--out={folder / 'model'}",
        f"--data={args.data}",
    ]
    prepare += ["--rounds=1", "--steps-per-round=1"]
    subprocess.run(
        prepare, cwd=BENCHMARKS, env=environment(2), check=True, stdout=subprocess.DEVNULL
    )
    options = [
        f"model.path={folder / 'model' / 'model'}",
        f"data.train=[{args.data}]",
        f"run_dir={folder / 'run'}",
        f"data.cache={folder / 'pairs'}",
    ]
    options += [
        f"train.steps={args.steps}",
        "train.batch_size=8",
        "data.max_length=512",
        "eval.every=0",
        "log.tensorboard=false",
    ]
    options += ["train.compilation_cache=null", "data.num_packed_lengths=1"]
    subprocess.run(
        [sys.executable, "-m", "jaxdpo.train", *options],
        env=environment(2),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    rows = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    return float(np.median([row["wait_fraction"] for row in rows if "wait_fraction" in row][1:]))


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    ours, theirs, more = results["ours"], results["TRL"], results["ours, more"]
    speed = (ours["tokens"] / ours["seconds"]) / (theirs["tokens"] / theirs["seconds"])
    growth = more["gigabytes"] / ours["gigabytes"]
    aims = [
        ("tokens/s, ours / TRL", f"at least {SPEED_AIM}x", f"{speed:.2f}", speed >= SPEED_AIM),
        (
            f"memory, {GROWTH * results['pairs']:,} pairs",
            f"below {MEMORY_AIM} GB",
            f"{more['gigabytes']:.2f} GB",
            more["gigabytes"] < MEMORY_AIM,
        ),
        (
            f"memory, {GROWTH}x the pairs / the pairs",
            "flat: below 1.1",
            f"{growth:.2f}",
            growth < 1.1,
        ),
        (
            "wait for a batch / step, 56M model",
            f"under {WAIT_AIM}",
            f"{results['wait_fraction']:.4f}",
            results["wait_fraction"] < WAIT_AIM,
        ),
    ]
    machine = results["hardware"]
    versions = ", ".join(
        f"{name} {number}" for name, number in {**results["versions"], **theirs["versions"]}.items()
    )
    lines = [
        f"# Preparation of pairs, {results['date']}",
        "",
        f"At commit {results['commit']}; {machine['cpu']} ({machine['family_model']}), "
        f"{machine['cores_used']} cores, {results['processes']} processes; "
        f"load before the run {machine['load_before']:.2f}; {versions}",
        "",
        "|  | wanted | measured | met |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {wanted} | {found} | {'yes' if met else '**no**'} |"
            for name, wanted, found, met in aims
        ),
        "",
        "|  | pairs | tokens | seconds | tokens/s | memory, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ("ours", "ours again", "TRL", "ours, more", "ours, more again"):
        row = results[name]
        rate = f"{row['tokens'] / row['seconds']:,.0f}"
        lines.append(
            f"| {name} | {row['pairs']:,} | {row['tokens']:,} | {row['seconds']:.1f} "
            f"| {rate} | {row['gigabytes']:.2f} |"
        )
    return "\n".join([*lines, "", "`again`: the same start with encoded pairs in the cache.", ""])


if __name__ == "__main__":
    main()
