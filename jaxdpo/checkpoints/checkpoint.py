"""Checkpoints: everything an exact resume needs, complete or absent, and checked before it is trusted.

    <run>/checkpoints/<step>/state/          arrays, written by orbax: restores with plain orbax (docs/checkpoints.md)
                             meta.json       step, validation loss, config, counters: whatever is no array
                             manifest.json   sha256 of every other file, written last

A step is written as `<step>.saving` and renamed when its manifest is on disk, so a numeric folder with a manifest is a
complete save and anything else is not looked at. Orbax does not checksum array data; the manifest does.

Several processes save and restore one step together: each writes its own shards, the first one does the rest and decides, for all, which
step is the newest good one.
"""

import concurrent.futures
import errno
import json
import math
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxdpo import __version__
from jaxdpo.distributed import processes
from jaxdpo.utils.files import make_writable, sync_folder, write_json
from jaxdpo.utils.manifest import MANIFEST, find_damage, move_aside, seal

Tree = dict[str, Any]

META = "meta.json"
SAVING, DELETING, DAMAGED, UNKNOWN = ".saving", ".deleting", ".damaged", ".unknown"
PIECE_BYTES = 2**22
"""Parameters are saved in pieces no larger than this, each of one layer, so that a reader can take a layer at a time."""


class Checkpoints:
    """The checkpoints of one run: saves in the background, restores the newest step that is undamaged.

    Keeps the `keep` newest steps and, besides, the `keep_best` with the lowest validation loss. Use it as a context
    manager: leaving it waits for the save in progress. Several processes call each method at the same places of the run.

    Attributes:
        notes: what was found wrong with checkpoints on disk and done about it, one sentence each; for the reader to empty.
    """

    def __init__(self, run_dir: str | Path, keep: int = 2, keep_best: int = 1):
        """Open, or create, the folder `<run_dir>/checkpoints` and remove what an interrupted save left there.

        Raises:
            ValueError: when the folder cannot be written to, or is not the same for all processes.
        """
        self.folder = Path(run_dir).expanduser().resolve() / "checkpoints"
        self.notes: list[str] = []
        self._keep, self._keep_best = keep, keep_best
        self._good: set[int] = set()
        self._pending: concurrent.futures.Future[None] | None = None
        processes.on_first(lambda: self._open(run_dir))
        _check_shared(self.folder, run_dir)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def _open(self, run_dir: str | Path) -> None:
        make_writable(self.folder, run_dir)
        for leftover in [*self.folder.glob(f"*{SAVING}"), *self.folder.glob(f"*{DELETING}")]:
            shutil.rmtree(leftover)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and jax.process_count() > 1:
            return  # the others may be gone, and a save waits for them; this process is about to end
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"Besides, the last save failed: {failure}")
        finally:
            self._pool.shutdown()
            self._orbax.close()

    def save(
        self,
        step: int,
        state: Any,
        meta: Tree,
        eval_loss: float | None = None,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Save in the background; first wait for the save before. A step that is saved already is left as it is.

        The caller may donate or delete the arrays as soon as this returns.

        Args:
            step: number of updates done.
            state: nested dict of arrays (a PRNG key as its key data); a named tuple is written as a dict.
            meta: what else a resume needs, as JSON values.
            eval_loss: validation loss at this step, for `keep_best`; None when it was not measured.
            then: called, from another thread of the first process, when the step is complete on disk.

        Raises:
            OSError: the disk is full (of this save or the one before). Earlier steps are intact.
        """
        self.wait()
        if processes.from_first(step in _complete_steps(self.folder)):
            then()
            return
        size = num_bytes(state)
        saving = self.folder / f"{step}{SAVING}"
        try:
            with jax.transfer_guard(
                "allow"
            ):  # orbax copies to the host implicitly, which a guarded loop forbids
                self._orbax.save(
                    saving / "state", args=ocp.args.StandardSave(state, _pieces(state))
                )
        except Exception as error:
            raise self._explain(error, step, size) from error
        record = {"step": step, "eval_loss": eval_loss, "jaxdpo": __version__, **meta}
        self._pending = self._pool.submit(self._finish, step, record, size, then)

    def _finish(self, step: int, record: Tree, size: int, then: Callable[[], object]) -> None:
        """In the background: wait for orbax, add meta and manifest, give the folder its name, delete old steps."""
        saving, final = self.folder / f"{step}{SAVING}", self.folder / str(step)
        try:
            self._orbax.wait_until_finished()
            if processes.is_first():
                write_json(saving / META, record)
                seal(saving)
                if final.exists():
                    move_aside(final, UNKNOWN)
                saving.rename(final)
                sync_folder(self.folder)
                self._good.add(step)
                self._delete_old()
                then()
        except Exception as error:
            raise self._explain(error, step, size) from error

    def _delete_old(self) -> None:
        """Delete what `keep` and `keep_best` do not ask for, if one of those that stay is found good on the disk itself."""
        steps = _complete_steps(self.folder)
        losses = {step: _read_meta(self.folder, step)["eval_loss"] for step in steps}
        scored = [
            step for step in steps if losses[step] is not None and math.isfinite(losses[step])
        ]
        best = sorted(scored, key=lambda step: (losses[step], step))[: self._keep_best]
        old = set(steps[: -self._keep]) - set(best)
        if not old:
            return
        if all(
            find_damage(self.folder / str(step), from_disk=True)
            for step in reversed(steps)
            if step not in old
        ):
            self._good.clear()
            self.notes.append(
                f"no checkpoint that is to be kept in {self.folder} is undamaged, so older ones are not deleted"
            )
            return
        for step in old:
            doomed = self.folder / f"{step}{DELETING}"
            (self.folder / str(step)).rename(doomed)
            shutil.rmtree(doomed)

    def _explain(self, error: Exception, step: int, size: int) -> Exception:
        """Free the space of a failed save; say what is wrong where that is known to be a full disk."""
        if processes.is_first():
            shutil.rmtree(self.folder / f"{step}{SAVING}", ignore_errors=True)
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = "RESOURCE_EXHAUSTED" in str(error) or (
            isinstance(error, OSError) and error.errno in codes
        )
        if not full:
            return error
        newest = max(_complete_steps(self.folder), default=None)
        kept = (
            "there is no earlier one"
            if newest is None
            else f"that of step {newest} is intact, and the same command resumes from it"
        )
        return OSError(
            errno.ENOSPC,
            f"the disk is full: the checkpoint of step {step} takes up to {size:,} bytes "
            f"and {shutil.disk_usage(self.folder).free:,} are free. Free some space or lower checkpoint.keep; {kept}",
            str(self.folder),
        )

    def wait(self) -> None:
        """Wait until the save in progress is complete on disk, on all processes.

        Raises:
            OSError: the disk is full. Earlier steps are intact.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()
        if processes.any_of(error is not None):
            raise error or OSError(
                "the last save failed on another process, which says why. Earlier checkpoints are intact"
            )

    def latest_step(self) -> int | None:
        """Newest step that is complete and undamaged; None when there is none.

        Checks the files of each step against its manifest, newest first. A damaged step is renamed `<step>.damaged`
        (never deleted) and told in `notes`.
        """
        self.wait()
        return processes.from_first(self._newest_good() if processes.is_first() else None)

    def _newest_good(self) -> int | None:
        for step in reversed(_complete_steps(self.folder)):
            folder = self.folder / str(step)
            damage = None if step in self._good else find_damage(folder)
            if damage is None:
                self._good.add(step)
                return step
            aside = move_aside(folder, DAMAGED)
            self.notes.append(
                f"checkpoint {folder} is damaged ({damage}): renamed to {aside.name}, going back to the step before"
            )
        return None

    def count(self) -> int:
        """How many checkpoints there are, as this process sees it."""
        return len(_complete_steps(self.folder))

    def incomplete(self) -> list[str]:
        """Folders that are called like a step and are no checkpoint, as sentences."""
        names = [
            path.name
            for path in self.folder.iterdir()
            if path.name.isdecimal() and not (path / MANIFEST).exists()
        ]
        return [
            f"{self.folder / name} has no {MANIFEST}: it is not a complete checkpoint and is ignored"
            for name in sorted(names)
        ]

    def read_meta(self, step: int) -> Tree:
        """The JSON values saved with a step: those given to `save`, and step, eval_loss, jaxdpo (version)."""
        return processes.from_first(_read_meta(self.folder, step) if processes.is_first() else None)

    def restore(self, abstract_state: Any) -> tuple[int, Any, Tree] | None:
        """Restore the newest undamaged step onto this run's devices, with the bits and types that were saved.

        Args:
            abstract_state: as the saved state, of `jax.ShapeDtypeStruct` with shardings; the mesh may differ from the saved one.

        Returns:
            (step, state, meta), or None when there is no checkpoint.

        Raises:
            ValueError: when names, shapes or types differ from the saved ones.
        """
        step = self.latest_step()
        if step is None:
            return None
        folder = self.folder / str(step)
        _check_same_form(folder, _saved_form(self._orbax, folder), abstract_state)
        state = self._orbax.restore(folder / "state", args=ocp.args.StandardRestore(abstract_state))
        return step, state, self.read_meta(step)


def _pieces(state: Any) -> Any:
    """How orbax is to divide each array on disk."""

    def divided(path: tuple, _: Any) -> ocp.SaveArgs:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[0] != "params":
            return ocp.SaveArgs()
        return ocp.SaveArgs(
            chunk_byte_size=PIECE_BYTES, shard_axes=(0,) if "layers" in names else ()
        )

    return jax.tree_util.tree_map_with_path(divided, state)


def restore_params(run_dir: str | Path, step: int | None = None) -> tuple[int, Tree, Tree]:
    """Read the policy of a run into host memory, without its optimizer state and without touching the run.

    Args:
        run_dir: the run's folder.
        step: which checkpoint. Default: the newest that is undamaged.

    Returns:
        (step, params as nested dict of numpy arrays, meta).

    Raises:
        ValueError: when there is no such checkpoint, or the one asked for is damaged.
    """
    step, folder, meta = _usable(run_dir, step)
    return step, _read_params(folder), meta


def open_params(run_dir: str | Path, step: int | None = None) -> tuple[int, Tree, Tree]:
    """As restore_params, but nothing of an array is read before it is asked for: `np.asarray(array[3])` reads that layer alone.

    Returns:
        (step, params as nested dict of arrays on disk, with shape and dtype, meta).
    """
    step, folder, meta = _usable(run_dir, step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = _saved_form(reader, folder)["params"]
    return step, jax.tree.map(lambda leaf: _on_disk(folder, leaf.name), saved), meta


def _on_disk(folder: Path, name: str) -> ts.TensorStore:
    """An array of a saved state, by its name there: params.layers.attn.q."""
    files = {"driver": "file", "path": f"{folder / 'state'}/"}
    arrays = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
    spec = {
        "driver": "zarr",
        "kvstore": arrays,
        "fill_missing_data_reads": False,
    }  # else what is missing would read as zeros
    return ts.open(spec, read=True).result()


def _usable(run_dir: str | Path, step: int | None) -> tuple[int, Path, Tree]:
    """Step, folder and meta of the checkpoint asked for, or of the newest that is undamaged."""
    folder = Path(run_dir).expanduser().resolve() / "checkpoints"
    steps = _complete_steps(folder)
    if step is not None and step not in steps:
        raise ValueError(
            f"step={step}: there is no such checkpoint in {folder}. Choose from {steps}"
        )
    reasons = []
    for candidate in [step] if step is not None else reversed(steps):
        damage = find_damage(folder / str(candidate))
        if damage is None:
            return candidate, folder / str(candidate), _read_meta(folder, candidate)
        reasons.append(f"step {candidate} is damaged ({damage})")
    raise ValueError(
        f"run_dir={run_dir}: no usable checkpoint in {folder}: {'; '.join(reasons) or 'none was saved'}"
    )


def _read_params(folder: Path) -> Tree:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = {"params": _saved_form(reader, folder)["params"]}
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return reader.restore(
            folder / "state", args=ocp.args.PyTreeRestore(saved, to_numpy, partial_restore=True)
        )["params"]


def _saved_form(reader: ocp.Checkpointer, folder: Path) -> Tree:
    """Shapes and types of the saved state, without its values."""
    metadata = reader.metadata(folder / "state").item_metadata
    assert metadata is not None, f"{folder} was saved without metadata"
    return metadata.tree


def _check_same_form(folder: Path, saved: Tree, wanted: Any) -> None:
    def form(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(
                path, simple=True, separator="/"
            ): f"{np.dtype(x.dtype).name}{list(x.shape)}"
            for path, x in leaves
        }

    old, new = form(saved), form(wanted)
    wrong = [
        f"  {path}: saved {old.get(path, 'not at all')}, wanted {new.get(path, 'not at all')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {folder}: holds another state than this run needs. Use another run_dir.\n"
            + "\n".join(wrong)
        )


def _complete_steps(folder: Path) -> list[int]:
    """Steps with a manifest, oldest first; other folders, whatever their names, are no checkpoints."""
    return sorted(
        int(path.parent.name)
        for path in folder.glob(f"*/{MANIFEST}")
        if path.parent.name.isdecimal()
    )


def _read_meta(folder: Path, step: int) -> Tree:
    return json.loads((folder / str(step) / META).read_text())


def _check_shared(folder: Path, run_dir: str | Path) -> None:
    """All processes must see what the first one writes.

    Raises:
        ValueError: they do not.
    """
    if jax.process_count() == 1:
        return
    mark = folder / processes.from_first(f".shared-{secrets.token_hex(8)}")
    if processes.is_first():
        mark.touch()
    processes.any_of(False)  # nobody looks before it is there
    apart = processes.any_of(not mark.exists())
    if processes.is_first():
        mark.unlink()
    if apart:
        raise ValueError(
            f"run_dir={run_dir}: not all {jax.process_count()} processes see the same folder. Choose one on a disk that all machines share"
        )


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of arrays of such shapes."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
