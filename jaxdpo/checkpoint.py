"""Checkpoints: everything an exact resume needs, complete or absent, and checked before it is trusted.

    <run>/checkpoints/<step>/state/          arrays, written by orbax: restores with plain orbax (docs/checkpoints.md)
                             meta.json       step, validation loss, config, counters: whatever is no array
                             manifest.json   sha256 of every other file, written last

A step is written as `<step>.saving` and renamed when its manifest is on disk, so a numeric folder with a manifest is a
complete save and anything else is not looked at. Orbax does not checksum array data; the manifest does.
"""

import concurrent.futures
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxdpo import __version__

Tree = dict[str, Any]

MANIFEST = "manifest.json"
META = "meta.json"
SAVING, DELETING, DAMAGED, UNKNOWN = ".saving", ".deleting", ".damaged", ".unknown"
PIECE_BYTES = 2**22
"""Parameters are saved in pieces no larger than this, each of one layer, so that a reader can take a layer at a time."""

FREE_FIELDS = (
    "run_dir",
    "checkpoint.",
    "eval.",
    "log.",
    "train.compilation_cache",
    # From here on: where and in which order the same sums are computed. The result is the same up to rounding.
    "mesh.",
    "model.attention",
    "model.remat",
    "data.layout",
    "data.max_row_tokens",
    "data.row_sizes",
    # A guard that the run has passed already.
    "data.max_dropped_fraction",
)
"""Options that may change between a run and its resume (those ending in a dot: the whole section)."""


def changed_fields(saved: Tree, current: Tree) -> list[tuple[str, Any, Any]]:
    """Options that differ between a checkpoint's config and the current one and change what is computed.

    Args:
        saved: the config in a checkpoint's meta, as nested dict.
        current: the config of this run, as nested dict.

    Returns:
        (path, saved value, current value) of each, by path; "(absent)" stands for an option that one side lacks.
    """
    old, new = dict(_flat(saved)), dict(_flat(json.loads(json.dumps(current))))
    pairs = [(path, old.get(path, "(absent)"), new.get(path, "(absent)")) for path in sorted(old.keys() | new.keys())]
    return [(path, a, b) for path, a, b in pairs if a != b and not _is_free(path)]


