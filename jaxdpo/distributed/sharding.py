"""Devices to a mesh, and logical weight axes to mesh axes: the only place that knows both.

Mesh axes: `data` (copies of the weights, other rows), `fsdp` (shares of the weights, other rows), `expert` (other experts, other rows),
`context` (shares of the slots of each row), `tensor` (shares of each matrix product). One rules table turns the logical axes that a
weight carries into its sharding; optimizer moments take the sharding of their weight.
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

from jaxdpo.config.schema import MeshSection

AXES: tuple[str, ...] = ("data", "fsdp", "expert", "context", "tensor")
"""Of every mesh, outermost first: neighbours along the last talk most."""
ROWS = ("data", "fsdp", "expert")
"""The mesh axes over which the rows of a batch are spread."""
RULES: dict[str, str | tuple[str, ...] | None] = {
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

    Devices of several slices (groups with a fast network of their own) lie along the outermost axes.

    Args:
        sizes: what each logical axis of the model's weights must be divided into (`axis_sizes`). Default: not looked at.

    Raises:
        ValueError: the sizes do not multiply to the number of devices or do not divide the model; proposes a mesh that does.
    """
    slices = _slices(jax.devices() if devices is None else devices)
    count, per_slice = sum(map(len, slices)), min(map(len, slices))
    rest = count // (section.fsdp * section.expert * section.context * section.tensor)
    data = max(rest, 1) if section.data == -1 else section.data
    shape = dict(
        zip(
            AXES, (data, section.fsdp, section.expert, section.context, section.tensor), strict=True
        )
    )
    if problems := list(_problems(shape, count, per_slice, sizes)):
        good = _nearest(shape, count, per_slice, sizes)
        raise ValueError("\n".join(problems) + f". For example {_written(good, also=shape)}")
    return Mesh(_arranged(slices, tuple(shape.values())), AXES)


def axis_sizes(axes: Any, shapes: Any) -> dict[str, int]:
    """What each logical axis must be divided into: the greatest common divisor of its sizes over all weights.

    Args:
        axes, shapes: as `param_shardings` takes them.
    """
    sizes: dict[str, int] = {}
    for names, leaf in zip(
        jax.tree.leaves(axes, is_leaf=_is_axes), jax.tree.leaves(shapes), strict=True
    ):
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
        yield f"{inner}: these devices talk in every layer and must lie in one slice, of which each has {per_slice} devices"
    if sizes is None:
        return
    if shape["expert"] > 1 and "expert" not in sizes:
        yield f"mesh.expert={shape['expert']}: the model has no experts"
    for name, size in sizes.items():
        over = {axis: shape[axis] for axis in _mesh_axes(shape, name)}
        if size % math.prod(over.values()):
            yield f"{_written(over)}: does not divide the model's {name} ({size})"


def _nearest(asked: Shape, count: int, per_slice: int, sizes: Mapping[str, int] | None) -> Shape:
    """Of all meshes that have no problem, the one nearest to what was asked for; one that only copies is always among them."""

    def distance(shape: Shape) -> tuple:
        return (
            sum(abs(math.log2(shape[axis] / asked[axis])) for axis in AXES[1:]),
            -shape["fsdp"],
            shape["tensor"],
            shape["context"],
        )

    good = (
        shape
        for shape in all_shapes(count)
        if 64 % shape["context"] == 0 and not any(_problems(shape, count, per_slice, sizes))
    )
    return min(good, key=distance)


