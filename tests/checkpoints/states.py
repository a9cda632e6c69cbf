"""States to save, and checkpoints to read and to damage."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.checkpoints.checkpoint import Checkpoints

P = jax.sharding.PartitionSpec


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        shape, ("x", "y")[: len(shape)], axis_types=(jax.sharding.AxisType.Auto,) * len(shape)
    )


def make_state(seed: int = 0) -> dict:
    """A state like that of a run: float32, bfloat16, integers; rounding would change its values."""
    key = jax.random.key(seed)
    weights = jax.random.normal(key, (16, 8)) * 1e-3
    return {
        "params": {
            "layers": {"w": weights, "scale": jnp.asarray(weights[0], jnp.bfloat16)},
            "embed": weights * 3,
        },
        "opt": {"count": jnp.int32(7), "mu": {"w": weights / 3}, "nu": {"w": weights**2}},
        "key": jax.random.key_data(key),
        "step": jnp.int32(seed),
    }


def abstract(state: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def assert_same_bits(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        y: Any = b
        for part in path:
            y = y[part.key]
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def save_steps(
    run: Path, losses: dict[int, float | None], keep: int = 10, keep_best: int = 0
) -> None:
    with Checkpoints(run, keep, keep_best) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), {"config": {"seed": step}}, loss)


def folders(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