def _flat(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_free(path: str) -> bool:
    return any(path.startswith(free) if free.endswith(".") else path == free for free in FREE_FIELDS)


class Checkpoints:
    """The checkpoints of one run: saves in the background, restores the newest step that is undamaged.

    Keeps the `keep` newest steps and, besides, the `keep_best` with the lowest validation loss. Use it as a context
    manager: leaving it waits for the save in progress.

    Attributes:
        notes: what was found wrong with checkpoints on disk and done about it, one sentence each.
    """

    def __init__(self, run_dir: str | Path, keep: int = 2, keep_best: int = 1):
        """Open, or create, the folder `<run_dir>/checkpoints` and remove what an interrupted save left there.

        Raises:
            ValueError: when the folder cannot be written to.
        """
        self.folder = Path(run_dir).expanduser().resolve() / "checkpoints"
        self.notes: list[str] = []
        self._keep, self._keep_best = keep, keep_best
        self._good: set[int] = set()
        self._pending: concurrent.futures.Future[None] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        _make_writable(self.folder, run_dir)
        if jax.process_index() == 0:
            for leftover in [*self.folder.glob(f"*{SAVING}"), *self.folder.glob(f"*{DELETING}")]:
                shutil.rmtree(leftover)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"Besides, the last save failed: {failure}")
        finally:
            self._pool.shutdown()
            self._orbax.close()

    def save(self, step: int, state: Any, meta: Tree, eval_loss: float | None = None) -> None:
        """Save in the background; first wait for the save before. A step that is saved already is left as it is.

        The caller may donate or delete the arrays as soon as this returns.

        Args:
            step: number of updates done.
            state: nested dict of arrays (a PRNG key as its key data); a named tuple is written as a dict.
            meta: what else a resume needs, as JSON values.
            eval_loss: validation loss at this step, for `keep_best`; None when it was not measured.

        Raises:
            OSError: the disk is full (of this save or the one before). Earlier steps are intact.
        """
        self.wait()
        if step in _complete_steps(self.folder):
            return
        size = _num_bytes(state)
        saving = self.folder / f"{step}{SAVING}"
        try:
            with jax.transfer_guard("allow"):  # orbax copies to the host implicitly, which a guarded loop forbids
                self._orbax.save(saving / "state", args=ocp.args.StandardSave(state, _pieces(state)))
        except Exception as error:
            raise self._explain(error, step, size) from error
        record = {"step": step, "eval_loss": eval_loss, "jaxdpo": __version__, **meta}
        self._pending = self._pool.submit(self._finish, step, record, size)

    def _finish(self, step: int, record: Tree, size: int) -> None:
        """In the background: wait for orbax, add meta and manifest, give the folder its name, delete old steps."""
        saving, final = self.folder / f"{step}{SAVING}", self.folder / str(step)
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                _write_json(saving / META, record)
                _write_json(saving / MANIFEST, {"sha256": _digests(saving)})
                if final.exists():
                    _move_aside(final, UNKNOWN)
                saving.rename(final)
                self._good.add(step)
                self._delete_old()
        except Exception as error:
            raise self._explain(error, step, size) from error

    def _delete_old(self) -> None:
        steps = _complete_steps(self.folder)
        losses = {step: self.read_meta(step)["eval_loss"] for step in steps}
        scored = [step for step in steps if losses[step] is not None and math.isfinite(losses[step])]
        best = sorted(scored, key=lambda step: (losses[step], step))[: self._keep_best]
        for step in set(steps[: -self._keep]) - set(best):
            doomed = self.folder / f"{step}{DELETING}"
            (self.folder / str(step)).rename(doomed)
            shutil.rmtree(doomed)

    def _explain(self, error: Exception, step: int, size: int) -> Exception:
        """Free the space of a failed save; say what is wrong where that is known to be a full disk."""
        shutil.rmtree(self.folder / f"{step}{SAVING}", ignore_errors=True)
        full = "RESOURCE_EXHAUSTED" in str(error) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        if not full:
            return error
        return OSError(
            errno.ENOSPC,
            f"the disk is full: the checkpoint of step {step} takes up to {size:,} bytes "
            f"and {shutil.disk_usage(self.folder).free:,} are free. "
            "Free some space or lower checkpoint.keep; earlier checkpoints are intact, so the same command resumes from them",
            str(self.folder),
        )

    def wait(self) -> None:
        """Wait until the save in progress is complete on disk.

        Raises:
            OSError: the disk is full. Earlier steps are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest_step(self) -> int | None:
        """Newest step that is complete and undamaged; None when there is none.

        Checks the files of each step against its manifest, newest first. A damaged step is renamed `<step>.damaged`
        (never deleted) and told in `notes`.
        """
        self.wait()
        for step in reversed(_complete_steps(self.folder)):
            folder = self.folder / str(step)
            damage = None if step in self._good else find_damage(folder)
            if damage is None:
                self._good.add(step)
                return step
            if jax.process_index() == 0:
                aside = _move_aside(folder, DAMAGED)
                self.notes.append(f"checkpoint {folder} is damaged ({damage}): renamed to {aside.name}, going back to the step before")
        return None

    def read_meta(self, step: int) -> Tree:
        """The JSON values saved with a step: those given to `save`, and step, eval_loss, jaxdpo (version)."""
        return json.loads((self.folder / str(step) / META).read_text())

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
        return ocp.SaveArgs(chunk_byte_size=PIECE_BYTES, shard_axes=(0,) if "layers" in names else ())

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
    spec = {"driver": "zarr", "kvstore": arrays, "fill_missing_data_reads": False}  # else what is missing would read as zeros
    return ts.open(spec, read=True).result()


def _usable(run_dir: str | Path, step: int | None) -> tuple[int, Path, Tree]:
    """Step, folder and meta of the checkpoint asked for, or of the newest that is undamaged."""
    folder = Path(run_dir).expanduser().resolve() / "checkpoints"
    steps = _complete_steps(folder)
    if step is not None and step not in steps:
        raise ValueError(f"step={step}: there is no such checkpoint in {folder}. Choose from {steps}")
    reasons = []
    for candidate in [step] if step is not None else reversed(steps):
        damage = find_damage(folder / str(candidate))
        if damage is None:
            return candidate, folder / str(candidate), json.loads((folder / str(candidate) / META).read_text())
        reasons.append(f"step {candidate} is damaged ({damage})")
    raise ValueError(f"run_dir={run_dir}: no usable checkpoint in {folder}: {'; '.join(reasons) or 'none was saved'}")


def _read_params(folder: Path) -> Tree:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = {"params": _saved_form(reader, folder)["params"]}
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return reader.restore(folder / "state", args=ocp.args.PyTreeRestore(saved, to_numpy, partial_restore=True))["params"]


def _saved_form(reader: ocp.Checkpointer, folder: Path) -> Tree:
    """Shapes and types of the saved state, without its values."""
    metadata = reader.metadata(folder / "state").item_metadata
    assert metadata is not None, f"{folder} was saved without metadata"
    return metadata.tree


def _check_same_form(folder: Path, saved: Tree, wanted: Any) -> None:
    def form(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype).name}{list(x.shape)}" for path, x in leaves}

    old, new = form(saved), form(wanted)
    wrong = [
        f"  {path}: saved {old.get(path, 'not at all')}, wanted {new.get(path, 'not at all')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]
    if wrong:
        raise ValueError(f"checkpoint {folder}: holds another state than this run needs. Use another run_dir.\n" + "\n".join(wrong))


def find_damage(folder: Path) -> str | None:
    """Compare the files of a saved step with its manifest: None when all are as written, else what is wrong."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} is not as it was written"
    return None


def _complete_steps(folder: Path) -> list[int]:
    """Steps with a manifest, oldest first; other folders, whatever their names, are no checkpoints."""
    return sorted(int(path.parent.name) for path in folder.glob(f"*/{MANIFEST}") if path.parent.name.isdecimal())


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: Tree) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _move_aside(folder: Path, suffix: str) -> Path:
    targets = (folder.with_name(f"{folder.name}{suffix}" + (f"-{number}" if number > 1 else "")) for number in itertools.count(1))
    return folder.rename(next(target for target in targets if not target.exists()))


def _make_writable(folder: Path, run_dir: str | Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"run_dir={run_dir}: cannot write to {folder} ({error.strerror}). Choose a folder that this user may write to"
        ) from error


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
