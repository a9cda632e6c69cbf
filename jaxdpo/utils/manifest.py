"""Folders that are complete or absent, and whose files are as they were written: a list of sha256 sums, written last.

A folder is written under another name and gets its own with `seal`, when the list of its files is on disk.
"""

import errno
import hashlib
import itertools
import json
from pathlib import Path

from jaxdpo.utils.files import forget_cached, sync_folder, write_json

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Write the list of the folder's files and their sums, and have it on the disk."""
    write_json(folder / MANIFEST, {"sha256": digests(folder)})
    sync_folder(folder)


def find_damage(folder: Path, *, from_disk: bool = False) -> str | None:
    """Compare the files of a folder with its manifest: None when all are as written, else what is wrong.

    Args:
        from_disk: read what is on the disk even where the system remembers what was written.
    """
    try:
        expected = json.loads((folder / MANIFEST).read_text())["sha256"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, digest in expected:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if _sha256(path, from_disk) != digest:
                return f"{name} is not as it was written"
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOENT):
                raise
            return f"{name} cannot be read: {error.strerror}"
    return None


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path in the folder."""
    return {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _sha256(path: Path, from_disk: bool = False) -> str:
    with path.open("rb") as file:
        if from_disk:
            forget_cached(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_aside(folder: Path, suffix: str) -> Path:
    """Give the folder another name that ends in the suffix and that nothing has."""
    targets = (
        folder.with_name(f"{folder.name}{suffix}" + (f"-{number}" if number > 1 else ""))
        for number in itertools.count(1)
    )
    return folder.rename(next(target for target in targets if not target.exists()))
