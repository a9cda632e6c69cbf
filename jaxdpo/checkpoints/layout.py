"""The folder of one checkpoint: its files, and which folders are complete.

    <run>/checkpoints/<step>/state/          arrays, written by orbax: restores with plain orbax
                             meta.json       step, validation loss, config, identity, counters
                             manifest.json   sha256 of every other file, written last

A step is written as `<step>.saving` and renamed when its manifest is on disk, so a folder with a
number for a name and a manifest in it is a complete checkpoint; anything else is ignored.
"""

import json
from pathlib import Path
from typing import Any

from jaxdpo.utils.manifest import MANIFEST

META = "meta.json"


def complete_steps(folder: Path) -> list[int]:
    """Steps with a manifest, oldest first; other folders, whatever their names, are ignored."""
    names = [path.parent.name for path in folder.glob(f"*/{MANIFEST}")]
    return sorted(int(name) for name in names if name.isdecimal())


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """meta.json of a step."""
    return json.loads((folder / str(step) / META).read_text())
