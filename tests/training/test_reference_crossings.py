"""Every kind of reference equals the frozen one where features meet: over two epochs."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdpo.config.schema import Config
from jaxdpo.training.loop import train
from jaxdpo.training.resolve import validate
from jaxdpo.training.state import FrozenState
from jaxdpo.training.trainer import Trainer
from tests.runs import folder_with_inputs, metrics, settings
from tests.tiny import rows, write_rows

pytestmark = pytest.mark.usefixtures("one_device")

LORA = {"lora__rank": 4, "optim__learning_rate": 1e-2}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mix": {"data__weights": [1.0, 3.0]},
    "mix back": {"data__weights": [9.0, 1.0], "data__shuffle": False},
    "lora": LORA,
    "lora mix": LORA | {"data__weights": [1.0, 3.0]},
    "nf4": LORA | {"model__quantize": "nf4", "model__remat": "full"},
    "int8 mix": LORA
    | {"model__quantize": "int8", "model__remat": "full", "data__weights": [1.0, 3.0]},
    "without": {"loss__name": "simpo", "data__weights": [1.0, 3.0]},
}
"""What a run has beside its reference."""
CASES = []
for feature, options in FEATURES.items():
    kinds = ["cached"]
    if "lora__rank" in options:
        kinds.append("adapter_off")
    if feature == "without":
        kinds.append("none")
    CASES += [(feature, kind) for kind in kinds]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of these tests' runs, with a second set of rows in it."""
    folder = folder_with_inputs(tmp_path_factory.mktemp("crossings"))
    write_rows(folder / "more.jsonl", rows(9, seed=1))
    return folder


def two_epochs(shared: Path, feature: str, kind: str, **changes: Any) -> Config:
    """A run over two epochs: 22 pairs, of which some are held out, four a step."""
    common = {
        "train__steps": None,
        "train__epochs": 2,
        "train__batch_size": 4,
        "eval__every": 6,
        "data__train": [str(shared / "rows.jsonl"), str(shared / "more.jsonl")],
        "reference": kind,
    }
    run_dir = shared / f"{feature} {kind}".replace(" ", "-")
    return settings(shared, run_dir, **common | FEATURES[feature] | changes)


@functools.cache
def finished(shared: Path, feature: str, kind: str) -> list[dict[str, Any]]:
    """The metrics of the run."""
    some = two_epochs(shared, feature, kind)
    assert train(some) is True
    return metrics(Path(some.run_dir))


@pytest.mark.slow
@pytest.mark.parametrize(("feature", "kind"), CASES)
def test_every_reference_equals_the_frozen_one_over_two_epochs(
    shared: Path, feature: str, kind: str
) -> None:
    ours, theirs = finished(shared, feature, kind), finished(shared, feature, "frozen")
    assert len(ours) == len(theirs) >= 8
    for row, wanted in zip(ours, theirs, strict=True):
        assert row["step"] == wanted["step"]
        for key in ("loss", "rewards/chosen", "rewards/rejected", "nonfinite", "eval/loss"):
            if key in wanted:
                # Sums in another order; where a gradient is near 0, AdamW's first steps may turn.
                assert row[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-4), (key, row)
    assert max(abs(row.get("rewards/margins", 0.0)) for row in theirs) > 1e-2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reference": "cached"}, "but reference=cached"),
        ({"reference": "adapter_off"}, "without adapters"),
        ({"reference": "none"}, "compares with a reference"),
        ({"reference": "frozen", "lora__rank": 4}, "a reference cannot move towards adapters"),
    ],
)
def test_a_moving_reference_is_a_frozen_one_or_refused(
    shared: Path, changes: dict[str, Any], told: str
) -> None:
    some = two_epochs(shared, "plain", "frozen", **{"loss__ref_sync_every": 2} | changes)
    assert any(told in problem for problem in validate(some)), validate(some)


def test_nothing_that_was_not_computed_reaches_a_step(shared: Path) -> None:
    """What a cache without the pairs of later epochs did: they were NaN, and steps were skipped."""
    trainer = Trainer.open(two_epochs(shared, "mix", "cached"))
    last = trainer.total_steps
    pairs = trainer.loader.pairs_of(last)
    logps = np.zeros((len(trainer.data.train), 2), np.float32)
    logps[pairs[0]] = np.nan
    batch = trainer.loader.batch(last)
    with pytest.raises(AssertionError, match="never computed"):
        trainer.with_logps(FrozenState(), logps[pairs], batch)
    laid_out = trainer.with_logps(FrozenState(), np.zeros_like(logps[pairs]), batch).ref_logps
    assert laid_out is not None and laid_out.shape == batch.lengths_MBP2.shape
