"""Folders that are complete or absent, and whose files are as they were written.

A folder is written under another name; `seal` then lists the sha256 sums of its files, and only
after that it gets its own name. `find_damage` compares.
"""

import errno
import hashlib
import json
from pathlib import Path

from jaxdpo.utils.files import forget_cached, sync_folder, write_json

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Write the list of the folder's files and their sums; it is on the disk when this returns."""
    write_json(folder / MANIFEST, {"sha256": digests(folder)})
    sync_folder(folder)


def find_damage(folder: Path, *, from_disk: bool = False) -> str | None:
    """Compare the files of a folder with its manifest: None when all are as written, else what is
    wrong.

    Args:
        folder: a sealed folder.
        from_disk: read what is on the disk even where it is still in the system's page cache.
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
            # A bad sector or a file that vanished is damage; a permission is not, and is reported.
            if error.errno not in (errno.EIO, errno.ENOENT):
                raise
            return f"{name} cannot be read: {error.strerror}"
    return None


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path in the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = _sha256(path)
    return found


def _sha256(path: Path, from_disk: bool = False) -> str:
    with path.open("rb") as file:
        if from_disk:
            forget_cached(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename_aside(folder: Path, suffix: str) -> Path:
    """Rename a folder to one that ends in the suffix and does not exist, so that nothing uses it
    and nothing is lost."""
    target, number = folder.with_name(f"{folder.name}{suffix}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}{suffix}-{number}")
    return folder.rename(target)
