"""Room on the disk is found out before a run has something to lose."""

import resource
import shutil
from pathlib import Path

import pytest

from jaxdpo.utils import files
from jaxdpo.utils.files import check_room, make_writable, write_and_read


def test_too_little_room_is_reported_before_anything_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_room(tmp_path, "run", 1000, 3) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 6500, 2500))  # type: ignore[attr-defined]
    assert "may come to take 3,000 more" in str(check_room(tmp_path, "run", 1000, 3))
    with pytest.raises(
        ValueError,
        match=r"run_dir=run: a checkpoint takes up to 2,501 bytes, and the disk of .* has 2,500 "
        "free",
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


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir=x: cannot write to .*file"):
        make_writable(tmp_path / "file" / "run", "x")
