"""One owner for a run folder, under races, kills, other machines and file systems without locks."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxdpo.checkpoints import run_lock
from jaxdpo.checkpoints.run_lock import RunLock

ROOT = Path(__file__).parents[2]
SAME, OTHER = {"seed": 0}, {"seed": 1}

OWNER = """
import os, sys, time
from jaxdpo.checkpoints.run_lock import RunLock
sys.stdin.readline()
try:
    with RunLock(sys.argv[1], {"seed": 0}):
        print("owner", flush=True)
        if sys.argv[2] == "fork" and os.fork() == 0:
            print("forked", flush=True)
            time.sleep(60)
            os._exit(0)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


def start(run_dir: Path, kind: str = "plain") -> subprocess.Popen[str]:
    """A process that wants the folder when a line comes, and gives it back at the next one."""
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(run_dir), kind],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_four_starts_at_once_one_owns_the_folder_and_three_are_refused(tmp_path: Path) -> None:
    starts = [start(tmp_path / "new" / "run") for _ in range(4)]
    time.sleep(0.5)  # all have imported, and wait for their line
    for process in starts:
        go_on(process)
    lines = [said(process) for process in starts]
    assert lines.count("owner") == 1, lines
    owner = starts[lines.index("owner")]
    for line in lines:
        assert line == "owner" or f"process {owner.pid} on {socket.gethostname()}" in line, lines
    # Killed: its lock file stays, and the next start takes it over at once.
    owner.kill()
    owner.wait()
    assert (tmp_path / "new" / "run" / ".lock").exists()
    began = time.monotonic()
    with RunLock(tmp_path / "new" / "run", SAME):
        assert time.monotonic() - began < 1
    for process in starts:
        if process is not owner:
            process.wait()
        close(process)


def close(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    process.stdin.close()


def test_a_forked_worker_that_outlives_its_run_holds_no_lock(tmp_path: Path) -> None:
    process = start(tmp_path, "fork")
    go_on(process)
    assert {said(process), said(process)} == {"owner", "forked"}
    process.kill()
    process.wait()
    with RunLock(tmp_path, SAME):
        pass
    close(process)


def refusal(run_dir: Path, options: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ValueError) as error, RunLock(run_dir, options, **more):
        pass
    return str(error.value)


def test_a_refusal_says_who_owns_the_folder_and_whether_it_is_the_same_run(tmp_path: Path) -> None:
    who = f"(process {os.getpid()} on {socket.gethostname()}, since 2"
    with RunLock(tmp_path, SAME):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert f"run_dir={tmp_path}: this run is going on already {who}" in refusal(tmp_path, SAME)
        assert f"a run with other options is going on there {who}" in refusal(tmp_path, OTHER)
        text = refusal(tmp_path, SAME, command="preflight")
        assert f"jaxdpo.train is using it {who}" in text
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path, SAME):
        pass


def test_folders_are_made_and_those_that_stay_empty_are_removed_again(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / "b", SAME):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "a" / "b", SAME):
        (tmp_path / "a" / "b" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.yaml"]


def test_a_folder_that_a_failed_start_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_writable = run_lock.make_writable

    def made_and_removed(folder: Path, run_dir: Path) -> None:
        monkeypatch.setattr(run_lock, "make_writable", make_writable)
        make_writable(folder, run_dir)
        folder.rmdir()

    monkeypatch.setattr(run_lock, "make_writable", made_and_removed)
    with RunLock(tmp_path / "run", SAME) as lock:
        assert lock.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(tmp_path / "file" / "run", SAME)
    assert f"run_dir={tmp_path / 'file' / 'run'}: cannot write to" in text


@pytest.mark.parametrize("name", ["exp[1]", "run?", "a*b/run", "[a]/[b]"])
def test_paths_that_checkpoints_cannot_be_written_to_are_refused(tmp_path: Path, name: str) -> None:
    text = refusal(tmp_path / name, SAME)
    assert "has a *, ? or [, and checkpoints cannot be written below such a folder" in text
    assert list(tmp_path.iterdir()) == []


def test_an_address_is_refused_although_it_would_be_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run_dir=gs://bucket/run: is an address"):
        RunLock("gs://bucket/run", SAME).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_link_into_a_folder_with_brackets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "exp[1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "exp[1]")
    assert "has a *, ? or [" in refusal(tmp_path / "link" / "run", SAME)


# ---- other machines -----------------------------------------------------------------------------


def left_by(folder: Path, age: float, **changes: Any) -> Path:
    """A lock file of a process that did not give it back, touched so many seconds ago."""
    with RunLock(folder, OTHER):
        record = json.loads((folder / ".lock").read_text())
    path = folder / ".lock"
    path.write_text(json.dumps(record | {"host": "elsewhere", "kernel": "another"} | changes))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_lock_of_another_machine_that_is_dead_for_long_is_taken_over(tmp_path: Path) -> None:
    left_by(tmp_path, age=run_lock.STALE_SECONDS + 1)
    with RunLock(tmp_path, SAME) as lock:
        lock.confirm()


def test_a_lock_of_another_machine_is_waited_for_until_it_is_known_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    left_by(tmp_path, age=0.3)
    began = time.monotonic()
    with RunLock(tmp_path, SAME):
        assert 0.5 < time.monotonic() - began < 5
    assert capsys.readouterr().err.count("on elsewhere has not given it back. Waiting") == 1


def test_a_lock_that_another_machine_goes_on_touching_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left_by(tmp_path, age=20)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            os.utime(path)

    monkeypatch.setattr(run_lock.time, "sleep", pause)
    text = refusal(tmp_path, SAME)
    assert "on elsewhere" in text and f"gone for good, remove {path}" in text and len(pauses) == 3


def test_of_two_machines_that_start_at_once_the_one_that_wrote_first_gives_way(
    tmp_path: Path,
) -> None:
    """As on a file system whose locks do not reach other machines."""
    with RunLock(tmp_path, SAME) as lock:
        lock.confirm()
        record = json.loads((tmp_path / ".lock").read_text())
        theirs = record | {"host": "elsewhere", "kernel": "another", "token": "theirs"}
        (tmp_path / ".lock").write_text(json.dumps(theirs))
        with pytest.raises(ValueError, match="on elsewhere"):
            lock.confirm()


def test_the_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with RunLock(tmp_path, SAME):
        os.utime(tmp_path / ".lock", (1, 1))
        until = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime == 1:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_without_file_locks_a_live_owner_is_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", no_locks)
    monkeypatch.setattr(run_lock, "EXIT_SECONDS", 0.5)
    with RunLock(tmp_path, SAME):
        assert "this run is going on already" in refusal(tmp_path, SAME)
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    left_by(tmp_path, age=0, pid=child.pid, kernel=run_lock._kernel())
    with RunLock(tmp_path, SAME):
        pass


def test_a_process_that_is_just_being_killed_is_waited_for(tmp_path: Path) -> None:
    process = start(tmp_path)
    go_on(process)
    assert said(process) == "owner"
    os.kill(process.pid, signal.SIGKILL)
    with RunLock(tmp_path, SAME):
        pass
    process.wait()
    close(process)
