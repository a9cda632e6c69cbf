"""What a compiled program sends between devices, read from its HLO text: which collectives, how often, along which mesh axes, how much.

Bytes are what one device sends with ring algorithms (NCCL's and XLA's for large arrays): (g - 1) / g of the whole for a gather or a
scatter among g devices, twice that for a sum that all receive.
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
ITEM_BYTES = (
    {"pred": 1, "s8": 1, "u8": 1}
    | {"bf16": 2, "f16": 2, "s16": 2, "u16": 2}
    | {"f32": 4, "s32": 4, "u32": 4}
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?(?:=(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str
    """One of KINDS."""
    shapes: tuple[tuple[int, ...], ...]
    """Of its results, on one device."""
    times: int
    """How often it runs in one run of the program; loops of unknown length count once."""
    axes: tuple[str, ...]
    """Mesh axes along which it runs."""
    sent: float
    """Bytes that one device sends, all times together."""
    where: str
    """The operation of the source that it belongs to."""


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
        text: `compiled.as_text()`.
        mesh: the devices that the program was compiled for.
    """
    bodies, entry = _computations(text)
    found = []
    for name, times in _times(bodies, entry).items():
        for line in bodies[name]:
            if match := _COLLECTIVE.search(line):
                found.append(_collective(line, match.group(1), match.group(2), times, mesh))
    return [one for one in found if one.axes]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match.group(2)
            entry = name if match.group(1) else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times = dict.fromkeys(bodies, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            trips = (
                int(match.group(1)) if " while(" in line and (match := _TRIPS.search(line)) else 1
            )
            for called in _called(line):
                if called in bodies:
                    visit(called, count * trips)

    visit(entry, 1)
    return times


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for names in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _collective(line: str, result: str, kind: str, times: int, mesh: Mesh) -> Collective:
    arrays = [
        (dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(result)
    ]
    if f"{kind}-start(" in line:  # whose result holds the operands too
        arrays = arrays[-max(1, len(arrays) // 2) :]
    whole = sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
    groups = _groups(line)
    size = groups.shape[1]
    if kind == "collective-permute":
        share = float(whole)
    else:
        share = whole * {"all-reduce": 2 * (size - 1) / size, "reduce-scatter": size - 1}.get(
            kind, (size - 1) / size
        )
    name = re.search(r'op_name="([^"]*)"', line)
    shapes = tuple(shape for _, shape in arrays)
    return Collective(
        kind, shapes, times, _axes(groups, mesh), times * share, name.group(1) if name else ""
    )


def _groups(line: str) -> np.ndarray:
    """The devices that talk to each other, one group a row, as numbers in the order of the mesh."""
    if match := _COUNTED_GROUPS.search(line):
        count, size, dims, order = match.groups()
        return _numbers(dims, order).reshape(int(count), int(size))
    if match := _MESH_GROUPS.search(line):
        return _groups_of_axes(*match.groups())
    if match := _GROUPS.search(line) or _PAIRS.search(line):
        return np.array(
            [
                [int(number) for number in group.split(",")]
                for group in re.findall(r"\{([\d, ]+)\}", match.group(1))
            ]
        )
    raise ValueError(f"a collective whose groups are not understood: {line.strip()}")


def _numbers(dims: str, order: str | None) -> np.ndarray:
    """Numbers from 0 on in an array of these dimensions, which are then put in another order."""
    sizes = [int(dim) for dim in dims.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose([int(dim) for dim in order.split(",")]) if order else numbers


def _groups_of_axes(sizes: str, dims: str | None, order: str | None, among: str) -> np.ndarray:
    """Groups told as axes of the compiler's own mesh, or as parts of them: 'a':(2)4 are the 4 in the middle of 2 x 4 x what is left."""
    split, places = [], {}
    parts = {
        name: (int(before), int(size))
        for name, before, size, _ in _MESH_AXIS.findall(among)
        if size
    }
    for name, _, _, size in _MESH_AXIS.findall(sizes):
        before, part = parts.get(name, (1, int(size)))
        places[name] = len(split) + 1
        split += [before, part, int(size) // (before * part)]
    numbers = np.arange(math.prod(split)) if dims is None else _numbers(dims, order)
    talking = [places[name] for name, *_ in _MESH_AXIS.findall(among)]
    groups = np.moveaxis(numbers.reshape(split), talking, range(-len(talking), 0))
    return groups.reshape(-1, math.prod(split[place] for place in talking))


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
    differ = np.any(places != places[:, :1], axis=(0, 1))
    return tuple(axis for axis, some in zip(mesh.axis_names, differ, strict=True) if some)
