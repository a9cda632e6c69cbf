import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxdpo.checkpoints import checkpoint
from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.utils.manifest import find_damage
from tests.checkpoints.states import (
    P,
    abstract,
    assert_same_bits,
    flip_a_bit,
    folders,
    largest_file,
    make_state,
    mesh_of,
    save_steps,
)

ROOT = Path(__file__).parents[2]


def test_a_restored_checkpoint_has_the_same_bits_types_and_meta(tmp_path: Path) -> None:
    state, meta = (
        make_state(3),
        {"config": {"optim": {"b1": 0.9}}, "counters": 48, "rate": 0.1 + 0.2},
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, meta, eval_loss=0.5)
        found = checkpoints.restore(abstract(state))
    assert found is not None
    step, restored, restored_meta = found
    assert step == 3
    assert_same_bits(state, restored)
    assert restored_meta == {"step": 3, "eval_loss": 0.5, "jaxdpo": checkpoint.__version__, **meta}


@pytest.mark.gpu  # on CPU nothing is copied, so the guard has nothing to forbid
def test_saves_inside_a_loop_that_forbids_implicit_transfers(tmp_path: Path) -> None:
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints, jax.transfer_guard("disallow_explicit"):
        checkpoints.save(1, state, {})
    assert_same_bits(state["params"], restore_params(tmp_path)[1])


def test_an_empty_folder_restores_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(abstract(make_state())) is None


@pytest.mark.parametrize("to", [(8,), (2, 4), (1,)])
def test_restores_onto_another_mesh(tmp_path: Path, to: tuple[int, ...]) -> None:
    state = make_state()
    first = jax.NamedSharding(mesh_of(4, 2), P("x", "y"))
    state["params"]["embed"] = jax.device_put(state["params"]["embed"], first)
    wanted = abstract(state, jax.NamedSharding(mesh_of(*to), P()))
    spread = jax.NamedSharding(mesh_of(*to), P(*("x", "y")[: len(to)]))
    wanted["params"]["embed"] = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=spread)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        found = checkpoints.restore(wanted)
    assert found is not None
    assert_same_bits(state, found[1])
    assert found[1]["params"]["embed"].sharding == spread


def test_donating_the_state_right_after_save_does_not_change_what_is_saved(tmp_path: Path) -> None:
    update = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
    state = {"params": {"w": jnp.arange(4_000_000, dtype=jnp.int32)}}
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in range(4):
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = update(state)
    for step in range(4):
        saved = restore_params(tmp_path, step)[1]["w"]
        np.testing.assert_array_equal(saved, np.arange(4_000_000, dtype=np.int32) + 3 * step)


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    save_steps(
        tmp_path, {1: 0.9, 2: 0.3, 3: 0.5, 4: None, 5: float("nan"), 6: 0.8}, keep=2, keep_best=2
    )
    assert folders(tmp_path) == {"2", "3", "5", "6"}


def test_keeps_the_newest_alone_when_no_best_is_wanted(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: 0.1, 2: 0.3, 3: 0.5}, keep=1, keep_best=0)
    assert folders(tmp_path) == {"3"}


def test_saving_a_saved_step_again_changes_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: 0.1})
    before = (tmp_path / "checkpoints/1/manifest.json").read_bytes()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(99), {})
    assert (tmp_path / "checkpoints/1/manifest.json").read_bytes() == before


def test_folders_that_are_no_checkpoints_are_quarantined_or_ignored_and_never_deleted(
    tmp_path: Path,
) -> None:
    save_steps(tmp_path, {2: None})
    for name in ("300", "-1", "notes", "3"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints/3/mine.txt").write_text("precious")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 2
        checkpoints.save(3, make_state(3), {})
        checkpoints.wait()
        assert checkpoints.latest_step() == 3
    assert folders(tmp_path) == {"3", "3.unknown", "300", "-1", "notes"}
    assert (tmp_path / "checkpoints/3.unknown/mine.txt").read_text() == "precious"


def test_what_an_interrupted_save_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None})
    (tmp_path / "checkpoints/2.saving/state.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "checkpoints/0.deleting").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
    assert folders(tmp_path) == {"1"}


def test_a_flipped_bit_quarantines_a_checkpoint_and_the_step_before_is_restored(
    tmp_path: Path,
) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    flip_a_bit(largest_file(tmp_path / "checkpoints/2/state"))
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(abstract(make_state()))
        assert found is not None and found[0] == 1
        assert_same_bits(found[1], make_state(1))
        assert len(checkpoints.notes) == 1
        assert (
            "is not as it was written" in checkpoints.notes[0]
            and "2.damaged" in checkpoints.notes[0]
        )
    assert folders(tmp_path) == {"1", "2.damaged"}


def test_every_file_of_a_checkpoint_is_guarded(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None})
    folder = tmp_path / "checkpoints/1"
    assert find_damage(folder) is None
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0]
    assert len(files) > 5
    for path in files:
        good = path.read_bytes()
        flip_a_bit(path)
        assert find_damage(folder) is not None, path
        path.unlink()
        assert find_damage(folder) is not None, path
        path.write_bytes(good)
    assert find_damage(folder) is None


