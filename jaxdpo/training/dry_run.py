"""`--dry-run`: everything up to the first step, printed instead of trained."""

import time
from typing import Any

import jax
import numpy as np

from jaxdpo.config import cli
from jaxdpo.data.detokenize import describe_pair
from jaxdpo.training.run_files import describe
from jaxdpo.training.trainer import Trainer

SHOWN_PAIRS = 2
GIB = 1 << 30


def dry_run(trainer: Trainer) -> None:
    """Print config, first pairs, sizes, and memory and time of the compiled step."""
    print(cli.to_yaml(trainer.config))
    for i in trainer.loader.pairs_of(1)[:SHOWN_PAIRS]:
        pair = trainer.data.train[int(i)]
        print(f"--- {pair.id}: the loss is taken over the tokens between the marks")
        print(f"{describe_pair(pair, trainer.tokenizer)}\n")
    print("\n".join(describe(trainer)))
    batch = trainer.loader.batch(1)
    num_loss_tokens = int((batch.sides_MBS >= 0).sum())
    print(
        f"first step: {batch.tokens_MBT.shape} microbatches x packed sequences x tokens, "
        f"{num_loss_tokens} loss tokens"
    )
    started = time.perf_counter()
    program = trainer.lower(batch).compile()
    print(f"compile: {time.perf_counter() - started:.1f} s")
    print("\n".join(_memory(program.memory_analysis())))
    seconds = _seconds_per_step(trainer, program)
    hours = seconds * trainer.total_steps / 3600
    print(
        f"time: {seconds:.3g} s a step, {hours:.2g} h for {trainer.total_steps} steps, "
        "without evaluation and checkpoints"
    )


def _memory(analysis: Any) -> list[str]:
    """Memory of one device while a step runs, as lines."""
    arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return [
        f"memory of a device: {(arguments + temporary) / GIB:.2f} GiB",
        f"  weights, optimizer, reference and batch: {arguments / GIB:.2f} GiB",
        f"  gradients, activations and logits: {temporary / GIB:.2f} GiB",
    ]


def _seconds_per_step(trainer: Trainer, program: jax.stages.Compiled) -> float:
    """Time of the second of two steps that change nothing; the first one warms up."""
    state, frozen = trainer.start(trainer.weights.initial(), trainer.weights.base())
    on_host, apply = trainer.loader.batch(1), trainer.put_scalar(False, np.bool_)
    if trainer.weights.reference_kind == "cached":
        # The values of the log-probs do not change the time of a step.
        zeros = np.zeros((len(trainer.loader.pairs_of(1)), 2), np.float32)
        frozen = trainer.with_logps(frozen, zeros, on_host)
    batch = trainer.put_batch(on_host)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        state, metrics = program(state, frozen, batch, apply)
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - started
    return seconds
