"""Encoded pairs on disk: made once, mapped into memory by every later start.

A folder of the cache holds one file for each column of a table and meta.json, which names everything that the pairs were made from: the
bytes of the data, the options that choose and cut pairs, the tokenizer, the template, and this code. Folders are named by the hash
of that, get their name when they are whole, and are never changed after.
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
    """Puts lots of pairs one behind another into the files of a folder; memory does not grow with their number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {
            name: (folder / f"{name}.bin").open("wb") for name in COLUMNS
        }

    def append(self, columns: Columns) -> None:
        """Add the pairs of these columns."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(columns[name]).tobytes())

    def close(self) -> dict[str, int]:
        """Close the files; returns the bytes in each column."""
        for file in self._files.values():
            file.close()
        return {name: (self.folder / f"{name}.bin").stat().st_size for name in COLUMNS}


def load_or_make(
    root: str | None, identity: dict[str, Any], make: Callable[[TableWriter], Any]
) -> tuple[PairTable, Any]:
    """The table and notes of this identity: from the cache, or made and put there.

    Args:
        root: the cache, data.cache. None: the table lives in a temporary folder as long as this process.
        identity: JSON values that determine the table.
        make: writes the pairs; returns notes, JSON values that are kept beside them.

    Raises:
        ValueError: the cache cannot be written, or holds something else under this name.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    try:
        if root is None:
            folder = Path(tempfile.mkdtemp(prefix="jaxdpo-pairs-"))
            _fill(folder, identity, make)
            table, notes = open_table(folder, identity)
            weakref.finalize(table, shutil.rmtree, folder, ignore_errors=True)
            return table, notes
        folder = Path(root).expanduser() / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_suffix(".lock")):
            if (folder / META).is_file():
                logger.info("data: encoded pairs found in %s", folder)
            else:
                _make(folder, identity, make)
        return open_table(folder, identity)
    except OSError as error:
        raise _explained(root, error) from None


def open_table(folder: Path, identity: dict[str, Any]) -> tuple[PairTable, Any]:
    """The table in a folder, mapped and not read, and its notes.

    Raises:
        ValueError: the folder's pairs were made from something else, or files are damaged.
    """
    remedy = f"Remove {folder} to have it made again"
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        found, sizes, notes = meta["identity"], meta["sizes"], meta["notes"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"data.cache: {folder / META} is damaged. {remedy}") from None
    if different := [
        name for name in {**identity, **found} if identity.get(name) != found.get(name)
    ]:
        raise ValueError(
            f"data.cache: the pairs in {folder} were made with another {' and another '.join(different)}. {remedy}"
        )
    columns = {}
    for name, dtype in COLUMNS.items():
        path = folder / f"{name}.bin"
        size = path.stat().st_size if path.is_file() else None
        if size != sizes.get(name):
            raise ValueError(
                f"data.cache: {path} is damaged ({size} bytes, should be {sizes.get(name)}). {remedy}"
            )
        columns[name] = np.memmap(path, dtype, "r").view(np.ndarray) if size else np.zeros(0, dtype)
    return PairTable.from_columns(columns), notes


def _make(folder: Path, identity: dict[str, Any], make: Callable[[TableWriter], Any]) -> None:
    """Fill a new folder; it gets its name when it is whole. What a process that was killed left behind is removed."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _fill(partial, identity, make)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("data: encoded pairs kept in %s", folder)


def _fill(folder: Path, identity: dict[str, Any], make: Callable[[TableWriter], Any]) -> None:
    writer = TableWriter(folder)
    try:
        notes = make(writer)
    finally:
        sizes = writer.close()
    meta = {"identity": identity, "sizes": sizes, "notes": notes}
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time: of several that want the same pairs, one makes them and the others wait."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("data: another process prepares the same pairs; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _explained(root: str | None, error: OSError) -> ValueError:
    """An error of the file system as the user's: which folder, why, what to do."""
    where = tempfile.gettempdir() if root is None else root
    place = f"data.cache={'null' if root is None else root}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ValueError(
            f"{place}: no space is left for the encoded pairs in {where}. Free some, or name a folder on another disk"
        )
    return ValueError(
        f"{place}: cannot be used ({error.strerror or error}). Name a folder that can be written, or null to keep nothing"
    )