def test_two_damaged_checkpoints_of_one_step_are_both_quarantined(tmp_path: Path) -> None:
    for _ in range(2):
        save_steps(tmp_path, {2: None})
        flip_a_bit(largest_file(tmp_path / "checkpoints/2/state"))
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step() is None
    assert folders(tmp_path) == {"2.damaged", "2.damaged-2"}


def test_a_checkpoint_of_another_state_is_refused_with_the_names_that_differ(
    tmp_path: Path,
) -> None:
    save_steps(tmp_path, {1: None})
    wanted = abstract(make_state())
    wanted["params"]["embed"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
    wanted["params"]["layers"]["scale"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    wanted["reference"] = wanted.pop("key")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(wanted)
    text = str(error.value)
    assert "params/embed: saved float32[16, 8], wanted float32[16, 9]" in text
    assert "params/layers/scale: saved bfloat16[8], wanted float32[8]" in text
    assert "key: saved uint32[2], wanted not at all" in text
    assert "opt/" not in text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir=.*file.*cannot write to .*Choose a folder"):
        Checkpoints(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: No space left"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_says_folder_and_bytes_and_leaves_earlier_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(folder: Path) -> None:
        raise error

    save_steps(tmp_path, {1: None})
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoint, "seal", full)
        checkpoints.save(2, make_state(2), {})
        with pytest.raises(
            OSError, match=r"disk is full.*step 2 takes up to 2,\d\d\d bytes.*checkpoint.keep"
        ) as raised:
            checkpoints.wait()
        assert raised.value.filename == str(checkpoints.folder)
        assert checkpoints.latest_step() == 1
    assert folders(tmp_path) == {"1"}


def test_a_failed_save_is_raised_when_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("a broken disk")

    monkeypatch.setattr(checkpoint, "seal", fail)
    with pytest.raises(RuntimeError, match="a broken disk"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
    with pytest.raises(KeyError) as error, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
        raise KeyError("the run's own error")
    assert "a broken disk" in error.value.__notes__[0]


KILLED = """
import sys
import jax.numpy as jnp
from jaxdpo.checkpoints.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2, keep_best=0) as checkpoints:
    first = (checkpoints.latest_step() or 0) + 1
    print(first, flush=True)
    for step in range(first, 10_000):
        params = {"w": jnp.full((300, 1000), step, jnp.int32)}
        checkpoints.save(step, {"params": params}, {"number": step})
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_an_undamaged_newest_checkpoint(tmp_path: Path) -> None:
    rng, reached = np.random.default_rng(0), 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        assert int(process.stdout.readline()) == reached + 1
        time.sleep(rng.uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached, params, meta = restore_params(tmp_path)
        assert meta["number"] == reached
        assert (params["w"] == reached).all()
        assert not [name for name in folders(tmp_path) if name.endswith((".damaged", ".unknown"))]
    assert reached > 8


def test_the_snippet_of_the_docs_restores_with_plain_orbax(tmp_path: Path) -> None:
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/checkpoints.md").read_text(), re.DOTALL
    )
    assert len(snippets) == 1
    assert "jaxdpo" not in snippets[0]
    statements = [
        line
        for line in snippets[0].splitlines()
        if line and not line.startswith(("import", "from"))
    ]
    assert len(statements) <= 10
    save_steps(tmp_path / "runs/dpo", {100: 0.5})
    check = "\nassert str(state['params']['layers']['scale'].dtype) == 'bfloat16'"
    check += "\nnp.save('embed.npy', state['params']['embed'])"
    check += "\nPath('meta.json').write_text(json.dumps(meta))"
    subprocess.run(
        [sys.executable, "-c", snippets[0] + check],
        cwd=tmp_path,
        check=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )
    np.testing.assert_array_equal(
        np.load(tmp_path / "embed.npy"), make_state(100)["params"]["embed"]
    )
    assert json.loads((tmp_path / "meta.json").read_text())["config"] == {"seed": 100}


class Named(NamedTuple):
    params: dict
    step: jax.Array


def test_a_named_tuple_is_saved_as_its_dict_and_comes_back(tmp_path: Path) -> None:
    state = Named({"w": jnp.ones(3)}, jnp.int32(4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, {})
        found = checkpoints.restore(abstract(state))
    assert found is not None and isinstance(found[1], Named)
    assert restore_params(tmp_path)[1].keys() == {"w"}
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(tmp_path / "checkpoints/4/state").item_metadata
        assert saved is not None and saved.tree.keys() == {"params", "step"}
