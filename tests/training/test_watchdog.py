"""Heartbeat, watchdog against hangs, and checkpoints on demand."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from jaxdpo.training import watchdog
from jaxdpo.training.watchdog import HANGS, Watchdog

ROOT = Path(__file__).parents[2]


def until(true: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def heart(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "heartbeat.json").read_text())


def test_the_heartbeat_has_step_time_and_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "SECONDS_BETWEEN", 0.0)
    with Watchdog(tmp_path, 0) as watching:
        assert heart(tmp_path)["phase"] == "start"
        watching.beat(3, "train")
        told = heart(tmp_path)
        assert (told["step"], told["phase"]) == (3, "train") and abs(
            float(str(told["time"])) - time.time()
        ) < 5
        with watching.paused("save"):
            assert heart(tmp_path)["phase"] == "save"
        assert heart(tmp_path)["phase"] == "train"
    assert heart(tmp_path)["phase"] == "ended"
    with pytest.raises(KeyError), Watchdog(tmp_path, 0):
        raise KeyError
    assert heart(tmp_path)["phase"] == "failed"


def test_a_full_disk_does_not_stop_the_heartbeat(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "gone", 0) as watching:
        watching.beat(1, "train")


def test_the_watchdog_ends_a_hang_with_the_stacks_of_all_threads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    with Watchdog(tmp_path, 0.3 / 60, left.append):
        until(lambda: left)
    assert left == [HANGS]
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert (
        "no step was finished for" in stacks
        and "test_watchdog.py" in stacks
        and "phase start, step 0" in stacks
    )
    assert "train.watchdog_minutes=0.005" in capfd.readouterr().err


@pytest.mark.slow
def test_the_watchdog_spares_steps_saves_and_compilations(tmp_path: Path) -> None:
    left: list[int] = []
    with Watchdog(tmp_path, 0.4 / 60, left.append) as watching:
        for _ in range(20):
            time.sleep(0.05)
            watching.beat()
        with watching.paused("save"):
            time.sleep(0.8)
        for _ in range(20):  # a program is compiled
            time.sleep(0.05)
            jax.monitoring.record_event_duration_secs(
                "/jax/core/compile/backend_compile_duration", 0.1
            )
    assert left == [] and not list(tmp_path.glob("stacks*"))
    with Watchdog(tmp_path, 0, left.append):
        time.sleep(0.2)
    assert left == []


def test_a_requested_checkpoint_is_seen_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "SECONDS_BETWEEN", 0.0)
    with Watchdog(tmp_path, 0) as watching:
        assert not watching.save_wanted()
        (tmp_path / "save").touch()
        assert watching.save_wanted() and not watching.save_wanted()
        watching.saved()
        assert not (tmp_path / "save").exists() and not watching.save_wanted()
        (tmp_path / "save").touch()
        assert watching.save_wanted()