def all_shapes(count: int) -> Iterator[Shape]:
    """Every mesh of so many devices."""
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    for inner in itertools.product(divisors, repeat=len(AXES) - 1):
        if count % math.prod(inner) == 0:
            yield dict(zip(AXES, (count // math.prod(inner), *inner), strict=True))


def _written(shape: Shape, also: Shape | None = None) -> str:
    """As options, sizes of 1 left out where none of another size was asked for."""
    named = {
        axis: size
        for axis, size in shape.items()
        if axis == "data" or size > 1 or (also or {}).get(axis, 1) > 1
    }
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
    """The devices in the mesh's shape: slices outermost, and inside a TPU slice as its network runs."""
    data, *inner = shape
    if (
        not hasattr(slices[0][0], "coords")
        or slices[0][0].platform != "tpu"
        or data % len(slices)
        or len(set(map(len, slices))) > 1
    ):
        return np.asarray(list(itertools.chain(*slices))).reshape(shape)
    layout = functools.partial(
        mesh_utils.create_device_mesh, (data // len(slices), *inner), allow_split_physical_axes=True
    )
    return np.concatenate([layout(devices=part) for part in slices])


def num_row_shards(mesh: Mesh) -> int:
    """Number of groups of devices that see different rows."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


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
            mesh,
            jax.tree_util.keystr(path, simple=True, separator="/"),
            leaf_axes,
            leaf.shape,
            problems,
        ),
        axes,
        shapes,
        is_leaf=_is_axes,
    )
    if problems:
        raise ValueError("\n".join(problems))
    return named


def _mesh_axes(shape: Mapping[str, int], name: str) -> tuple[str, ...]:
    """The mesh axes that share a logical axis; of several, those of one device are left out."""
    rule = RULES[name]
    if rule is None or isinstance(rule, str):
        return (rule,) if rule else ()
    return tuple(axis for axis in rule if shape[axis] > 1) or rule[:1]


def shared_axes(mesh: Mesh, name: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that share a logical axis: none, one or several."""
    return tuple(axis for axis in _mesh_axes(mesh.shape, name) if mesh.shape[axis] > 1)


def _sharding(
    mesh: Mesh, name: str, axes: tuple[str, ...], shape: tuple[int, ...], problems: list[str]
) -> NamedSharding:
    shares = [_mesh_axes(mesh.shape, axis) for axis in axes]
    used = list(itertools.chain(*shares))
    spec = PartitionSpec(*(over if len(over) > 1 else over[0] if over else None for over in shares))
    if len(axes) != len(shape) or len(set(used)) != len(used):
        problems.append(
            f"weight {name} {shape}: its axes {axes} do not fit the mesh rules {tuple(spec)}"
        )
        return replicated(mesh)  # a stand-in: the problem is raised before anyone uses it
    for axis, size, over in zip(axes, shape, shares, strict=True):
        sizes = {axis: mesh.shape[axis] for axis in over}
        if size % math.prod(sizes.values()):
            problems.append(
                f"{_written(sizes)}: does not divide the {size} of dimension {axis} of weight {name} {shape}. Use a divisor of {size}"
            )
    return NamedSharding(mesh, spec)


def platform(mesh: Mesh) -> str:
    """What the devices are: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def default_dtype(mesh: Mesh) -> str:
    """Compute dtype of model.compute_dtype=auto: GPUs and TPUs are built for bfloat16, few CPUs are."""
    return "float32" if platform(mesh) == "cpu" else "bfloat16"


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, dim: int) -> NamedSharding:
    """Dimension `dim` holds rows and is spread over the devices that see different rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * dim, ROWS))


def slots_spec(mesh: Mesh, num_slots: int) -> PartitionSpec:
    """How [B, T, ...] lies: rows over ROWS, slots over context. Slots that context does not divide (the one new token of an answer)
    are on all its devices."""
    shares = mesh.shape["context"]
    return PartitionSpec(ROWS, "context" if shares > 1 and num_slots % shares == 0 else None)


def constrain_slots(x_BT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Pin [B, T, ...] to where its rows and slots belong."""
    return x_BT if mesh is None else constrain(x_BT, mesh, *slots_spec(mesh, x_BT.shape[1]))


def rows_here(mesh: Mesh) -> frozenset[int]:
    """Which rows of a microbatch lie on devices of this process."""
    shards = rows(mesh, 0).addressable_devices_indices_map((num_row_shards(mesh),)).values()
    return frozenset(
        number for index in shards if index for number in range(num_row_shards(mesh))[index[0]]
    )


def constrain(x: jax.Array, mesh: Mesh | None, *spec: Any) -> jax.Array:
    """Pin an intermediate value to a sharding, so that the compiler does not choose another; without a mesh, nothing."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(_mesh_here(mesh), _rest(PartitionSpec(*spec)))
    )


def on_each_device(here: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`here` as what one device does: it takes that device's shares of the arguments and gives its shares of the results."""
    taken, given = jax.tree.map(_rest, (in_specs, out_specs))
    together = frozenset(AXES) - alone_on()
    return jax.shard_map(
        here,
        mesh=_mesh_here(mesh),
        in_specs=taken,
        out_specs=given,
        axis_names=together,
        check_vma=False,
    )


def summed_over_data(f: Callable[[Any], Any], mesh: Mesh | None, batch: Any) -> Any:
    """f(batch), a tree of sums over rows: the devices along `data` each add up their rows' alone, and all of these at its end.

    Args:
        mesh: None: the compiler is left to add up where it likes.
        batch: arrays [M, B, ...] with rows spread as `rows` says. What else `f` uses is the same for all rows.
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
    """The mesh axes along which devices work each for itself where this is called; specs do not name them there."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def _mesh_here(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh as it is known where this is called."""
    return jax.sharding.get_abstract_mesh() if alone_on() else mesh


def _rest(spec: PartitionSpec) -> PartitionSpec:
    """A spec without the axes of `alone_on`."""
    left_out = {None, *alone_on()}
    dims = (axes if isinstance(axes, tuple) else (axes,) for axes in spec)
    return PartitionSpec(
        *(tuple(axis for axis in axes if axis not in left_out) or None for axes in dims)
    )


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays to global device arrays; every process holds the same host arrays and copies its own shards."""

    def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        with jax.transfer_guard(
            "allow"
        ):  # it is meant, and has no other form that a guarded loop would take for it
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place, tree, shardings)
