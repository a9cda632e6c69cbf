"""`python -m jaxdpo.train` started again while it is going on, and after it was killed."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs import folder_with_inputs, metrics
from tests.test_train import command, environment, words
from tests.tiny import rows, write_rows

pytestmark = pytest.mark.slow


def started(arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    with out.open("wb") as file:
        return subprocess.Popen(
            command(*arguments), env=environment(), stdout=file, stderr=subprocess.STDOUT
        )


def test_of_four_starts_at_once_one_is_the_run_and_it_resumes_after_a_kill(tmp_path: Path) -> None:
    shared, run = folder_with_inputs(tmp_path / "inputs"), tmp_path / "run"
    many = write_rows(tmp_path / "rows.jsonl", rows(130))
    given = [word for word in words(shared, run) if not word.startswith(("data.train", "train."))]
    given += [f"data.train=[{many}]", "train.steps=400", "train.batch_size=2"]
    given += ["checkpoint.save_every=5", f"train.compilation_cache={tmp_path / 'cache'}"]
    four = [started(given, tmp_path / f"{number}.log") for number in range(4)]
    until = time.monotonic() + 300
    while (
        sum(process.poll() is None for process in four) > 1 or not (run / "metrics.jsonl").exists()
    ):
        assert time.monotonic() < until
        time.sleep(0.05)
    (owner,) = [process for process in four if process.poll() is None]
    for number, process in enumerate(four):
        if process is not owner:
            assert process.returncode == 1
            said = (tmp_path / f"{number}.log").read_text()
            assert f"this run is going on already (process {owner.pid} on " in said
    # Another start, with other options, leaves no trace.
    config = (run / "config.yaml").read_bytes()
    other = started([*given, "seed=1"], tmp_path / "other.log")
    assert other.wait(120) == 1
    assert "a run with other options is going on" in (tmp_path / "other.log").read_text()
    assert (run / "config.yaml").read_bytes() == config
    # A launcher restarts it at once after a kill.
    owner.send_signal(signal.SIGKILL)
    again = started(given, tmp_path / "again.log")
    owner.wait()
    assert again.wait(300) == 0, (tmp_path / "again.log").read_text()
    assert "resuming after step" in (tmp_path / "again.log").read_text()
    assert [row["step"] for row in metrics(run)] == list(range(1, 401))
    assert not (run / ".lock").exists()
