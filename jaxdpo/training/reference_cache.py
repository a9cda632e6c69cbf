"""reference=cached: the reference's log-probs of a run's pairs, computed once and kept in the run folder.

    <run>/reference_cache/<set>-<fingerprint>/identity.json       what the fingerprint is made of
                                              00003-<digest>.npy   float32 [pairs, 2] of some batches, and its own sha256

A part is written as soon as it is computed, so an interrupted computation goes on where it was. A part whose bytes do not have the digest
of its name is computed again. Of several processes the first one reads and writes, and the others get from it what it has read.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdpo.distributed import processes
from jaxdpo.training.preemption import Interrupted

BATCHES_PER_PART = 16
_DIGITS = 32


class CachedLogps(NamedTuple):
    """float32 [N, 2] (chosen, rejected) by place in the table of pairs; NaN for pairs that the run never meets."""

    train: np.ndarray
    eval: np.ndarray

    @staticmethod
    def laid_out(logps: np.ndarray, index_MBP: np.ndarray) -> np.ndarray:
        """The log-probs of a step's pairs [n, 2], where its batch has them: [M, B, P, 2], 0 in empty places."""
        return np.where(index_MBP[..., None] >= 0, logps[index_MBP], np.float32(0))


def cached_logps(
    run_dir: Path,
    name: str,
    identity: Mapping[str, str],
    num_pairs: int,
    batches: Sequence[np.ndarray],
    compute: Callable[[np.ndarray], np.ndarray],
    *,
    tell: Callable[[str], None],
    stopping: Callable[[], bool],
) -> np.ndarray:
    """Log-probs of a set of pairs: what is on disk and intact, and the rest computed.

    Args:
        run_dir: the run's folder.
        name: of the set.
        identity: all that the log-probs depend on, the pairs among it.
        num_pairs: pairs of the set.
        batches: places of the pairs that are computed together.
        compute: places of a batch's pairs -> float32 [n, 2].
        tell: takes what happens.
        stopping: asked by all processes before each batch.

    Returns:
        float32 [num_pairs, 2].

    Raises:
        Interrupted: `stopping` said so; the parts that are complete are kept.
    """
    identity = dict(identity) | {"batches a part": str(BATCHES_PER_PART)}
    identity |= {
        "batches": _digest(
            b"".join(np.append(-1, batch).astype(np.int64).tobytes() for batch in batches)
        )
    }
    folder = (
        run_dir
        / "reference_cache"
        / f"{name}-{_digest(json.dumps(identity, sort_keys=True).encode())}"
    )
    table = np.full((num_pairs, 2), np.nan, np.float32)
    parts = [
        batches[first : first + BATCHES_PER_PART]
        for first in range(0, len(batches), BATCHES_PER_PART)
    ]
    missing = 0
    for number, part in enumerate(parts):
        places = np.concatenate(part)
        logps = _shared(
            _read(folder, number, len(places), tell) if processes.is_first() else None, len(places)
        )
        if logps is None:
            missing += 1
            tell(f"reference log-probs of {name}: computing part {number + 1} of {len(parts)}")
            logps = _computed(part, compute, stopping)
            if processes.is_first():
                _write(folder, number, logps, identity)
        table[places] = logps
    if parts:
        tell(
            f"reference log-probs of {name}: {len(parts) - missing} parts read and verified, {missing} computed; in {folder}"
        )
    return table


def _shared(logps: np.ndarray | None, count: int) -> np.ndarray | None:
    """What the first process has read, for all."""
    if not processes.from_first(logps is not None):
        return None
    return processes.array_from_first(np.empty((count, 2), np.float32) if logps is None else logps)


def _computed(
    part: Sequence[np.ndarray],
    compute: Callable[[np.ndarray], np.ndarray],
    stopping: Callable[[], bool],
) -> np.ndarray:
    found = []
    for batch in part:
        if stopping():
            raise Interrupted
        found.append(compute(batch))
    return np.concatenate(found)


def _read(folder: Path, number: int, count: int, tell: Callable[[str], None]) -> np.ndarray | None:
    """A part that is intact; None, and those that are not removed, when there is none."""
    for path in sorted(folder.glob(f"{number:05d}-*.npy")):
        data = path.read_bytes()
        if path.stem == _stem(number, data):
            logps = np.load(io.BytesIO(data), allow_pickle=False)
            assert logps.shape == (count, 2) and logps.dtype == np.float32, (
                f"{path}: {logps.shape}, {logps.dtype}"
            )
            return logps
        tell(f"{path} is damaged: it is computed again")
        path.unlink()
    return None


def _write(folder: Path, number: int, logps: np.ndarray, identity: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "identity.json").write_text(json.dumps(identity, indent=1), encoding="utf-8")
    buffer = io.BytesIO()
    np.save(buffer, logps, allow_pickle=False)
    draft = folder / f".{number:05d}.writing"
    with draft.open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    draft.rename(folder / f"{_stem(number, buffer.getvalue())}.npy")


def _stem(number: int, data: bytes) -> str:
    return f"{number:05d}-{_digest(data)}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
