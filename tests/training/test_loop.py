"""A run: what it leaves on disk, and what makes it stop."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.data.loader import Loader
from jaxdpo.training.loop import train
from jaxdpo.training.metric_logger import TIME_KEYS
from jaxdpo.training.startup_checks import Fault
from jaxdpo.training.trainer import Trainer
from tests.runs import TOTAL, metrics, settings, whole

pytestmark = pytest.mark.usefixtures("one_device")


def test_the_files_of_a_run_folder(shared: Path) -> None:
    run_dir = whole(shared)
    found = {path.name for path in run_dir.iterdir()}
    assert found == {
        "config.yaml",
        "metrics.jsonl",
        "data_report.json",
        "checkpoints",
        "model",
        "heartbeat.json",
    }
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} >= {"6", "8"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in (run_dir / "model").iterdir()
    }
    report = json.loads((run_dir / "data_report.json").read_text())
    assert (
        report["train"]["pairs"] + report["eval"]["pairs"] == 13
        and report["sets"]["train"][0]["kept"] == 13
    )
    saved, problems = cli.validate(Config, yaml.safe_load((run_dir / "config.yaml").read_text()))
    assert not problems and saved is not None and saved.optim == settings(shared, run_dir).optim
    # As resolved for this run.
    assert (saved.model.compute_dtype, saved.checkpoint.save_every) == ("float32", 3)
    assert saved.data.packed_length and saved.train.steps and saved.reference == "frozen"


def test_the_metrics_of_a_run(shared: Path) -> None:
    found = metrics(whole(shared))
    steps, evaluations = (
        [row for row in found if "loss" in row],
        [row for row in found if "eval/loss" in row],
    )
    assert [row["step"] for row in steps] == list(range(1, TOTAL + 1))
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6, 8]
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert rewards | {
        "epoch",
        "grad_norm",
        "learning_rate",
        "logps/chosen",
        "logps/rejected",
        "lengths/chosen",
    } <= set(steps[0])
    assert {"tokens_per_second", "pairs_per_second", "padding_fraction"} <= set(steps[0])
    assert {
        "eval/rewards/accuracies",
        "eval/rewards/margins",
        "eval/kl/token_exact",
        "eval/lengths/rejected",
    } <= set(evaluations[0])
    assert (
        steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and steps[0]["rewards/chosen"] == 0
    )
    assert evaluations[0]["eval/kl/token_exact"] == 0 < evaluations[-1]["eval/kl/token_exact"]
    session = Trainer.open(settings(shared, shared / "plain"))
    pairs = len(session.data.train)
    assert steps[-1]["epoch"] == pytest.approx(
        1 + (TOTAL - session.loader.steps_per_epoch) * 2 / pairs
    )
    assert steps[-1]["tokens"] == sum(
        session.loader.num_tokens(step) for step in range(1, TOTAL + 1)
    )
    assert all(0 <= row["padding_fraction"] < 1 for row in steps)


@pytest.mark.slow
def test_an_evaluation_does_not_depend_on_how_many_pairs_it_takes_at_once(
    shared: Path, tmp_path: Path
) -> None:
    (first, *_) = metrics(whole(shared))
    train(settings(shared, tmp_path, train__batch_size=5, train__steps=1))
    (again, *_) = metrics(tmp_path)
    for key in first.keys() - TIME_KEYS:
        assert again[key] == pytest.approx(first[key], rel=1e-6, abs=1e-6), key


def test_completions_of_validation_prompts_are_sampled(shared: Path, tmp_path: Path) -> None:
    train(settings(shared, tmp_path, eval__samples=2, eval__sample_tokens=3, train__steps=2))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 0, 2, 2]
    assert all(
        row["policy"] == row["reference"] and len(row["policy"].split()) <= 3 for row in samples[:2]
    )


# --- what goes wrong ---


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Give the pairs of these steps an infinite weight."""
    batch = Loader.batch

    def poisoned(self: Loader, step: int) -> Any:
        good = batch(self, step)
        return (
            good._replace(weights_MBP=np.where(good.weights_MBP > 0, np.float32(np.inf), 0))
            if step in steps
            else good
        )

    monkeypatch.setattr(Loader, "batch", poisoned)


def test_nan_updates_are_skipped_and_logged(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {3, 4, 6})
    some = settings(shared, tmp_path, eval__every=0, checkpoint__save_every=1, checkpoint__keep=9)
    assert train(some) is True
    found = metrics(tmp_path)
    assert [row["nonfinite"] for row in found] == [0, 0, 1, 1, 0, 1, 0, 0]
    assert [row["loss"] is None for row in found] == [bool(row["nonfinite"]) for row in found]
    told = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    session = Trainer.open(some)
    wanted = {
        step: [str(session.data.train.ids[i]) for i in session.loader.pairs_of(step)]
        for step in (3, 4, 6)
    }
    assert {row["step"]: row["ids"] for row in told} == wanted and all(
        len(ids) == 2 for ids in wanted.values()
    )
    saved = {
        step: [leaf.tobytes() for leaf in jax.tree.leaves(restore_params(tmp_path, step)[1])]
        for step in range(1, TOTAL + 1)
    }
    assert saved[2] == saved[3] == saved[4] != saved[5] == saved[6] != saved[7]


def test_three_nan_steps_in_a_row_stop_the_run(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {4, 5, 6})
    some = settings(shared, tmp_path, eval__every=0)
    with pytest.raises(
        Fault, match=r"3 steps in a row had no finite loss or gradient. .* nonfinite.jsonl"
    ):
        train(some)
    assert [
        json.loads(line)["step"] for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    ] == [4, 5, 6]
    assert restore_params(tmp_path)[0] == 3
    monkeypatch.undo()


def test_a_learning_rate_that_diverges_to_nan_stops_the_run(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"Lower optim.learning_rate"):
        train(
            settings(
                shared,
                tmp_path,
                eval__every=0,
                optim__learning_rate=1e30,
                optim__schedule="constant",
            )
        )
    found = metrics(tmp_path)
    assert found[0]["nonfinite"] == 0 and [row["nonfinite"] for row in found[-3:]] == [1, 1, 1]


@pytest.mark.parametrize("size", [0.01, np.nan])
def test_a_reference_that_differs_stops_the_run_before_it_starts(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    start = Trainer.start

    def start_apart(self: Trainer, *weights: Any) -> Any:
        state, fixed = start(self, *weights)
        return state, jax.tree.map(lambda w: w + jnp.float32(size) * jnp.sign(w), fixed)

    monkeypatch.setattr(Trainer, "start", start_apart)
    with pytest.raises(
        Fault,
        match=r"policy and reference should agree before the first step, but the (chosen|rejected) "
        r"answer of pair .* answers differ",
    ):
        train(settings(shared, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists() and not list(
        (tmp_path / "checkpoints").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ipo", "bco_pair"])
def test_the_closed_form_of_other_losses_holds(shared: Path, tmp_path: Path, name: str) -> None:
    train(settings(shared, tmp_path, loss__name=name, train__steps=1, eval__every=0))
    assert len(metrics(tmp_path)) == 1
