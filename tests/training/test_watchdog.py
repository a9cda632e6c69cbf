"""Signals when the main thread is elsewhere, heartbeat, watchdog, wishes for a checkpoint, and room on the disk."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from jaxdpo.training import preemption, watchdog
from jaxdpo.training.watchdog import HANGS, Watch
from jaxdpo.utils import files
from jaxdpo.utils.files import check_room, make_writable, write_and_read

ROOT = Path(__file__).parents[2]
BUSY = """
import hashlib, os, signal, sys, time
from jaxdpo.signals import stop_on_signals
with stop_on_signals(os._exit) as stop:
    stop.unsaved = sys.argv[1] == "unsaved"
    if sys.argv[1] == "fork":
        child = os.fork()
        if child == 0:
            print("ready", flush=True)
            time.sleep(60)
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.5)
        sys.exit(0 if os.WTERMSIG(status) == signal.SIGTERM and not stop.requested else 1)
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)  # minutes outside of Python, as a compilation
"""


def until(true: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def busy(kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process whose main thread is where no handler runs."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_ends_a_process_that_is_busy_and_has_nothing_to_save(
    number: signal.Signals,
) -> None:
    with busy("nothing") as process:
        process.send_signal(number)
        assert process.wait(10) == 75


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_has_something_to_save() -> None:
    with busy("unsaved") as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_to_a_worker_is_not_its_parents() -> None:
    with busy("fork") as process:
        assert process.wait(20) == 0


def test_nothing_to_save_is_looked_at_when_the_signal_comes() -> None:
    left: list[int] = []
    with preemption.stop_on_signals(left.append) as stop:
        stop.unsaved = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.requested and left == []
    with preemption.stop_on_signals(left.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: left == [75])
        with pytest.raises(preemption.Interrupted):
            stop.poll()
    with preemption.stop_on_signals(left.append) as stop:
        stop.poll()


# --- heartbeat, watchdog, wishes ---


def heart(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "heartbeat.json").read_text())


def test_the_heartbeat_tells_step_time_and_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "SECONDS_BETWEEN", 0.0)
    with Watch(tmp_path, 0) as watching:
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
    with pytest.raises(KeyError), Watch(tmp_path, 0):
        raise KeyError
    assert heart(tmp_path)["phase"] == "failed"


def test_a_full_disk_does_not_stop_the_heart(tmp_path: Path) -> None:
    with Watch(tmp_path / "gone", 0) as watching:
        watching.beat(1, "train")


def test_the_watchdog_tells_what_every_thread_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    with Watch(tmp_path, 0.3 / 60, left.append):
        until(lambda: left)
    assert left == [HANGS]
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert (
        "no step was finished for" in stacks
        and "test_watchdog.py" in stacks
        and "phase start, step 0" in stacks
    )
    assert "train.watchdog_minutes=0.005" in capfd.readouterr().err


def test_the_watchdog_leaves_those_alone_that_do_something(tmp_path: Path) -> None:
    left: list[int] = []
    with Watch(tmp_path, 0.4 / 60, left.append) as watching:
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
    with Watch(tmp_path, 0, left.append):
        time.sleep(0.2)
    assert left == []


def test_a_wish_is_heard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "SECONDS_BETWEEN", 0.0)
    with Watch(tmp_path, 0) as watching:
        assert not watching.save_wanted()
        (tmp_path / "save").touch()
        assert watching.save_wanted() and not watching.save_wanted()
        watching.saved()
        assert not (tmp_path / "save").exists() and not watching.save_wanted()
        (tmp_path / "save").touch()
        assert watching.save_wanted()


# --- the disk ---


def test_too_little_room_is_told_before_anything_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_room(tmp_path, "run", 1000, 3) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 6500, 2500))  # type: ignore[attr-defined]
    assert "may come to take 3,000 more" in str(check_room(tmp_path, "run", 1000, 3))
    with pytest.raises(
        ValueError,
        match=r"run_dir=run: a checkpoint takes up to 2,501 bytes, and the disk of .* has 2,500 free",
    ):
        check_room(tmp_path, "run", 2501, 1)


def test_a_limit_on_what_may_be_written_is_found(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            ValueError,
            match=r"takes up to 10,000 bytes, and not even 10,000 could be written to .*ulimit -f",
        ):
            check_room(tmp_path, "run", 10_000, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert write_and_read(tmp_path, 10_000) and not list(tmp_path.iterdir())


def test_a_disk_that_forgets_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write_and_read", lambda folder, size: False)
    with pytest.raises(ValueError, match="is not what was written there"):
        check_room(tmp_path, "run", 10, 1)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir=x: cannot write to .*file"):
        make_writable(tmp_path / "file" / "run", "x")
