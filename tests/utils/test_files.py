"""Files that appear complete or not at all, and room on the disk that is found out in time."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from jaxdpo.utils import files
from jaxdpo.utils.files import (
    atomic_write,
    check_room,
    make_writable,
    write_and_read,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("mode", "old", "new"), [("w", "alt", "neu ü\n"), ("wb", b"old", b"\xff")])
def test_a_file_appears_when_it_is_complete(
    tmp_path: Path, mode: str, old: str | bytes, new: str | bytes
) -> None:
    path = tmp_path / "made" / "a"
    for content in (old, new):
        before = path.read_bytes() if path.exists() else None
        with atomic_write(path, mode) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        expected = content.encode() if isinstance(content, str) else content
        assert path.read_bytes() == expected and names(path.parent) == ["a"]


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["a"]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_json_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "a.json", []

    def fsync(descriptor: int) -> None:
        assert not path.exists()
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_json(path, {"a": [1, None]})
    assert synced == [path.stat().st_size] and json.loads(path.read_text()) == {"a": [1, None]}
    write_json(path, {}, durable=False)
    assert len(synced) == 1 and json.loads(path.read_text()) == {}


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
