"""`--dry-run`: everything up to the first step, shown instead of done."""

import time
from typing import Any

import jax
import numpy as np

from jaxdpo.config import cli
from jaxdpo.data.tokenize import describe_pair
from jaxdpo.training.loop import describe
from jaxdpo.training.trainer import Trainer

SHOWN_PAIRS = 2
GIB = 1 << 30


def dry_run(session: Trainer) -> None:
    """Print config, first pairs, sizes, and memory and time of the compiled step."""
    print(cli.to_yaml(session.config))
    for i in session.loader.pairs_of(1)[:SHOWN_PAIRS]:
        pair = session.data.train[int(i)]
        print(
            f"--- {pair.id}: the model is scored on what stands between the marks\n{describe_pair(pair, session.tokenizer)}\n"
        )
    print("\n".join(describe(session)))
    batch = session.loader.batch(1)
    print(
        f"first step: {batch.tokens_MBT.shape} microbatches x rows x tokens, {int((batch.sides_MBS >= 0).sum())} scored tokens"
    )
    started = time.perf_counter()
    program = session.lower(batch).compile()
    print(f"compile: {time.perf_counter() - started:.1f} s")
    print("\n".join(_memory(program.memory_analysis())))
    seconds = _seconds_per_step(session, program)
    hours = seconds * session.total_steps / 3600
    print(
        f"time: {seconds:.3g} s a step, {hours:.2g} h for {session.total_steps} steps, evaluation and saves aside"
    )


def _memory(analysis: Any) -> list[str]:
    """Memory of one device while a step runs, as lines."""
    arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return [
        f"memory of a device: {(arguments + temporary) / GIB:.2f} GiB",
        f"  weights, optimizer, reference and batch: {arguments / GIB:.2f} GiB",
        f"  gradients, activations and logits: {temporary / GIB:.2f} GiB",
    ]


def _seconds_per_step(session: Trainer, program: jax.stages.Compiled) -> float:
    """Time of the second of two steps that change nothing."""
    state, fixed = session.start(session.weights.initial(), session.weights.base())
    on_host, apply = session.loader.batch(1), session.put_scalar(False, np.bool_)
    if session.weights.reference_kind == "cached":  # as good as any for the time that a step takes
        fixed = session.with_logps(
            fixed, np.zeros((len(session.loader.pairs_of(1)), 2), np.float32), on_host
        )
    batch = session.put_batch(on_host)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        state, metrics = program(state, fixed, batch, apply)
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - started
    return seconds
