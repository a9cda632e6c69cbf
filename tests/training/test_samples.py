"""samples.jsonl after interruptions: the rows of a run that was never interrupted, each once."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jaxdpo.config.schema import Config
from jaxdpo.training.loop import train
from jaxdpo.training.metric_logger import JsonLines
from jaxdpo.training.run import Run
from tests.runs import interrupt, settings, untimed, use_one_device

pytestmark = pytest.mark.usefixtures("one_device")


def sampled(shared: Path, run_dir: Path) -> Config:
    """Samples at steps 0, 2, 4, 6 and 8, saves at 3, 6 and 8."""
    return settings(
        shared,
        run_dir,
        **{"eval__samples": 2, "eval__sample_tokens": 2, "checkpoint__keep_best": 0},
    )


@pytest.fixture(scope="module")
def whole(shared: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samples and metrics of the run that was never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        assert train(sampled(shared, shared / "whole")) is True
    samples = read(shared / "whole")
    assert [row["step"] for row in samples] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    return samples, untimed(shared / "whole")


def read(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class Killed(BaseException):
    """As SIGKILL: nothing in the run handles it."""


def killed_writing(some: Config, step: int, row: int) -> None:
    """End a run at a row of samples.jsonl: row 0, before the first of this step; 2, after both."""
    write = JsonLines.write
    written = []

    def count(self: JsonLines, values: dict[str, Any]) -> None:
        is_sample = self._path.name == "samples.jsonl"
        if "policy" in values and values["step"] == step and is_sample:
            if len(written) == row:
                raise Killed
            written.append(values)
        elif len(written) == row == 2:
            raise Killed  # before the metrics of this evaluation
        write(self, values)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(JsonLines, "write", count)
        train(some)


def sigterm_while_sampling(some: Config, step: int) -> None:
    evaluate = Run.evaluate

    def signalled(self: Run, poll: Any) -> float:
        def poll_samples(phase: str) -> None:
            if phase == "samples" and self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            poll(phase)

        return evaluate(self, poll_samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "evaluate", signalled)
        assert train(some) is False


INTERRUPTIONS: dict[str, list[Any]] = {
    "sigterm where an evaluation is due": [lambda some: interrupt(some, 4)],
    "sigterm while sampling": [lambda some: sigterm_while_sampling(some, 6)],
    "killed between two rows": [lambda some: killed_writing(some, 4, 1)],
    "killed after both rows": [lambda some: killed_writing(some, 6, 2)],
    "killed before any save": [lambda some: killed_writing(some, 2, 1)],
    "sigterm, then killed while the evaluation is repeated": [
        lambda some: interrupt(some, 4),
        lambda some: killed_writing(some, 4, 1),
        lambda some: killed_writing(some, 4, 2),
    ],
    "everything, one after the other": [
        lambda some: killed_writing(some, 0, 1),
        lambda some: sigterm_while_sampling(some, 4),
        lambda some: killed_writing(some, 8, 1),
        lambda some: killed_writing(some, 8, 2),
    ],
}


@pytest.mark.parametrize(
    "how",
    [
        "sigterm, then killed while the evaluation is repeated",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in INTERRUPTIONS
            if "repeated" not in name
        ),
    ],
)
def test_samples_are_neither_doubled_nor_lost_on_resume(
    shared: Path, tmp_path: Path, whole: tuple[Any, Any], how: str
) -> None:
    some = sampled(shared, tmp_path)
    for interruption in INTERRUPTIONS[how]:
        interruption(some)
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"step": 7, "po')  # as a kill in the middle of a row leaves it
    assert train(some) is True
    assert (read(tmp_path), untimed(tmp_path)) == whole


def test_samples_are_on_the_disk_before_a_checkpoint_that_goes_on_after_them(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses what is in the system's page cache."""
    synced: list[str] = []
    sync = JsonLines.sync

    def noted(self: JsonLines) -> None:
        sync(self)
        synced.append(self._path.name)

    monkeypatch.setattr(JsonLines, "sync", noted)
    monkeypatch.setattr(Run, "evaluate", lambda self, poll: 0.5)
    assert train(settings(shared, tmp_path, train__steps=2)) is True
    assert {"metrics.jsonl", "samples.jsonl", "nonfinite.jsonl"} <= set(synced)
    assert not (tmp_path / "samples.jsonl").exists() and not (tmp_path / "nonfinite.jsonl").exists()
