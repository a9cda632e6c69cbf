"""A checkpoint is proved by reading it back: before the first step, before it is sealed, and before
older ones are deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxdpo.checkpoints import arrays, checkpoint
from jaxdpo.checkpoints.checkpoint import Checkpoints
from tests.checkpoints.states import (
    abstract,
    assert_same_bits,
    flip_a_bit,
    folders,
    largest_file,
    make_state,
    save_steps,
)


def remove(pattern: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        found = list(state.glob(pattern))
        assert found, pattern
        for path in found:
            path.unlink()

    return damage


def of_another_state(state: Path) -> None:
    with Checkpoints(state.parents[2] / "another") as checkpoints:
        checkpoints.save(1, {"params": make_state()["params"]}, {})
    shutil.rmtree(state)
    shutil.copytree(state.parents[2] / "another/checkpoints/1/state", state)


DAMAGES = {
    "no index": remove("manifest.ocdbt"),
    "no data": remove("d/*"),
    "no names": remove("_METADATA"),
    "truncated index": lambda state: (state / "manifest.ocdbt").write_bytes(b"\x0c"),
    "another state": of_another_state,
}


@pytest.mark.parametrize(
    "damage",
    [
        "no index",
        "no data",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(DAMAGES)[2:]),
    ],
)
def test_the_manifest_is_sealed_only_over_what_restores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """As when a file system loses what orbax wrote."""
    save_steps(tmp_path, {1: None})
    check_saved = arrays.check_saved

    def damaged(folder: Path, shapes: dict[str, str]) -> None:
        monkeypatch.setattr(arrays, "check_saved", check_saved)
        DAMAGES[damage](folder / "state")
        check_saved(folder, shapes)

    monkeypatch.setattr(arrays, "check_saved", damaged)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(2), {})
        with pytest.raises(OSError, match="was written, but cannot be read back"):
            checkpoints.wait()
        assert checkpoints.latest_step() == 1
    assert folders(tmp_path) == {"1"}


def test_a_missing_piece_of_an_array_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", 128)
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    folder = tmp_path / "checkpoints/1"
    arrays.check_saved(folder, arrays.shapes_of(state))
    (store,) = arrays._open_all(folder, ["params.embed"])
    monkeypatch.setattr(arrays, "_open_all", lambda *_: [Short(store)] * 8)
    with pytest.raises(OSError, match=r"has 3 of its 4 pieces"):
        arrays.check_saved(folder, arrays.shapes_of(state))


class Short:
    """An array one of whose pieces is not there."""

    def __init__(self, store: Any):
        self.chunk_layout, self.shape, self.dtype = store.chunk_layout, store.shape, store.dtype
        self.kvstore = self
        self._keys = store.kvstore.list().result()

    def list(self) -> "Short":
        return self

    def result(self) -> Any:
        return self._keys[:-1]


def test_a_path_with_brackets_is_found_out_before_the_first_step_and_by_every_save(
    tmp_path: Path,
) -> None:
    """RunLock refuses such paths; this is what would be found without it."""
    with Checkpoints(tmp_path / "exp[1]") as checkpoints:
        with pytest.raises(ValueError, match="nothing was trained"):
            checkpoints.prove()
        checkpoints.save(1, make_state(), {})
        with pytest.raises(OSError, match="cannot be read back"):
            checkpoints.wait()
        assert checkpoints.latest_step() is None
    with Checkpoints(tmp_path / "exp[1]"):  # which removes what the proof left
        assert folders(tmp_path / "exp[1]") == set()


@pytest.mark.parametrize(
    "name",
    [
        "a b, {1} 50% #2]",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("x(1)", "y=1", "ä", "~", "a&b")),
    ],
)
def test_other_characters_of_a_path_are_nothing_special(tmp_path: Path, name: str) -> None:
    state = make_state(3)
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.prove()
        checkpoints.save(3, state, {})
        found = checkpoints.restore(abstract(state))
    assert found is not None
    assert_same_bits(state, found[1])
    assert folders(tmp_path / name) == {"3"}


def test_the_proof_notices_values_that_come_back_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = arrays.restore_state

    def changed(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.at[-1].add(1), restore(*arguments))

    monkeypatch.setattr(arrays, "restore_state", changed)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="its values are others"),
    ):
        checkpoints.prove()


@pytest.mark.parametrize("keep_best", [0, 1])
def test_older_checkpoints_go_only_after_one_that_stays_was_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_best: int
) -> None:
    def damaged_once_written(folder: Path) -> None:
        if (folder / "2").exists():
            flip_a_bit(largest_file(folder / "2" / "state"))

    with Checkpoints(tmp_path, keep=1, keep_best=keep_best) as checkpoints:
        checkpoints.save(1, make_state(1), {}, eval_loss=2.0)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "sync_folder", damaged_once_written)
            checkpoints.save(2, make_state(2), {}, eval_loss=1.0)
            checkpoints.wait()
        assert folders(tmp_path) == {"1", "2"}
        assert "no checkpoint that is to be kept in" in checkpoints.notes.pop()
        found = checkpoints.restore(abstract(make_state(1)))
        assert found is not None and found[0] == 1
        checkpoints.save(3, make_state(3), {}, eval_loss=0.5)
        checkpoints.wait()
    assert folders(tmp_path) == {"2.damaged", "3"}
