"""The collectives of a compiled program, read from its HLO text: kind, count, mesh axes and bytes.

Not `compiled.cost_analysis()` because it counts the body of a loop once and reports no collectives.

Bytes are what one device sends with ring algorithms (NCCL's and XLA's for large arrays):
(g - 1) / g of the full array for an all-gather or reduce-scatter among g devices, and twice that
for an all-reduce, which is a reduce-scatter followed by an all-gather.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
}
"""Bytes of an element, by HLO's name of its type."""

# Patterns of HLO text. A computation: "%name (parameters) -> result {".
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
# "%x = f32[8]{0} all-reduce(...)"; asynchronous ones are pairs of -start and -done.
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Device groups, in three notations: {{0,1},{2,3}}; [2,2]<=[4] (iota, optionally reshaped and
# transposed); mesh['a'=2,'b'=2] {'a'} (axes of the compiler's own mesh).
_LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?(?:=(\d+))?")
_SOURCE_TARGET_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str
    """One of KINDS."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of its results on one device."""
    count: int
    """Executions per run of the program; the body of a loop of unknown length counts once."""
    axes: tuple[str, ...]
    """Mesh axes that it communicates along."""
    sent: float
    """Bytes that one device sends, over all executions."""
    op_name: str
    """The JAX operation that it comes from."""


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program; those among groups of one device are left out.

    Args:
        text: `compiled.as_text()`.
        mesh: the devices that the program was compiled for.
    """
    computations, entry = _computations(text)
    found = []
    for name, count in _execution_counts(computations, entry).items():
        for line in computations[name]:
            if match := _COLLECTIVE.search(line):
                result, kind = match.groups()
                found.append(_collective(line, result, kind, count, mesh))
    return [one for one in found if one.axes]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match.group(2)
            if match.group(1):
                entry = name
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations, entry


def _execution_counts(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation is executed in one run of the program."""
    counts = dict.fromkeys(computations, 0)

    def visit(name: str, count: int) -> None:
        counts[name] += count
        for line in computations[name]:
            trips = 1
            if " while(" in line and (match := _TRIP_COUNT.search(line)):
                trips = int(match.group(1))
            for called in _called(line):
                if called in computations:
                    visit(called, count * trips)

    visit(entry, 1)
    return counts


def _called(line: str) -> Iterator[str]:
    """Names of the computations that an instruction calls."""
    yield from _CALLED.findall(line)
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().lstrip("%")


def _collective(line: str, result: str, kind: str, count: int, mesh: Mesh) -> Collective:
    arrays = []
    for dtype, dims in _ARRAY.findall(result):
        arrays.append((dtype, tuple(int(size) for size in dims.split(",") if size)))
    if f"{kind}-start(" in line:
        # The result of an asynchronous start is (operands, results).
        arrays = arrays[-max(1, len(arrays) // 2) :]
    num_bytes = sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
    groups = _groups(line)
    size = groups.shape[1]
    if kind == "collective-permute":
        sent = float(num_bytes)
    elif kind == "all-reduce":
        sent = num_bytes * (2 * (size - 1) / size)
    elif kind == "reduce-scatter":
        # The result is one of `size` parts, of which a device sends all but its own.
        sent = num_bytes * (size - 1)
    else:
        sent = num_bytes * ((size - 1) / size)
    op_name = _OP_NAME.search(line)
    return Collective(
        kind=kind,
        shapes=tuple(shape for _, shape in arrays),
        count=count,
        axes=_axes(groups, mesh),
        sent=count * sent,
        op_name=op_name.group(1) if op_name else "",
    )


def _groups(line: str) -> np.ndarray:
    """Groups of communicating devices, int [groups, devices of a group], in the mesh's order."""
    if match := _IOTA_GROUPS.search(line):
        num_groups, size, dims, order = match.groups()
        return _iota(dims, order).reshape(int(num_groups), int(size))
    if match := _MESH_GROUPS.search(line):
        return _groups_of_axes(*match.groups())
    if match := _LISTED_GROUPS.search(line) or _SOURCE_TARGET_PAIRS.search(line):
        groups = []
        for group in re.findall(r"\{([\d, ]+)\}", match.group(1)):
            groups.append([int(number) for number in group.split(",")])
        return np.array(groups)
    raise ValueError(f"a collective whose groups are not understood: {line.strip()}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in an array of these dimensions, transposed to `order` if there is one."""
    sizes = [int(dim) for dim in dims.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if order is None:
        return numbers
    return numbers.transpose([int(dim) for dim in order.split(",")])


def _groups_of_axes(sizes: str, dims: str | None, order: str | None, among: str) -> np.ndarray:
    """Groups given as axes of the compiler's own mesh, or as parts of axes.

    A part 'a':(2)4 means: axis a is seen as 2 x 4 x (what remains), and the 4 in the middle are
    the ones that communicate. So each mesh axis is split in three: before, part, after.
    """
    parts = {}
    for name, before, size, _ in _MESH_AXIS.findall(among):
        if size:
            parts[name] = (int(before), int(size))
    split, dim_of_part = [], {}
    for name, _, _, size in _MESH_AXIS.findall(sizes):
        before, part = parts.get(name, (1, int(size)))
        dim_of_part[name] = len(split) + 1
        split += [before, part, int(size) // (before * part)]
    numbers = np.arange(math.prod(split)) if dims is None else _iota(dims, order)
    communicating = [dim_of_part[name] for name, *_ in _MESH_AXIS.findall(among)]
    groups = np.moveaxis(numbers.reshape(split), communicating, range(-len(communicating), 0))
    return groups.reshape(-1, math.prod(split[dim] for dim in communicating))


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the coordinates of a group's devices differ."""
    coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
    differs = np.any(coordinates != coordinates[:, :1], axis=(0, 1))
    return tuple(axis for axis, used in zip(mesh.axis_names, differs, strict=True) if used)
