"""checkpoint.keep_best: the step with the lowest validation loss is there at the end."""

import json
import math
from pathlib import Path

import pytest

from jaxdpo.config.schema import Config
from jaxdpo.training.loop import train
from jaxdpo.training.run import Run
from tests.checkpoints.states import folders
from tests.runs import interrupt, settings

pytestmark = pytest.mark.usefixtures("one_device")


def measure(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Validation losses by step."""

    def evaluate(run: Run, poll: object) -> float:
        run.flush()
        return losses[run.step]

    monkeypatch.setattr(Run, "evaluate", evaluate)


CASES: dict[str, tuple[dict[str, int], dict[int, float], set[str]]] = {
    # every: evaluations; saves. Losses by step. Steps that are there in the end.
    "coprime cadences": (
        {"eval__every": 3, "checkpoint__save_every": 5},
        {0: 0.1, 3: 0.5, 6: 0.3, 9: 0.4, 10: 0.9},
        {"6", "10"},
    ),
    "the first is the best": (
        {"eval__every": 2, "checkpoint__save_every": 7},
        {0: 0.9, 2: 0.1, 4: 0.2, 6: 0.3, 8: 0.4, 10: 0.5},
        {"2", "10"},
    ),
    "no saves are due": (
        {"eval__every": 4, "checkpoint__save_every": 0},
        {0: 0.9, 4: 0.8, 8: 0.2, 10: 0.5},
        {"8", "10"},
    ),
    "the two best": (
        {"eval__every": 2, "checkpoint__save_every": 3, "checkpoint__keep_best": 2},
        {0: 0.9, 2: 0.2, 4: 0.7, 6: 0.1, 8: 0.6, 10: 0.5},
        {"2", "6", "10"},
    ),
    "a NaN is no best": (
        {"eval__every": 3, "checkpoint__save_every": 5},
        {0: 0.1, 3: math.nan, 6: 0.3, 9: math.nan, 10: 0.9},
        {"6", "10"},
    ),
    "no best is wanted": (
        {"eval__every": 3, "checkpoint__save_every": 5, "checkpoint__keep_best": 0},
        {0: 0.1, 3: 0.5, 6: 0.3, 9: 0.4, 10: 0.9},
        {"10"},
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        "coprime cadences",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:]),
    ],
)
def test_a_new_best_is_saved_when_it_is_measured(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    cadences, losses, kept = CASES[case]
    measure(monkeypatch, losses)
    some = settings(shared, tmp_path, train__steps=10, checkpoint__keep=1, **cadences)
    assert train(some) is True
    assert folders(tmp_path) == kept


def coprime(shared: Path, run_dir: Path) -> Config:
    """A run of ten steps that evaluates at every third and saves at every fifth."""
    cadences = {"eval__every": 3, "checkpoint__save_every": 5}
    return settings(shared, run_dir, train__steps=10, checkpoint__keep=1, **cadences)


def test_a_resumed_run_knows_the_best_of_before(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, {0: 0.9, 3: 0.2, 6: 0.3, 9: 0.4, 10: 0.9})
    some = coprime(shared, tmp_path)
    interrupt(some, 4)
    assert folders(tmp_path) == {"3", "4"}
    assert train(some) is True
    assert folders(tmp_path) == {"3", "10"}


def test_a_best_step_whose_evaluation_sigterm_cut_off_is_kept_after_the_resume(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was saved without a validation loss, which is measured at the next start."""
    measure(monkeypatch, {0: 0.9, 3: 0.8, 6: 0.1, 9: 0.4, 10: 0.9})
    some = coprime(shared, tmp_path)
    interrupt(some, 6)
    assert train(some) is True
    assert folders(tmp_path) == {"6", "10", "eval_losses.json"}
    assert json.loads((tmp_path / "checkpoints/eval_losses.json").read_text()) == {"6": 0.1}
