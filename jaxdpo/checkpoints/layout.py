"""The folder of one checkpoint: its files, and which folders are complete.

    <run>/checkpoints/<step>/state/          arrays, written by orbax: restores with plain orbax
                             meta.json       step, validation loss, config, identity, counters
                             manifest.json   sha256 of every other file, written last

    <run>/checkpoints/eval_losses.json       validation losses that were measured after their step
                                             was saved

A step is written as `<step>.saving` and renamed when its manifest is on disk, so a folder with a
number for a name and a manifest in it is a complete checkpoint; anything else is ignored.
"""

import json
import math
from pathlib import Path
from typing import Any

from jaxdpo.utils.files import write_json
from jaxdpo.utils.manifest import MANIFEST

META = "meta.json"
LOSSES = "eval_losses.json"
"""Not in the folder of the step, whose files are sealed."""


def complete_steps(folder: Path) -> list[int]:
    """Steps with a manifest, oldest first; other folders, whatever their names, are ignored."""
    names = [path.parent.name for path in folder.glob(f"*/{MANIFEST}")]
    return sorted(int(name) for name in names if name.isdecimal())


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """meta.json of a step."""
    return json.loads((folder / str(step) / META).read_text())


def saved_losses(folder: Path) -> dict[int, float]:
    """The validation loss of each step that has one, NaN and infinite ones left out."""
    try:
        later = json.loads((folder / LOSSES).read_text())
    except (OSError, ValueError):
        later = {}
    losses = {}
    for step in complete_steps(folder):
        loss = read_meta(folder, step)["eval_loss"]
        if loss is None:
            loss = later.get(str(step))
        if loss is not None and math.isfinite(loss):
            losses[step] = loss
    return losses


def note_loss(folder: Path, step: int, eval_loss: float) -> None:
    """Write down the validation loss of a step that was saved without one."""
    losses = {}
    for other, loss in saved_losses(folder).items():
        if read_meta(folder, other)["eval_loss"] is None:
            losses[str(other)] = loss
    write_json(folder / LOSSES, losses | {str(step): eval_loss})
