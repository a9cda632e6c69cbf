"""Devices to a mesh, and the logical axes of weights to mesh axes: the only place that knows both.

Mesh axes (docs/scale.md):
  data     data parallelism: replicas of the weights, different sequences
  fsdp     fully sharded data parallelism: shards of weights and optimizer, different sequences
  expert   expert parallelism: different experts, shards of the other weights, different sequences
  context  context parallelism: shards of the token positions of each sequence
  tensor   tensor parallelism: shards of each matrix multiplication

RULES turns the logical axes that a weight carries into its sharding; optimizer moments have that of
their weight.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxdpo.config.data_options import LENGTH_MULTIPLE
from jaxdpo.config.schema import MeshSection
from jaxdpo.utils.tree import path_name

AXES: tuple[str, ...] = ("data", "fsdp", "expert", "context", "tensor")
"""Axes of every mesh, outermost first: neighbours along the last communicate most."""
ROWS = ("data", "fsdp", "expert")
"""The mesh axes over which the sequences (rows) of a batch are sharded."""
RULES: dict[str, str | tuple[str, ...] | None] = {
    # Logical axis of a weight: the mesh axis, or axes, that shard it. None: not sharded.
    "layer": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "expert_embed": "fsdp",
    "expert_mlp": "tensor",
    "router": None,
    "position": None,
    "norm": None,
    "rank": None,
    "run": None,
}

Shape = dict[str, int]
"""Size of each mesh axis, in the order of AXES."""


def make_mesh(
    section: MeshSection,
    devices: Sequence[Any] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Mesh:
    """The mesh over all devices (or those given).

    Slices (groups of devices with a fast network of their own, such as TPU slices) are along the
    outermost axes.

    Args:
        section: sizes of the mesh axes.
        devices: default: all.
        sizes: what each logical axis of the model's weights must be divided into (`axis_sizes`).
            Default: not checked.

    Raises:
        ValueError: the sizes do not multiply to the number of devices or do not divide the model;
            proposes a mesh that does.
    """
    slices = _slices(jax.devices() if devices is None else devices)
    count, per_slice = sum(map(len, slices)), min(map(len, slices))
    shape = {
        "data": section.data,
        "fsdp": section.fsdp,
        "expert": section.expert,
        "context": section.context,
        "tensor": section.tensor,
    }
    if shape["data"] == -1:
        others = math.prod(shape[axis] for axis in AXES[1:])
        shape["data"] = max(count // others, 1)
    problems = list(_problems(shape, count, per_slice, sizes))
    if problems:
        good = _nearest(shape, count, per_slice, sizes)
        raise ValueError("\n".join(problems) + f". For example {_written(good, also=shape)}")
    return Mesh(_arranged(slices, tuple(shape.values())), AXES)


def axis_sizes(axes: Any, shapes: Any) -> dict[str, int]:
    """What each logical axis must be divided into: the greatest common divisor of its sizes over
    all weights.

    Args:
        axes, shapes: as `param_shardings` takes them.
    """
    sizes: dict[str, int] = {}
    all_axes = jax.tree.leaves(axes, is_leaf=_is_axes)
    for names, leaf in zip(all_axes, jax.tree.leaves(shapes), strict=True):
        for name, size in zip(names, leaf.shape, strict=True):
            sizes[name] = math.gcd(sizes.get(name, 0), size)
    return sizes


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _problems(
    shape: Shape, count: int, per_slice: int, sizes: Mapping[str, int] | None
) -> Iterator[str]:
    """What is wrong with a mesh, as messages."""
    if math.prod(shape.values()) != count:
        yield f"{_written(shape)}: must multiply to the {count} devices here"
    if per_slice % (shape["expert"] * shape["context"] * shape["tensor"]):
        inner = _written({axis: shape[axis] for axis in AXES[2:]})
        yield (
            f"{inner}: these devices communicate in every layer and must lie in one slice, "
            f"of which each has {per_slice} devices"
        )
    if sizes is None:
        return
    if shape["expert"] > 1 and "expert" not in sizes:
        yield f"mesh.expert={shape['expert']}: the model has no experts"
    for name, size in sizes.items():
        over = {axis: shape[axis] for axis in _mesh_axes(shape, name)}
        if size % math.prod(over.values()):
            yield f"{_written(over)}: does not divide the model's {name} ({size})"


def _nearest(asked: Shape, count: int, per_slice: int, sizes: Mapping[str, int] | None) -> Shape:
    """The mesh without problems that is nearest to what was asked for; data parallelism alone is
    always one of them."""

    def distance(shape: Shape) -> tuple:
        doublings = sum(abs(math.log2(shape[axis] / asked[axis])) for axis in AXES[1:])
        # Of equally near ones: rather fsdp, which saves memory and needs little communication.
        return doublings, -shape["fsdp"], shape["tensor"], shape["context"]

    good = []
    for shape in all_shapes(count):
        if LENGTH_MULTIPLE % shape["context"] == 0 and not any(
            _problems(shape, count, per_slice, sizes)
        ):
            good.append(shape)
    return min(good, key=distance)


def all_shapes(count: int) -> Iterator[Shape]:
    """Every mesh of so many devices."""
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    for inner in itertools.product(divisors, repeat=len(AXES) - 1):
        if count % math.prod(inner) == 0:
            yield dict(zip(AXES, (count // math.prod(inner), *inner), strict=True))


def _written(shape: Shape, also: Shape | None = None) -> str:
    """As options; sizes of 1 are left out where no other size was asked for."""
    asked = also or {}
    named = {}
    for axis, size in shape.items():
        if axis == "data" or size > 1 or asked.get(axis, 1) > 1:
            named[axis] = size
    return " ".join(f"mesh.{axis}={size}" for axis, size in (named or shape).items())


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices by slice, those of a process together."""

    def slice_of(device: Any) -> int:
        return getattr(device, "slice_index", None) or 0

    ordered = sorted(
        devices, key=lambda device: (slice_of(device), device.process_index, device.id)
    )
    return [list(group) for _, group in itertools.groupby(ordered, key=slice_of)]


