"""Reading a run's parameters without touching the run."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.checkpoints import arrays
from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.checkpoints.restore import open_params, restore_params
from tests.checkpoints.states import (
    P,
    assert_same_bits,
    flip_a_bit,
    folders,
    largest_file,
    make_state,
    mesh_of,
    save_steps,
)


def test_restore_params_reads_the_policy_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    step, params, meta = restore_params(tmp_path)
    assert (step, meta["config"]) == (2, {"seed": 2})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same_bits(make_state(2)["params"], params)
    assert restore_params(tmp_path, 1)[0] == 1


def test_open_params_reads_a_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", 4 * 16)
    weights = jax.device_put(
        jnp.arange(8.0 * 16 * 4).reshape(8, 16, 4),
        jax.sharding.NamedSharding(mesh_of(4, 2), P(None, "x", "y")),
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            1,
            {
                "params": {"layers": {"w": weights}, "embed": make_state()["params"]["embed"]},
                "step": jnp.int32(1),
            },
            {"a": 2},
        )
    step, params, meta = open_params(tmp_path)
    assert (step, meta["a"]) == (1, 2) and params["layers"]["w"].shape == (8, 16, 4)
    assert params["layers"]["w"].chunk_layout.read_chunk.shape[0] == 1, (
        "a layer must not cost the others"
    )
    assert np.prod(params["embed"].chunk_layout.read_chunk.shape) <= 16
    np.testing.assert_array_equal(np.asarray(params["layers"]["w"][3]), weights[3])
    assert_same_bits(jax.tree.map(np.asarray, params), restore_params(tmp_path)[1])
    shutil.rmtree(tmp_path / "checkpoints/1")
    with pytest.raises(
        ValueError, match="missing"
    ):  # and not zeros, which is what a missing piece may mean on disk
        np.asarray(params["layers"]["w"][5])


def test_restore_params_passes_over_damage_without_touching_the_run(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    flip_a_bit(largest_file(tmp_path / "checkpoints/2/state"))
    assert restore_params(tmp_path)[0] == 1
    with pytest.raises(ValueError, match="step 2 is damaged"):
        restore_params(tmp_path, 2)
    with pytest.raises(ValueError, match=r"step=5: there is no such checkpoint in .*\[1, 2\]"):
        restore_params(tmp_path, 5)
    with pytest.raises(ValueError, match="none was saved"):
        restore_params(tmp_path / "empty")
    assert folders(tmp_path) == {"1", "2"}
