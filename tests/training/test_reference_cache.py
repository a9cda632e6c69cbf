"""reference=cached: log-probs are computed once, stored in parts, verified when read."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdpo.training import reference_cache
from jaxdpo.training.reference_cache import CachedLogps, Interrupted, cached_logps, check_finite

BATCHES = [np.array([4, 0]), np.array([2, 6]), np.array([5])]  # pairs 1 and 3 are never met
IDENTITY = {"weights": "w", "pairs": "p"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches a part."""
    monkeypatch.setattr(reference_cache, "BATCHES_PER_PART", 2)


class Model:
    """Log-probs that identify their pair, and a record of what was computed."""

    def __init__(self) -> None:
        self.computed: list[list[int]] = []

    def __call__(self, places: np.ndarray) -> np.ndarray:
        self.computed.append(places.tolist())
        return np.stack([-places, -10 - places], axis=1).astype(np.float32)


def fill(
    folder: Path, model: Model, said: list[str] | None = None, stop_after: int = 99, **changes: Any
) -> np.ndarray:
    """Asked before each batch whether to stop; so does the `stop_after`th question."""
    asked = itertools.count(1)
    batches: Sequence[np.ndarray] = changes.pop("batches", BATCHES)
    said = [] if said is None else said
    return cached_logps(
        folder,
        "train",
        IDENTITY | changes,
        7,
        batches,
        model,
        log=said.append,
        stopping=lambda: next(asked) >= stop_after,
    )


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("reference_cache/train-*/*.npy"))


def test_reference_log_probs_are_computed_once_and_then_read(tmp_path: Path) -> None:
    first, second = Model(), Model()
    table, again = fill(tmp_path, first), fill(tmp_path, second)
    met = np.concatenate(BATCHES)
    np.testing.assert_array_equal(table[met], np.stack([-met, -10 - met], axis=1))
    assert np.isnan(table[[1, 3]]).all() and table.dtype == np.float32
    assert table.tobytes() == again.tobytes() and len(first.computed) == 3 and second.computed == []
    assert len(parts(tmp_path)) == 2


@pytest.mark.parametrize(
    "change",
    [{"weights": "v"}, {"pairs": "q"}, {"batches": BATCHES[::-1]}, {"batches": BATCHES[:2]}],
    ids=str,
)
def test_everything_that_log_probs_depend_on_changes_the_fingerprint(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    fill(tmp_path, Model())
    other = Model()
    fill(tmp_path, other, **change)
    assert other.computed == [batch.tolist() for batch in change.get("batches", BATCHES)]
    fill(tmp_path, again := Model())
    assert again.computed == []  # the first is still there


def test_an_interrupted_computation_resumes_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fill(tmp_path, Model(), stop_after=3)
    assert len(parts(tmp_path)) == 1
    model, said = Model(), []
    whole = fill(tmp_path, model, said)
    assert model.computed == [[5]] and "1 parts read and verified, 1 computed" in said[-1]
    assert whole.tobytes() == fill(tmp_path / "other", Model()).tobytes()


def test_a_kill_while_a_part_is_written_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path, Model())
    assert parts(tmp_path) == []
    fill(tmp_path, model := Model())
    assert len(model.computed) == 3


@pytest.mark.parametrize("place", [-1, 0, 80])
def test_a_flipped_bit_is_found_and_the_part_computed_again(tmp_path: Path, place: int) -> None:
    wanted = fill(tmp_path, Model())
    data = bytearray(parts(tmp_path)[1].read_bytes())
    data[place] ^= 1
    parts(tmp_path)[1].write_bytes(data)
    model, said = Model(), []
    assert fill(tmp_path, model, said).tobytes() == wanted.tobytes()
    assert (
        model.computed == [[5]]
        and "is damaged: it is computed again" in said[0]
        and len(parts(tmp_path)) == 2
    )


def test_a_batch_finds_the_log_probs_of_its_pairs() -> None:
    index = np.array([[[1, -1], [0, -1]], [[2, -1], [-1, -1]]])
    laid = CachedLogps.laid_out(np.array([[1, 2], [3, 4], [5, 6]], np.float32), index)
    assert laid.dtype == np.float32
    assert laid[..., 0].tolist() == [[[3, 0], [1, 0]], [[5, 0], [0, 0]]] and laid[
        ..., 1
    ].tolist() == [[[4, 0], [2, 0]], [[6, 0], [0, 0]]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_log_probs_that_are_not_finite_are_refused_with_their_pairs(
    value: float, side: int
) -> None:
    logps = np.full((3, 2), -1.0, np.float32)
    check_finite(logps, ["a", "b", "c"])
    logps[1, side] = value
    with pytest.raises(ValueError, match=r"reference=cached: .* of 1 of 3 pairs .*first: b\)"):
        check_finite(logps, ["a", "b", "c"])
