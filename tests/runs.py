"""Short runs in a folder, for the tests of the runner: start, stop, copy and compare them."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.config.schema import Config, MeshSection
from jaxdpo.distributed import sharding
from jaxdpo.training.completion_logps import StepOptions
from jaxdpo.training.loop import train
from jaxdpo.training.metric_logger import TIME_KEYS
from jaxdpo.training.run import Run
from jaxdpo.training.state import FrozenState
from jaxdpo.training.step import compile_steps
from jaxdpo.training.trainer import Trainer
from tests.tiny import config, rows, write_model, write_rows

TOTAL, STOPPED = 8, 7  # 2 pairs a step: the run is stopped in its second epoch


def folder_with_inputs(folder: Path) -> Path:
    """The folder, with the tiny model and its rows in it."""
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", rows(13))
    return folder


MAKE_MESH = sharding.make_mesh


def use_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs use one of the eight devices, and those with the same options share their programs."""
    monkeypatch.setattr(
        sharding, "make_mesh", lambda section, **_: MAKE_MESH(MeshSection(), jax.devices()[:1])
    )
    monkeypatch.setattr("jaxdpo.training.program.compile_steps", compiled_once)


PROGRAMS: dict[str, tuple[Callable, Callable]] = {}


def compiled_once(
    options: StepOptions, mesh: jax.sharding.Mesh, shardings: Any, fixed: FrozenState
) -> tuple[Callable, Callable]:
    """compile_steps that remembers."""
    places = jax.tree.leaves((shardings, fixed))
    key = repr(
        (options, jax.tree.structure((shardings, fixed)), [where.memory_kind for where in places])
    )
    if key not in PROGRAMS:
        PROGRAMS[key] = compile_steps(options, mesh, shardings, fixed)
    return PROGRAMS[key]


def settings(shared: Path, run_dir: Path, **changes: Any) -> Config:
    """A run of TOTAL steps that evaluates and saves every other one."""
    common = {
        "run_dir": str(run_dir),
        "train__steps": TOTAL,
        "data__eval_fraction": 0.3,
        "eval__every": 2,
        "checkpoint__save_every": 3,
    }
    return config(shared, **common | changes)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that must be the same bits whenever and however often the run was interrupted."""
    return [
        {key: value for key, value in row.items() if key not in TIME_KEYS}
        for row in metrics(run_dir)
    ]


def final_params(run_dir: Path) -> dict[str, Any]:
    """The policy after the last step."""
    step, params, _ = restore_params(run_dir)
    assert step == TOTAL
    return params


def same_bits(ours: Path, theirs: Path) -> bool:
    """Whether two runs ended with the same parameters and metrics."""
    equal = jax.tree.map(
        lambda a, b: a.tobytes() == b.tobytes(), final_params(ours), final_params(theirs)
    )
    return all(jax.tree.leaves(equal)) and untimed(ours) == untimed(theirs)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A SIGTERM during this step."""
    advance = Run.advance

    def advance_and_signal(self: Run, now: int, *args: Any) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(self, now, *args)

    monkeypatch.setattr(Run, "advance", advance_and_signal)


@functools.cache
def stopped(shared: Path) -> Path:
    """The plain run up to STOPPED, to be copied."""
    some = settings(shared, shared / "stopped")
    interrupt(some, STOPPED)
    return shared / "stopped"


def stopped_copy(shared: Path, run_dir: Path) -> Config:
    """A copy of the stopped run, and its config."""
    shutil.copytree(stopped(shared), run_dir, dirs_exist_ok=True)
    return settings(shared, run_dir)


def interrupt(some: Config, step: int) -> None:
    """The part of a run up to a SIGTERM, saved."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        assert train(some) is False
    assert restore_params(some.run_dir)[0] == step
    assert step != STOPPED or Trainer.open(some).loader.epoch(step) > 1


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tr": {"loss__ref_sync_every": 2, "loss__ref_mixup_alpha": 0.5, "eval__every": 0},
    "lora": {"lora__rank": 4, "optim__learning_rate": 1e-2},
    "cached": {"reference": "cached"},
    "lora-cached": {"lora__rank": 4, "optim__learning_rate": 1e-2, "reference": "cached"},
    "lora-nf4": {
        "lora__rank": 4,
        "optim__learning_rate": 1e-2,
        "model__quantize": "nf4",
        "eval__samples": 1,
        "eval__sample_tokens": 2,
    },
}
"""Kinds of runs, as changes to `settings`."""


@functools.cache
def whole(shared: Path, kind: str = "plain") -> Path:
    """The uninterrupted run."""
    assert train(settings(shared, shared / kind, **RUNS[kind])) is True
    return shared / kind


def replaced(some: Config, **changes: dict[str, Any]) -> Config:
    """The config with some fields of its sections changed."""
    return dataclasses.replace(
        some,
        **{
            name: dataclasses.replace(getattr(some, name), **fields)
            for name, fields in changes.items()
        },
    )
