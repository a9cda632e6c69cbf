"""Checkpoints: everything an exact resume needs, complete or absent, verified before it is used.

layout.py describes the files. Orbax does not checksum array data; the manifest does.

Several processes save and restore one step together: each writes its own shards, the first one
does the rest and decides, for all, which step is the newest intact one.
"""

import concurrent.futures
import errno
import math
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdpo import __version__
from jaxdpo.checkpoints import arrays
from jaxdpo.checkpoints.layout import META, complete_steps, note_loss, read_meta, saved_losses
from jaxdpo.distributed import processes
from jaxdpo.utils.files import make_writable, sync_folder, write_json
from jaxdpo.utils.manifest import MANIFEST, find_damage, rename_aside, seal

SAVING, DELETING = ".saving", ".deleting"
"""Suffixes of folders that an interrupted run leaves; removed at the next start."""
DAMAGED, UNKNOWN = ".damaged", ".unknown"
"""Suffixes of quarantined folders, which are never deleted."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

PROOF_SIZE = 256
"""Numbers that each device contributes to the small state that is tried before the first step."""


class Checkpoints:
    """The checkpoints of one run: saves in the background, restores the newest intact step.

    Keeps the `keep` newest steps and also the `keep_best` with the lowest validation loss. A
    context manager: leaving it waits for the save in progress. Of several processes each calls
    every method at the same point of the run.

    Attributes:
        notes: what was found wrong with checkpoints on disk and done about it, a sentence each;
            the caller logs and clears them.
    """

    def __init__(self, run_dir: str | Path, keep: int = 2, keep_best: int = 1):
        """Open, or create, `<run_dir>/checkpoints` and remove what an interrupted save left there.

        Raises:
            ValueError: the folder cannot be written to, or is not the same for all processes.
        """
        self.folder = Path(run_dir).expanduser().resolve() / "checkpoints"
        self.notes: list[str] = []
        self._keep, self._keep_best = keep, keep_best
        self._intact: set[int] = set()
        """Steps that were verified already."""
        self._losses: dict[int, float] | None = None
        self._pending: concurrent.futures.Future[None] | None = None
        processes.on_first(lambda: self._open(run_dir))
        _check_shared(self.folder, run_dir)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saver = arrays.background_saver()

    def _open(self, run_dir: str | Path) -> None:
        make_writable(self.folder, run_dir)
        for leftover in [*self.folder.glob(f"*{SAVING}"), *self.folder.glob(f"*{DELETING}")]:
            shutil.rmtree(leftover)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and jax.process_count() > 1:
            # A save in progress may wait for processes that are gone; this one is about to end.
            return
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"Also, the last save failed: {failure}")
        finally:
            self._pool.shutdown()
            self._saver.close()

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        eval_loss: float | None = None,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Save in the background, after the save before; a step that is saved already stays.

        The caller may donate or delete the arrays as soon as this returns.

        Args:
            step: number of updates done.
            state: nested dict of arrays (a PRNG key as its key data); a named tuple is saved as a
                dict.
            meta: what else a resume needs, as JSON values.
            eval_loss: validation loss at this step, for `keep_best`; None: it was not measured.
            then: called, from another thread of the first process, when the step is on disk.

        Raises:
            OSError: the disk is full (in this save or the one before). Earlier steps are intact.
        """
        self.wait()
        if processes.from_first(step in complete_steps(self.folder)):
            if then is not None:
                then()
            return
        size = arrays.num_bytes(state)
        try:
            arrays.save_state(self._saver, self.folder / f"{step}{SAVING}", state)
        except Exception as error:
            raise self._explain(error, step, size) from error
        if eval_loss is not None:
            self._known_losses()[step] = eval_loss
        record = {"step": step, "eval_loss": eval_loss, "jaxdpo": __version__, **meta}
        shapes = arrays.shapes_of(state)
        self._pending = self._pool.submit(self._finish, step, record, shapes, size, then)

    def _finish(
        self,
        step: int,
        record: dict[str, Any],
        shapes: dict[str, str],
        size: int,
        then: Callable[[], object] | None,
    ) -> None:
        """In the background: wait for orbax, prove that it restores, add meta and manifest, rename,
        delete old steps."""
        saving, final = self.folder / f"{step}{SAVING}", self.folder / str(step)
        try:
            self._saver.wait_until_finished()
            if processes.is_first():
                arrays.check_saved(saving, shapes)
                write_json(saving / META, record)
                seal(saving)
                if final.exists():
                    rename_aside(final, UNKNOWN)
                saving.rename(final)
                sync_folder(self.folder)
                self._intact.add(step)
                self._delete_old()
                if then is not None:
                    then()
        except Exception as error:
            raise self._explain(error, step, size) from error

    def is_best(self, eval_loss: float) -> bool:
        """Whether a validation loss is among the `keep_best` lowest of those that are saved: its
        step is to be saved, too."""
        lower = [loss for loss in self._known_losses().values() if loss <= eval_loss]
        return math.isfinite(eval_loss) and len(lower) < self._keep_best

    def measured(self, step: int, eval_loss: float) -> None:
        """Note the validation loss of a step that was saved before it was known."""
        if step in self._known_losses() or not math.isfinite(eval_loss):
            return
        self._known_losses()[step] = eval_loss
        if processes.is_first():
            note_loss(self.folder, step, eval_loss)

    def _known_losses(self) -> dict[int, float]:
        """Validation losses of the saved steps, and of the one that is being saved."""
        if self._losses is None:
            found = saved_losses(self.folder) if processes.is_first() else {}
            self._losses = dict(processes.from_first(list(found.items())))
        return self._losses

    def prove(self) -> None:
        """Save a small state here, as a checkpoint is saved, and restore it: before a run has
        something to lose.

        Raises:
            ValueError: it does not come back as it was saved.
        """
        everywhere = Mesh(np.asarray(jax.devices()), ("device",))
        # Each device of each process has a part of it, so all of them write and read.
        spread = NamedSharding(everywhere, PartitionSpec("device"))
        values = np.arange(everywhere.size * PROOF_SIZE, dtype=np.float32)
        with jax.transfer_guard("allow"):
            array = jax.make_array_from_callback(values.shape, spread, lambda part: values[part])
        state = {"params": {"proof": array}}
        saving, final = self.folder / f"proof{SAVING}", self.folder / f"proof{DELETING}"

        def save() -> None:
            arrays.save_state(self._saver, saving, state)
            self._saver.wait_until_finished()

        def finish() -> None:
            if processes.is_first():
                arrays.check_saved(saving, arrays.shapes_of(state))
                seal(saving)
                saving.rename(final)
                damage = find_damage(final, from_disk=True)
                if damage is not None:
                    raise ValueError(damage)

        def restore() -> None:
            wanted = {
                "params": {"proof": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=spread)}
            }
            found = arrays.restore_state(self._saver, final, wanted)["params"]["proof"]
            for part in found.addressable_shards:
                if np.asarray(part.data).tobytes() != values[part.index].tobytes():
                    raise ValueError("its values are others")

        for part in (save, finish, restore):
            self._try(part)
        if processes.is_first():
            shutil.rmtree(final)

    def _try(self, part: Callable[[], None]) -> None:
        """A part of the proof, on all processes; its failure is that of all.

        Raises:
            ValueError: it failed, here or on another process.
        """
        problem = None
        try:
            part()
        except Exception as error:  # of any library below: whatever it is, the folder is no good
            problem = error
        if not processes.any_of(problem is not None):
            return
        reason = "on another process, which says why" if problem is None else str(problem)
        raise ValueError(
            f"checkpoints cannot be saved and restored in {self.folder}: a small one that was "
            f"tried failed ({reason}). Use another run_dir; nothing was trained"
        ) from problem

    def _delete_old(self) -> None:
        """Delete what `keep` and `keep_best` do not ask for, if one of the kept steps is intact.

        That is read from the disk itself, not from the cache of the operating system.
        """
        steps = complete_steps(self.folder)
        losses = saved_losses(self.folder)
        best = sorted(losses, key=lambda step: (losses[step], step))[: self._keep_best]
        kept = {*steps[-self._keep :], *best}
        old = [step for step in steps if step not in kept]
        if not old:
            return
        newest_first = [self.folder / str(step) for step in sorted(kept, reverse=True)]
        if all(find_damage(folder, from_disk=True) for folder in newest_first):
            self._intact.clear()
            self.notes.append(
                f"no checkpoint that is to be kept in {self.folder} is undamaged, "
                "so older ones are not deleted"
            )
            return
        for step in old:
            # Renamed first: a deletion that is cut off must not leave half a checkpoint.
            doomed = self.folder / f"{step}{DELETING}"
            (self.folder / str(step)).rename(doomed)
            shutil.rmtree(doomed)

    def _explain(self, error: Exception, step: int, size: int) -> Exception:
        """Free the space of a failed save; name the cause where it is a full disk."""
        if processes.is_first():
            shutil.rmtree(self.folder / f"{step}{SAVING}", ignore_errors=True)
        # tensorstore raises a ValueError with this text, Python an OSError with a number.
        full = "RESOURCE_EXHAUSTED" in str(error)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            full = True
        if not full:
            return error
        newest = max(complete_steps(self.folder), default=None)
        if newest is None:
            earlier = "there is no earlier one"
        else:
            earlier = f"that of step {newest} is intact, and the same command resumes from it"
        free = shutil.disk_usage(self.folder).free
        return OSError(
            errno.ENOSPC,
            f"the disk is full: the checkpoint of step {step} takes up to {size:,} bytes and "
            f"{free:,} are free. Free some space or lower checkpoint.keep; {earlier}",
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
                "the last save failed on another process, which says why. "
                "Earlier checkpoints are intact"
            )

    def latest_step(self) -> int | None:
        """Newest step that is complete and undamaged; None when there is none.

        Verifies the files of each step against its manifest, newest first. A damaged step is
        quarantined as `<step>.damaged` (never deleted), with a sentence in `notes`.
        """
        self.wait()
        return processes.from_first(self._newest_intact() if processes.is_first() else None)

    def _newest_intact(self) -> int | None:
        for step in reversed(complete_steps(self.folder)):
            folder = self.folder / str(step)
            damage = None if step in self._intact else find_damage(folder)
            if damage is None:
                self._intact.add(step)
                return step
            quarantine = rename_aside(folder, DAMAGED)
            self.notes.append(
                f"checkpoint {folder} is damaged ({damage}): quarantined as {quarantine.name}, "
                "going back to the step before"
            )
        return None

    def count(self) -> int:
        """How many checkpoints there are, as this process sees it."""
        return len(complete_steps(self.folder))

    def incomplete(self) -> list[str]:
        """Folders that are named like a step and are no checkpoint, as sentences."""
        sentences = []
        for path in sorted(self.folder.iterdir()):
            if path.name.isdecimal() and not (path / MANIFEST).exists():
                sentences.append(
                    f"{path} has no {MANIFEST}: it is not a complete checkpoint and is ignored"
                )
        return sentences

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON values saved with a step: those given to `save`, and step, eval_loss, jaxdpo."""
        return processes.from_first(read_meta(self.folder, step) if processes.is_first() else None)

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restore the newest undamaged step onto this run's devices, to the bits that were saved.

        Args:
            abstract_state: like the saved state, of `jax.ShapeDtypeStruct` with shardings; the mesh
                may differ from the saved one.

        Returns:
            (step, state, meta), or None when there is no checkpoint.

        Raises:
            ValueError: names, shapes or types differ from the saved ones.
        """
        step = self.latest_step()
        if step is None:
            return None
        state = arrays.restore_state(self._saver, self.folder / str(step), abstract_state)
        return step, state, self.read_meta(step)


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
    processes.any_of(False)  # a barrier: nobody looks before the mark is there
    apart = processes.any_of(not mark.exists())
    if processes.is_first():
        mark.unlink()
    if apart:
        raise ValueError(
            f"run_dir={run_dir}: not all {jax.process_count()} processes see the same folder. "
            "Choose one on a disk that all machines share"
        )
