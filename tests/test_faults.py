"""The short form of benchmarks/faults.py: a few of each fault, done to real processes.

Also disks that are full or cannot be written.
"""

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import fault_runs, faults
from benchmarks.fault_runs import Runs
from benchmarks.faults import MUTATIONS
from benchmarks.forks import Server

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore:Sharding info not provided")]
TOTAL = 150


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Of forks that share their imports."""
    with contextlib.closing(Server(fault_runs.ENVIRONMENT)) as server:
        yield server


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The inputs, and the untouched run: as it is typed, not in a fork."""
    return Runs(tmp_path_factory.mktemp("faults"), TOTAL)


@pytest.fixture(scope="module")
def stopped(runs: Runs, server: Server) -> Path:
    """A run that SIGTERM stopped halfway, to be copied."""
    event = fault_runs.interrupt(
        runs, runs.folder / "stopped", signal.SIGTERM, "step", TOTAL // 2, random.Random(0), server
    )
    assert event["code"] == 75 and event["saved"] >= event["logged"] >= TOTAL // 2
    return runs.folder / "stopped"


def test_resume_after_sigkill_at_any_moment_ends_with_the_same_bits(runs: Runs) -> None:
    found = faults.lane(
        runs,
        runs.folder / "killed",
        signal.SIGKILL,
        ["before the first step", "save", "start", "step", "save"],
        1,
    )
    assert found["failures"] == [] and [event["code"] for event in found["events"]] == [-9] * 5


def test_sigterm_at_any_moment_loses_nothing(runs: Runs) -> None:
    kinds = ["before the first step", "evaluation", "save", "generation", "step"]
    found = faults.lane(runs, runs.folder / "stopped-often", signal.SIGTERM, kinds, 2)
    assert found["failures"] == [], found["events"]


@pytest.mark.parametrize("lost", MUTATIONS)
def test_the_suite_notices_what_a_resume_leaves_out(
    runs: Runs, stopped: Path, server: Server, lost: str, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    assert runs.finish(tmp_path / "run", server, MUTATIONS[lost]) == 0
    assert runs.differences(tmp_path / "run") != []


def test_no_flipped_bit_is_silent(stopped: Path) -> None:
    assert faults.flips(stopped, 60, 3)["silent"] == []


def test_broken_files_and_junk_are_reported_and_survived(
    runs: Runs, stopped: Path, server: Server
) -> None:
    assert faults.broken_files(runs, stopped, server, every=True)["failures"] == []


def test_a_requested_checkpoint_is_saved(runs: Runs, server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "save").touch()
    process = runs.start(
        run, server, "from jaxdpo.training import loop\nloop.is_due = lambda step, every: False"
    )  # no save is due by itself
    until = time.monotonic() + fault_runs.PATIENCE
    while not fault_runs.newest(run) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    early = fault_runs.newest(run)
    assert (
        process.wait(fault_runs.PATIENCE) == 0 and 0 < early < TOTAL and not (run / "save").exists()
    ), fault_runs.printed(run)


# --- disks ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes; the test is skipped where none can be made."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    path = disk / "filler"
    path.write_bytes(b"x" * (shutil.disk_usage(disk).free - leave))
    return path


def test_a_disk_without_room_is_found_before_the_first_step(
    runs: Runs, server: Server, small_disk: Path
) -> None:
    fill(small_disk, 150_000)
    assert runs.finish(small_disk / "run", server) == 1
    words = fault_runs.printed(small_disk / "run")
    assert (
        "a checkpoint takes up to 235," in words
        and f"the disk of {small_disk}/run/checkpoints has" in words
    ), words
    assert "nothing was trained" in words and fault_runs.last_step(small_disk / "run") == 0


def test_a_disk_that_fills_up_stops_the_run_and_loses_no_checkpoint(
    runs: Runs, server: Server, small_disk: Path
) -> None:
    run = small_disk / "run"
    run.mkdir()
    (run / "out.txt").symlink_to(
        small_disk.parent / "out.txt"
    )  # what is printed must not need the full disk
    process = runs.start(run, server)
    while not fault_runs.newest(run):
        assert process.poll() is None, fault_runs.printed(run)
        time.sleep(0.005)
    filler = fill(small_disk, 40_000)
    assert process.wait(fault_runs.PATIENCE) == 1, fault_runs.printed(run)
    words, kept = fault_runs.printed(run), fault_runs.newest(run)
    assert "disk is full" in words or "No space left on device" in words, words
    assert str(run) in words.splitlines()[-1] and kept > 0
    filler.unlink()
    assert runs.finish(run, server) == 0, fault_runs.printed(run)
    assert f"resuming after step {kept}" in fault_runs.printed(run) and runs.differences(run) == []


def test_a_disk_that_cannot_be_written_is_reported(
    runs: Runs, server: Server, small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    words = [
        f"run_dir={small_disk / 'run'}",
        f"model.path={runs.folder / 'model'}",
        f"data.train=[{runs.folder / 'rows.jsonl'}]",
    ]
    process = server.start(
        [*words, "data.max_length=32", "data.packed_length=64"], "", tmp_path / "out.txt"
    )
    assert process.wait(fault_runs.PATIENCE) == 1
    assert f"run_dir={small_disk / 'run'}: cannot write to" in (tmp_path / "out.txt").read_text()
