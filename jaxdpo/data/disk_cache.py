"""Encoded pairs on disk: made once, memory-mapped by every later start.

A folder of the cache has one file for each column of a table and meta.json, which names everything
that the pairs were made from: the bytes of the data, the options that choose and cut pairs, the
tokenizer, the chat template, and this code. Folders are named by the hash of that, get their name
when they are complete, and never change after.

Not an Arrow IPC file because on 100,000 pairs (CPU times, 2 cores) a table of Arrow lists reads a
pair in 24 us instead of 13.5, and one with flat columns takes as long to read (12.2 us) but 5.0 ms
instead of 4.2 to open, needs pairs collected into batches of thousands while writing (13 ms with
batches of 512) and saves few lines: the columns still have to be built and addressed by hand.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxdpo.data.pair_table import COLUMNS, Columns, PairTable

logger = logging.getLogger(__name__)

META = "meta.json"


class TableWriter:
    """Appends chunks of pairs to the files of a folder; memory does not grow with their number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        for name in COLUMNS:
            self._files[name] = _column_file(folder, name).open("wb")

    def append(self, columns: Columns) -> None:
        """Add the pairs of these columns."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(columns[name]).tobytes())

    def close(self) -> dict[str, int]:
        """Close the files; returns the bytes in each column."""
        for file in self._files.values():
            file.close()
        return {name: _column_file(self.folder, name).stat().st_size for name in COLUMNS}


def load_or_make(
    root: str | None, identity: dict[str, Any], make: Callable[[TableWriter], Any]
) -> tuple[PairTable, Any]:
    """The table and notes of this identity: from the cache, or made and stored there.

    Args:
        root: the cache, data.cache. None: the table is in a temporary folder as long as it lives.
        identity: JSON values that determine the table.
        make: writes the pairs; returns notes, JSON values that are stored with them.

    Raises:
        ValueError: the cache cannot be written, or has something else under this name.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    try:
        if root is None:
            folder = Path(tempfile.mkdtemp(prefix="jaxdpo-pairs-"))
            _write(folder, identity, make)
            table, notes = open_table(folder, identity)
            weakref.finalize(table, shutil.rmtree, folder, ignore_errors=True)
            return table, notes
        folder = Path(root).expanduser() / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if (folder / META).is_file():
                logger.info("data: encoded pairs found in %s", folder)
            else:
                _make(folder, identity, make)
        return open_table(folder, identity)
    except OSError as error:
        raise _explained(root, error) from None


def open_table(folder: Path, identity: dict[str, Any]) -> tuple[PairTable, Any]:
    """The table in a folder, memory-mapped and not read, and its notes.

    Raises:
        ValueError: the folder's pairs were made from something else, or files are damaged.
    """
    remedy = f"Remove {folder} to have it made again"
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        found, sizes, notes = meta["identity"], meta["sizes"], meta["notes"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"data.cache: {folder / META} is damaged. {remedy}") from None
    different = [name for name in {**identity, **found} if identity.get(name) != found.get(name)]
    if different:
        raise ValueError(
            f"data.cache: the pairs in {folder} were made with another "
            f"{' and another '.join(different)}. {remedy}"
        )
    columns = {}
    for name, dtype in COLUMNS.items():
        path = _column_file(folder, name)
        size = path.stat().st_size if path.is_file() else None
        if size != sizes.get(name):
            raise ValueError(
                f"data.cache: {path} is damaged ({size} bytes, should be {sizes.get(name)}). "
                f"{remedy}"
            )
        if size:
            columns[name] = np.memmap(path, dtype, "r").view(np.ndarray)
        else:  # an empty file cannot be mapped
            columns[name] = np.zeros(0, dtype)
    return PairTable.from_columns(columns), notes


def _column_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _make(folder: Path, identity: dict[str, Any], make: Callable[[TableWriter], Any]) -> None:
    """Write a new folder, which gets its name when it is complete."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a process that was killed left behind
    partial.mkdir()
    try:
        _write(partial, identity, make)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("data: encoded pairs stored in %s", folder)


def _write(folder: Path, identity: dict[str, Any], make: Callable[[TableWriter], Any]) -> None:
    writer = TableWriter(folder)
    try:
        notes = make(writer)
    finally:
        sizes = writer.close()
    meta = {"identity": identity, "sizes": sizes, "notes": notes}
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: of several that want the same pairs, one makes them."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("data: another process prepares the same pairs; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _explained(root: str | None, error: OSError) -> ValueError:
    """An error of the file system as the user's: which folder, why, what to do."""
    if root is None:
        option, folder = "data.cache=null", tempfile.gettempdir()
    else:
        option, folder = f"data.cache={root}", root
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ValueError(
            f"{option}: no space is left for the encoded pairs in {folder}. "
            "Free some, or name a folder on another disk"
        )
    return ValueError(
        f"{option}: cannot be used ({error.strerror or error}). "
        "Name a folder that can be written, or null to store nothing"
    )
