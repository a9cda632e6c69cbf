"""Files that appear complete or not at all, and folders that are found writable before a run has
something to lose."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

PROBE_BYTES = 2**24
"""Most that is written to try a folder: 16 MiB takes well under a second, and fails on a small
quota."""


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", *, durable: bool = False) -> Iterator[IO[Any]]:
    """A file to write that appears under its name when it is complete, or not at all.

    Args:
        path: replaced if it exists; its folder is made if need be.
        mode: "w" for text (UTF-8), "wb" for bytes.
        durable: return only when the content is on the disk, safe from a power cut. `sync_folder`
            does so for the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic on one file system only; named by the process,
    # since several may write.
    draft = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with draft.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a JSON object: completely or not at all, and on the disk when this returns.

    Args:
        path: see `atomic_write`.
        content: JSON values.
        durable: see `atomic_write`; false where it is written often and a loss does not matter.
    """
    with atomic_write(path, durable=durable) as file:
        json.dump(content, file, indent=1)


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The content of a small file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer, as a device such as /dev/zero is, which has no end.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"longer than {max_bytes:,} bytes. Is it the right file?")
    return content


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
            f"run_dir={run_dir}: cannot write to {folder} ({error.strerror}). "
            "Choose a folder that this user may write to"
        ) from error


def pattern_problem(run_dir: str | Path) -> str | None:
    """What is wrong with a run folder whose path orbax takes for a pattern; None: nothing.

    It collects the files of a save with `glob`, on the path as it is: with a [ in it no file is
    found, and the checkpoint could never be read.
    """
    path = str(Path(run_dir).expanduser().resolve())
    if glob.escape(path) == path:
        return None
    return (
        f"run_dir={run_dir}: its path, {path}, has a *, ? or [, and checkpoints cannot be "
        "written below such a folder. Choose one without them"
    )


def check_room(folder: Path, run_dir: str | Path, num_bytes: int, num_more: int) -> str | None:
    """Check that a checkpoint fits into the folder: by the free space, and by writing and reading
    back part of it.

    Args:
        folder: where checkpoints are stored.
        run_dir: for messages.
        num_bytes: size of one checkpoint.
        num_more: how many more of them will be stored at once.

    Returns:
        A warning when there is room for one, but not for as many.

    Raises:
        ValueError: not even one fits, or what is read is not what was written.
    """
    free = shutil.disk_usage(folder).free
    takes = f"run_dir={run_dir}: a checkpoint takes up to {num_bytes:,} bytes"
    if free < num_bytes:
        raise ValueError(
            f"{takes}, and the disk of {folder} has {free:,} free. "
            "Free some space or choose another folder; nothing was trained"
        )
    size = min(num_bytes, PROBE_BYTES)
    try:
        intact = write_and_read(folder, size)
    except OSError as error:
        raise ValueError(
            f"{takes}, and not even {size:,} could be written to {folder} ({error.strerror}). "
            "Look at quotas (quota, ulimit -f) or choose another folder; nothing was trained"
        ) from error
    if not intact:
        raise ValueError(
            f"run_dir={run_dir}: what is read from {folder} is not what was written there. "
            "Choose another disk"
        )
    if free < num_bytes * num_more:
        return (
            f"the disk of {folder} has {free:,} bytes free, and the checkpoints that will be kept "
            "(checkpoint.keep, checkpoint.keep_best and one that is being written) "
            f"may come to take {num_bytes * num_more:,} more"
        )
    return None


def write_and_read(folder: Path, num_bytes: int) -> bool:
    """Write random bytes to a temporary file; returns whether the disk gives them back unchanged.

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


def forget_cached(descriptor: int) -> None:
    """Have the next read of a file come from its disk and not from the page cache, where the system
    supports it."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def is_local(name: str) -> bool:
    """Whether a model or data set is named by a path on this machine, not by its name on the
    hub."""
    path = Path(name).expanduser()
    return path.exists() or path.is_absolute() or name.startswith(".")
