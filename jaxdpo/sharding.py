"""Devices to a mesh, and logical weight axes to mesh axes: the only place that knows both.

Mesh axes: `data` (copies of the weights, other rows), `fsdp` (shares of the weights, other rows), `tensor` (shares of each
matrix product). One rules table turns the logical axes that a weight carries into its sharding; optimizer moments take
the sharding of their weight.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdpo.config import MeshSection

ROWS = ("data", "fsdp")  # the mesh axes over which the rows of a batch are spread
RULES: dict[str, str | None] = {
    "layer": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "tensor",
    "expert_mlp": None,
    "router": None,
    "position": None,
    "norm": None,
    "rank": None,
    "run": None,
}


def make_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh data x fsdp x tensor over all devices (or those given).

    Raises:
        ValueError: when the sizes do not multiply to the number of devices; proposes one that does.
    """
    devices = list(jax.devices() if devices is None else devices)
    rest, remainder = divmod(len(devices), section.fsdp * section.tensor)
    data = rest if section.data == -1 else section.data
    if remainder or data != rest:
        raise ValueError(
            f"mesh.data={section.data} mesh.fsdp={section.fsdp} mesh.tensor={section.tensor}: must multiply to the {len(devices)} "
            f"devices here. For example mesh.data=-1 mesh.fsdp={len(devices)} mesh.tensor=1"
        )
    return Mesh(np.asarray(devices).reshape(data, section.fsdp, section.tensor), ("data", "fsdp", "tensor"))


def num_row_shards(mesh: Mesh) -> int:
    """Number of devices groups that see different rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings of a tree of weights.

    Args:
        axes: nested dict whose leaves are tuples of logical axis names, one for each dimension.
        shapes: the same tree with arrays or ShapeDtypeStructs as leaves.

    Raises:
        ValueError: naming every weight that a mesh axis does not divide, or on which two dimensions claim one mesh axis.
    """
    problems: list[str] = []
    named = jax.tree_util.tree_map_with_path(
        lambda path, leaf_axes, leaf: _sharding(
            mesh, jax.tree_util.keystr(path, simple=True, separator="/"), leaf_axes, leaf.shape, problems
        ),
        axes,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    if problems:
        raise ValueError("\n".join(problems))
    return named


def _sharding(mesh: Mesh, name: str, axes: tuple[str, ...], shape: tuple[int, ...], problems: list[str]) -> NamedSharding:
    spec = [RULES[axis] for axis in axes]
    used = [axis for axis in spec if axis]
    if len(axes) != len(shape) or len(set(used)) != len(used):
        problems.append(f"weight {name} {shape}: its axes {axes} do not fit the mesh rules {spec}")
        return replicated(mesh)  # a stand-in: the problem is raised before anyone uses it
    for axis, size, mesh_axis in zip(axes, shape, spec, strict=False):
        if mesh_axis and size % mesh.shape[mesh_axis]:
            problems.append(
                f"mesh.{mesh_axis}={mesh.shape[mesh_axis]}: does not divide the {size} of dimension {axis} of weight {name} {shape}. "
                f"Use a divisor of {size}"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, dim: int) -> NamedSharding:
    """Dimension `dim` holds rows and is spread over the devices that see different rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * dim, ROWS))


def constrain(x: jax.Array, mesh: Mesh | None, *spec: Any) -> jax.Array:
    """Pin an intermediate value to a sharding, so that the compiler does not choose another; without a mesh, nothing."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays to global device arrays; every process holds the same host arrays and copies its own shards."""

    def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place, tree, shardings)
