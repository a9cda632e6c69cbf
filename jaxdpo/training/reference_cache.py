"""reference=cached: the reference's log-probs of a run's pairs, precomputed into the run folder.

    <run>/reference_cache/<set>-<fingerprint>/identity.json     what the fingerprint is made of
                                              00003-<digest>.npy part 3 and its own sha256:
                                                                 float32 [pairs, 2], some batches

A part is written as soon as it is computed, so an interrupted computation resumes where it was. A
part whose bytes do not have the digest in its name is computed again. Of several processes the
first one reads and writes, and sends the others what it has read.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdpo.distributed import processes
from jaxdpo.training.preemption import Interrupted
from jaxdpo.utils.files import atomic_write, write_json

BATCHES_PER_PART = 16
"""What an interruption may lose at most: seconds of work, in files of a few kilobytes."""
DIGEST_DIGITS = 32
"""Hexadecimal digits of a sha256 in file names: 128 bits."""


class CachedLogps(NamedTuple):
    """float32 [N, 2] (chosen, rejected), nats, by index of the pair in its table.

    NaN for pairs that the run never trains or evaluates on, and for those only.
    """

    train: np.ndarray
    eval: np.ndarray

    @staticmethod
    def laid_out(logps: np.ndarray, index_MBP: np.ndarray) -> np.ndarray:
        """The log-probs [n, 2] of a step's pairs as its batch packs them: [M, B, P, 2]."""
        return np.where(index_MBP[..., None] >= 0, logps[index_MBP], np.float32(0))


def cached_logps(
    run_dir: Path,
    name: str,
    identity: Mapping[str, str],
    num_pairs: int,
    batches: Sequence[np.ndarray],
    compute: Callable[[np.ndarray], np.ndarray],
    *,
    log: Callable[[str], None],
    stopping: Callable[[], bool],
) -> np.ndarray:
    """Log-probs of a set of pairs: read from disk where intact, else computed and written.

    Args:
        run_dir: the run's folder.
        name: of the set.
        identity: everything that the log-probs depend on, the pairs included.
        num_pairs: pairs of the set.
        batches: indices of the pairs that are computed together.
        compute: indices of a batch's pairs -> float32 [n, 2].
        log: takes lines for the console.
        stopping: whether SIGTERM came; called by all processes before each batch.

    Returns:
        float32 [num_pairs, 2], nats.

    Raises:
        Interrupted: `stopping` said so; complete parts stay on disk.
    """
    folder = run_dir / "reference_cache"
    # Batches too: which pairs are packed together may change the last bits of their log-probs.
    separated = b"".join(np.append(-1, batch).astype(np.int64).tobytes() for batch in batches)
    identity = dict(identity) | {
        "batches a part": str(BATCHES_PER_PART),
        "batches": _digest(separated),
    }
    folder /= f"{name}-{_digest(json.dumps(identity, sort_keys=True).encode())}"

    table = np.full((num_pairs, 2), np.nan, np.float32)
    num_parts = -(-len(batches) // BATCHES_PER_PART)
    num_computed = 0
    for number in range(num_parts):
        part = batches[number * BATCHES_PER_PART : (number + 1) * BATCHES_PER_PART]
        pairs = np.concatenate(part)
        logps = _read(folder, number, len(pairs), log) if processes.is_first() else None
        logps = _from_first(logps, len(pairs))
        if logps is None:
            num_computed += 1
            log(f"reference log-probs of {name}: computing part {number + 1} of {num_parts}")
            logps = _computed(part, compute, stopping)
            if processes.is_first():
                _write(folder, number, logps, identity)
        table[pairs] = logps
    if num_parts:
        log(
            f"reference log-probs of {name}: {num_parts - num_computed} parts read and verified, "
            f"{num_computed} computed; in {folder}"
        )
    return table


def check_finite(logps: np.ndarray, ids: Sequence[str]) -> None:
    """Refuse log-probs that no loss can be computed from.

    Args:
        logps: float32 [n, 2], nats.
        ids: of the pairs.

    Raises:
        ValueError: some are NaN or infinite; with the ids of the first pairs.
    """
    names = []
    for name, values in zip(ids, logps, strict=True):
        if not np.isfinite(values).all():
            names.append(name)
    if names:
        raise ValueError(
            f"reference=cached: the reference's log-probs of {len(names)} of {len(logps)} pairs "
            f"are NaN or infinite (first: {', '.join(names[:3])}). Likely causes: weights in "
            "model.path that hold NaN, or that overflow in model.compute_dtype (try float32)"
        )


def _from_first(logps: np.ndarray | None, count: int) -> np.ndarray | None:
    """What the first process has read, on all processes."""
    if not processes.from_first(logps is not None):
        return None
    return processes.array_from_first(np.empty((count, 2), np.float32) if logps is None else logps)


def _computed(
    part: Sequence[np.ndarray],
    compute: Callable[[np.ndarray], np.ndarray],
    stopping: Callable[[], bool],
) -> np.ndarray:
    """The log-probs of a part's batches, float32 [pairs, 2]."""
    logps = []
    for batch in part:
        if stopping():
            raise Interrupted
        logps.append(compute(batch))
    return np.concatenate(logps)


def _read(folder: Path, number: int, count: int, log: Callable[[str], None]) -> np.ndarray | None:
    """A part if an intact file holds it; damaged files of it are deleted."""
    for path in sorted(folder.glob(f"{number:05d}-*.npy")):
        data = path.read_bytes()
        if path.stem == _stem(number, data):
            logps = np.load(io.BytesIO(data), allow_pickle=False)
            assert logps.shape == (count, 2) and logps.dtype == np.float32, (
                f"{path}: {logps.shape}, {logps.dtype}"
            )
            return logps
        log(f"{path} is damaged: it is computed again")
        path.unlink()
    return None


def _write(folder: Path, number: int, logps: np.ndarray, identity: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "identity.json", identity, durable=False)
    buffer = io.BytesIO()
    np.save(buffer, logps, allow_pickle=False)
    path = folder / f"{_stem(number, buffer.getvalue())}.npy"
    with atomic_write(path, "wb", durable=True) as file:
        file.write(buffer.getvalue())


def _stem(number: int, data: bytes) -> str:
    """Name of the file of a part, without its suffix."""
    return f"{number:05d}-{_digest(data)}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]