def _arranged(slices: list[list[Any]], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in the mesh's shape: slices outermost, and inside a TPU slice along its
    network."""
    data, *inner = shape
    is_tpu = hasattr(slices[0][0], "coords") and slices[0][0].platform == "tpu"
    same_size = len(set(map(len, slices))) == 1
    if not is_tpu or not same_size or data % len(slices):
        return np.asarray(list(itertools.chain(*slices))).reshape(shape)
    arrange = functools.partial(
        mesh_utils.create_device_mesh, (data // len(slices), *inner), allow_split_physical_axes=True
    )
    return np.concatenate([arrange(devices=part) for part in slices])


def num_row_shards(mesh: Mesh) -> int:
    """Number of groups of devices that see different sequences."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings of a tree of weights.

    Args:
        mesh: the devices.
        axes: nested dict whose leaves are tuples of logical axis names, one for each dimension.
        shapes: the same tree with arrays or ShapeDtypeStructs as leaves.

    Raises:
        ValueError: naming every weight that a mesh axis does not divide, or two of whose dimensions
            claim one mesh axis.
    """
    problems: list[str] = []

    def sharding(path: tuple, leaf_axes: tuple[str, ...], leaf: Any) -> NamedSharding:
        return _sharding(mesh, path_name(path), leaf_axes, leaf.shape, problems)

    named = jax.tree_util.tree_map_with_path(sharding, axes, shapes, is_leaf=_is_axes)
    if problems:
        raise ValueError("\n".join(problems))
    return named


def _mesh_axes(shape: Mapping[str, int], name: str) -> tuple[str, ...]:
    """The mesh axes that shard a logical axis; of several, those of one device are left out."""
    rule = RULES[name]
    if rule is None:
        return ()
    if isinstance(rule, str):
        return (rule,)
    return tuple(axis for axis in rule if shape[axis] > 1) or rule[:1]


def shared_axes(mesh: Mesh, name: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that shard a logical axis: none, one or several."""
    return tuple(axis for axis in _mesh_axes(mesh.shape, name) if mesh.shape[axis] > 1)


def _sharding(
    mesh: Mesh, name: str, axes: tuple[str, ...], shape: tuple[int, ...], problems: list[str]
) -> NamedSharding:
    shares = [_mesh_axes(mesh.shape, axis) for axis in axes]
    dims: list[str | tuple[str, ...] | None] = []
    for over in shares:
        if len(over) == 1:
            dims.append(over[0])
        else:
            dims.append(over or None)
    spec = PartitionSpec(*dims)
    used = list(itertools.chain(*shares))
    if len(axes) != len(shape) or len(set(used)) != len(used):
        problems.append(
            f"weight {name} {shape}: its axes {axes} do not fit the mesh rules {tuple(spec)}"
        )
        return replicated(mesh)  # a placeholder: the problem is raised before anyone uses it
    for axis, size, over in zip(axes, shape, shares, strict=True):
        sizes = {axis: mesh.shape[axis] for axis in over}
        if size % math.prod(sizes.values()):
            problems.append(
                f"{_written(sizes)}: does not divide the {size} of dimension {axis} "
                f"of weight {name} {shape}. Use a divisor of {size}"
            )
    return NamedSharding(mesh, spec)


def platform(mesh: Mesh) -> str:
    """What the devices are: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def default_dtype(mesh: Mesh) -> str:
    """What model.compute_dtype=auto means: GPUs and TPUs are built for bfloat16, few CPUs are."""
    return "float32" if platform(mesh) == "cpu" else "bfloat16"


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, dim: int) -> NamedSharding:
    """Dimension `dim` is that of sequences, sharded over the devices that see different ones."""
    return NamedSharding(mesh, PartitionSpec(*[None] * dim, ROWS))


def activation_spec(mesh: Mesh, num_slots: int) -> PartitionSpec:
    """Sharding of [B, T, ...]: sequences over ROWS, token positions over context.

    Positions that context does not divide (the one new token of an answer) are on all its devices.
    """
    shares = mesh.shape["context"]
    divides = shares > 1 and num_slots % shares == 0
    return PartitionSpec(ROWS, "context" if divides else None)


def constrain_activations(x_BT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrain [B, T, ...] to the sharding of its sequences and token positions."""
    if mesh is None:
        return x_BT
    return constrain(x_BT, mesh, *activation_spec(mesh, x_BT.shape[1]))


def local_rows(mesh: Mesh) -> frozenset[int]:
    """Which shards of a microbatch's sequences are on devices of this process."""
    count = num_row_shards(mesh)
    found: set[int] = set()
    for index in rows(mesh, 0).addressable_devices_indices_map((count,)).values():
        if index:
            found.update(range(count)[index[0]])
    return frozenset(found)


def constrain(x: jax.Array, mesh: Mesh | None, *spec: Any) -> jax.Array:
    """Constrain an intermediate value to a sharding, lest the compiler choose another; without a
    mesh, nothing."""
    if mesh is None or mesh.size == 1:
        return x
    sharding = NamedSharding(_mesh_here(mesh), _rest(PartitionSpec(*spec)))
    return jax.lax.with_sharding_constraint(x, sharding)


def on_each_device(here: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """shard_map over all axes that are not manual yet: `here` takes one device's shards and returns
    its shards."""
    taken, given = jax.tree.map(_rest, (in_specs, out_specs))
    return jax.shard_map(
        here,
        mesh=_mesh_here(mesh),
        in_specs=taken,
        out_specs=given,
        axis_names=frozenset(AXES) - alone_on(),
        check_vma=False,
    )


def summed_over_data(f: Callable[[Any], Any], mesh: Mesh | None, batch: Any) -> Any:
    """f(batch), a tree of sums over sequences: each replica along `data` sums its own, then one
    all-reduce at the end.

    Without it, the compiler may all-reduce the gradients of every microbatch.

    Args:
        f: what else it uses is the same for all sequences.
        mesh: None: the compiler decides where to sum.
        batch: arrays [M, B, ...] with the sharding of `rows(mesh, 1)`.
    """
    if mesh is None:
        return f(batch)

    def here(batch: Any) -> Any:
        return jax.lax.psum(f(batch), "data")

    own, same = PartitionSpec(None, "data"), PartitionSpec()
    return jax.shard_map(
        here, mesh=mesh, in_specs=(own,), out_specs=same, axis_names={"data"}, check_vma=False
    )(batch)


def alone_on() -> frozenset[str]:
    """The mesh axes that an enclosing shard_map has made manual; specs inside it must not name
    them."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def _mesh_here(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh as an enclosing shard_map knows it."""
    return jax.sharding.get_abstract_mesh() if alone_on() else mesh


def _rest(spec: PartitionSpec) -> PartitionSpec:
    """A spec without the axes of `alone_on`."""
    manual = alone_on()
    dims: list[tuple[str, ...] | None] = []
    for axes in spec:
        named = axes if isinstance(axes, tuple) else (axes,)
        left = tuple(axis for axis in named if axis is not None and axis not in manual)
        dims.append(left or None)
    return PartitionSpec(*dims)


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays to global device arrays; every process has the same host arrays and copies its
    own shards."""

    def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        # The loop's transfer guard takes this for an implicit transfer, although it is meant.
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place, tree, shardings)
