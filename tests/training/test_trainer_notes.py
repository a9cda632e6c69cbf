"""What a run says of its adapter and its reference before the first step."""

from pathlib import Path

import numpy as np
import pytest

from jaxdpo.training.loop import train
from jaxdpo.training.trainer import Trainer
from tests.runs import metrics
from tests.tiny import write_model
from tests.training.test_trainer import options, settings_in
from tests.training.test_trainer import shared as shared  # the fixture


@pytest.mark.slow
def test_the_log_says_which_adapter_is_the_reference(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings_in(
        options(
            shared,
            "from an adapter",
            "auto",
            train__steps=1,
            eval__samples=1,
            eval__sample_tokens=3,
        ),
        tmp_path,
    )
    assert train(config)
    out = capsys.readouterr().out
    assert f"the policy starts from the adapter in {shared / 'adapter'}, and the reference" in out
    assert "and the reference is that adapter, frozen" in out
    # The last parts of the two names agree.
    assert "this adapter says that it was trained on model, not" not in out
    assert "weights trained (rank 3, scale 3.464, on q, k, o, down)" in out
    rows = metrics(tmp_path)
    first = next(row for row in rows if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first[
        "rewards/chosen"
    ] == pytest.approx(0, abs=4e-6)
    assert abs(rows[0]["eval/kl/token_exact"]) < 1e-7


def test_an_adapter_of_another_base_is_refused_or_warned_of(shared: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lora.path=.*: is not an adapter for this model"):
        Trainer.open(
            options(shared, "from an adapter", "auto", model__path=str(tmp_path / "other"))
        )
    write_model(tmp_path / "namesake")
    (told,) = Trainer.open(
        options(shared, "from an adapter", "auto", model__path=str(tmp_path / "namesake"))
    ).warnings
    assert "this adapter says that it was trained on model, not on model.path=" in told
