"""Our side: a worker that trains with the parts of `python -m jaxdpo.train`.

    python -m versus.ours --folder <prepared> --run-dir <folder> --cache <folder> --dtype bfloat16
                          --batch-size 8 --max-length 512

A round is timed from its first batch until the metrics of its last step are on the host and in
metrics.jsonl: Run.advance, as the command calls it, with packing in the loader's thread, transfer,
step and logging. The start includes the closed-form check.
"""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.data.packing import Batch
from jaxdpo.training.metric_logger import Logger
from jaxdpo.training.preemption import Stop
from jaxdpo.training.resume import start_or_resume
from jaxdpo.training.run import Run
from jaxdpo.training.trainer import Trainer
from jaxdpo.utils.compile_cache import keep_compiled_programs

from .protocol import Channel

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Counts the programs that XLA compiles or loads from the cache on disk, and their seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            self.seconds.append(duration_secs)

    def report(self) -> dict[str, float]:
        """Programs and seconds since the last report."""
        found, self.seconds = self.seconds, []
        return {
            "programs": len(found),
            "large_programs": sum(s > 0.5 for s in found),
            "compile_seconds": sum(found),
        }


class Phase:
    """A run over one order of the pairs, from its first step on."""

    def __init__(self, run: Run, num_steps: int):
        self.run = run
        self.num_steps = num_steps
        self.next_step = 1
        self._apply = run.trainer.put_scalar(True, np.bool_)
        self._batches: Iterator[Batch] = run.trainer.loader.stream(1, 1)

    def prepare(self) -> None:
        """Compile the program of every packed length, by one step of each that updates nothing."""
        trainer, run, seen = self.run.trainer, self.run, set()
        for step in range(self.next_step, self.num_steps + 1):
            batch = trainer.loader.batch(step)
            if (shape := batch.tokens_MBT.shape) not in seen:
                seen.add(shape)
                apply = trainer.put_scalar(False, np.bool_)
                run.state, metrics = trainer.train_step(
                    run.state, run.frozen_for(step, batch), trainer.put_batch(batch), apply
                )
                jax.device_get(metrics)
        self._batches = trainer.loader.stream(self.next_step, self.num_steps)

    def round(self, steps: int) -> tuple[float, list[float]]:
        """Train; returns seconds and each step's mean log-prob of the chosen answers."""
        began = time.perf_counter()
        with jax.transfer_guard("disallow"):
            for step in range(self.next_step, self.next_step + steps):
                asked = time.perf_counter()
                batch = next(self._batches)
                self.run.advance(step, batch, self._apply, time.perf_counter() - asked)
            self.run.flush()
        seconds = time.perf_counter() - began
        self.next_step += steps
        return seconds, self._logps()[-steps:]

    def _logps(self) -> list[float]:
        path = Path(self.run.config.run_dir) / "metrics.jsonl"
        return [json.loads(line)["logps/chosen"] for line in path.read_text().splitlines()]


def read_config(args: argparse.Namespace, phase: str) -> Config:
    """The config of the command, for one order of the pairs."""
    command = [
        f"run_dir={args.run_dir / phase}",
        f"model.path={args.folder / 'model'}",
        f"model.compute_dtype={args.dtype}",
        f"data.train=[{args.folder / f'{phase}.jsonl'}]",
        "data.eval_fraction=0",
        f"data.max_length={args.max_length}",
        "data.shuffle=false",
        f"train.batch_size={args.batch_size}",
        f"train.compilation_cache={args.cache}",
        "optim.schedule=constant",
        "eval.every=0",
        "checkpoint.save_every=0",
    ]
    return cli.load(Config, command, command="train")[0]


def open_logger(trainer: Trainer) -> Logger:
    """The metric logger of a trainer."""
    config = trainer.config
    return Logger(config.run_dir, config.log, trainer.total_steps, None, has_reference=True)


def main() -> None:
    """Start, train the first step, then answer requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    args = parser.parse_args()
    channel, compiles = Channel(), Compiles()
    plan = json.loads((args.folder / "plan.json").read_text())

    config = read_config(args, "random")
    keep_compiled_programs(config.train.compilation_cache)
    trainer = Trainer.open(config)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(Path(config.run_dir), 1, 0))
        run = start_or_resume(
            trainer, stack.enter_context(open_logger(trainer)), checkpoints, Stop()
        )
        current = Phase(run, len(plan["phases"]["random"]))
        _, logps = current.round(1)
        phases = {"random": current}
        channel.send(event="first_step", logps=logps, **compiles.report())
        while (request := channel.receive())["do"] != "quit":
            if request["do"] == "prepare":
                current.prepare()
                trainer = Trainer.open(read_config(args, "grouped"))
                run = dataclasses.replace(
                    run,
                    trainer=trainer,
                    logger=stack.enter_context(open_logger(trainer)),
                    step=0,
                    tokens=0,
                )
                current = phases["grouped"] = Phase(run, len(plan["phases"]["grouped"]))
                current.prepare()
                packed_lengths = {
                    name: phase.run.trainer.loader.packer.packed_lengths
                    for name, phase in phases.items()
                }
                channel.send(event="prepared", packed_lengths=packed_lengths, **compiles.report())
            else:
                state = current.run.state
                current = phases[request["phase"]]
                current.run.state = state
                seconds, logps = current.round(request["steps"])
                channel.send(event="round", seconds=seconds, logps=logps, **compiles.report())


if __name__ == "__main__":
    main()
