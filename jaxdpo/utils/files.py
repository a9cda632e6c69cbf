"""Whether a folder can hold what a run will write there, found out before the run has something to lose; files that appear whole."""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

PROBE_BYTES = 2**24
"""Most that is written to try a folder."""


def make_writable(folder: Path, run_dir: str | Path) -> None:
    """Make the folder if need be, and a file in it.

    Raises:
        ValueError: that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"run_dir={run_dir}: cannot write to {folder} ({error.strerror}). Choose a folder that this user may write to"
        ) from error


def check_room(folder: Path, run_dir: str | Path, num_bytes: int, num_more: int) -> str | None:
    """Make sure that a checkpoint fits into the folder: by the free space, and by writing and reading back part of it.

    Args:
        folder: where checkpoints go.
        num_bytes: of one checkpoint.
        num_more: how many of them will be there at once, besides those that are there already.

    Returns:
        A warning when there is room for one, but not for as many.

    Raises:
        ValueError: not even one fits, or what is read is not what was written.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"run_dir={run_dir}: a checkpoint takes up to {num_bytes:,} bytes, and the disk of {folder} has {free:,} free. "
            "Free some space or choose another folder; nothing was trained"
        )
    size = min(num_bytes, PROBE_BYTES)
    try:
        intact = write_and_read(folder, size)
    except OSError as error:
        raise ValueError(
            f"run_dir={run_dir}: a checkpoint takes up to {num_bytes:,} bytes, and not even {size:,} could be written to {folder} "
            f"({error.strerror}). Look at quotas (quota, ulimit -f) or choose another folder; nothing was trained"
        ) from error
    if not intact:
        raise ValueError(
            f"run_dir={run_dir}: what is read from {folder} is not what was written there. Choose another disk"
        )
    if free < num_bytes * num_more:
        return (
            f"the disk of {folder} has {free:,} bytes free, and the checkpoints that will be kept (checkpoint.keep, checkpoint.keep_best "
            f"and one that is being written) may come to take {num_bytes * num_more:,} more"
        )
    return None


def write_and_read(folder: Path, num_bytes: int) -> bool:
    """Write random bytes to a file that is removed again; whether they are read back from the disk as they were.

    Raises:
        OSError: they cannot be written or read.
    """
    content = secrets.token_bytes(num_bytes)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        forget_cached(file.fileno())
        file.seek(0)
        return file.read() == content


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A file of text to write that appears under its name when it is complete, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with draft.open("w", encoding="utf-8") as file:
            yield file
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def forget_cached(descriptor: int) -> None:
    """Have the next read of a file come from its disk, where the system can be told so."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is on the disk, safe from a power cut, when this returns."""
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_local(name: str) -> bool:
    """Whether a model or data set is named by a path on this machine, not by its name on the hub."""
    path = Path(name).expanduser()
    return path.exists() or path.is_absolute() or name.startswith(".")
