"""A finished run that gets more epochs or steps goes on with its optimizer and its reference."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxdpo.config.schema import Config
from jaxdpo.training.loop import train
from tests.runs import STOPPED, interrupt, settings

pytestmark = pytest.mark.usefixtures("one_device")


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [row["loss"] for row in found if "loss" in row]


def finished(shared: Path, run_dir: Path, **changes: Any) -> Config:
    """A run of one epoch, or what the changes say, that was trained to its end."""
    some = settings(
        shared, run_dir, **{"eval__every": 0, "train__steps": None, "train__epochs": 1} | changes
    )
    assert train(some) is True
    return some


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {},
        pytest.param({"reference": "cached"}, marks=pytest.mark.slow),
        pytest.param(
            {"loss__ref_sync_every": 2, "loss__ref_mixup_alpha": 0.5}, marks=pytest.mark.slow
        ),
        pytest.param({"lora__rank": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_goes_on_for_more_epochs_with_optimizer_and_reference(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: dict[str, Any]
) -> None:
    """At a constant learning rate exactly as a run that was longer from the start."""
    constant = {"optim__schedule": "constant"} | kind
    finished(shared, tmp_path / "grown", **constant)
    capsys.readouterr()
    finished(shared, tmp_path / "grown", **constant, train__epochs=2)
    said = " ".join(capsys.readouterr().out.split())
    assert "the run was finished after step 5 and goes on to step 10" in said
    assert "the learning rate was 0.001 in step 5 and is 0.001 in step 6" in said
    finished(shared, tmp_path / "long", **constant, train__epochs=2)
    assert (
        losses(tmp_path / "grown") == losses(tmp_path / "long")
        and len(losses(tmp_path / "long")) == 10
    )


@pytest.mark.slow
def test_more_steps_say_what_happens_to_the_learning_rate_and_survive_a_stop(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = {"train__epochs": None, "train__steps": 4}, {"train__epochs": None}
    finished(shared, tmp_path, **short)
    interrupt(settings(shared, tmp_path, eval__every=0, train__steps=STOPPED + 2), STOPPED)
    said = " ".join(capsys.readouterr().out.split())
    assert "optim.schedule=cosine is now that of 9 steps" in said
    assert "in step 4 and is 0.000587 in step 5, and falls to 0 at step 9" in said
    # An interrupted continuation is an unfinished run like any other.
    with pytest.raises(
        ValueError, match=r"train.steps: 9 in the checkpoint, 12 now. A run may get"
    ):
        finished(shared, tmp_path, **long, train__steps=12)
    finished(shared, tmp_path, **long, train__steps=9)
    with pytest.raises(ValueError, match=r"9 steps are done already, and this would be 6"):
        finished(shared, tmp_path, **long, train__steps=6)
    assert len(losses(tmp_path)) == 9


@pytest.mark.slow
def test_the_same_number_of_steps_by_another_option_is_the_same_run(
    shared: Path, tmp_path: Path
) -> None:
    finished(shared, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    finished(shared, tmp_path, train__epochs=None, train__steps=5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"loss.beta: 0.1 in the checkpoint, 0.2 now"):
        finished(shared, tmp_path, train__epochs=3, loss__beta=0.2)
