"""Machines by name: `v5e-16`, `v5p-128`, `2xv5e-16`, `h100-8`, `cpu-8`, with what a plan has to know of them.

TPU names are those of the cloud, where the number of v4 and v5p counts TensorCores, two to a chip, and that of v5e and v6e chips.
`2x` in front: two such slices.
"""

import dataclasses
import difflib
import os

from jaxdpo.models.flops import PEAK_FLOPS

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of device. Figures are the makers' peaks, in bytes, FLOPs and seconds."""

    platform: str
    """tpu, cuda or cpu, as JAX calls it."""
    kind: str
    """The name that people know."""
    memory: float
    """Bytes that a program can have."""
    flops: float
    """Dense bfloat16 FLOPs a second."""
    bandwidth: float
    """Bytes a second between the chip and its memory."""
    link: float
    """Bytes a second that the chip can send to its neighbours, and as many that it can receive."""
    network: float
    """The same between chips that no such link connects: in other slices of TPUs, in other hosts of GPUs."""
    host: float
    """The same between a chip and the memory of its host."""
    per_host: int
    """Chips of a host in the larger machines of this kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A machine, or several that work together."""

    name: str
    chip: Chip
    num_chips: int
    shape: str | None
    """How a slice's chips are connected, as the TPU compiler takes it; None for other platforms."""
    num_slices: int = 1

    @property
    def num_hosts(self) -> int:
        """Hosts that the chips sit in."""
        return self.num_slices * max(1, self.num_chips // self.num_slices // self.chip.per_host)

    @property
    def joined(self) -> int:
        """Chips that links connect: those of a slice of TPUs, those of a host of GPUs."""
        return (
            min(self.num_chips, self.chip.per_host)
            if self.chip.platform == "cuda"
            else self.num_chips // self.num_slices
        )

    def link(self, count: int) -> float:
        """Bytes a second of a collective over so many neighbouring chips, at the slowest connection."""
        return self.chip.network if self.joined % count else self.chip.link


def _tpu(
    kind: str,
    memory: float,
    bandwidth: float,
    gigabits: float,
    per_host: int,
    *,
    host: float = 15,
    network: float = 200,
) -> Chip:
    """`gigabits`: the interconnect's bits of all links of a chip, one way. `network`: Gbit/s of a host."""
    flops = PEAK_FLOPS[kind]
    return Chip(
        platform="tpu",
        kind=kind,
        memory=memory * GIB,
        flops=flops,
        bandwidth=bandwidth * 1e9,
        link=gigabits / 8 * 1e9,
        network=network / 8 * 1e9 / per_host,
        host=host * 1e9,
        per_host=per_host,
    )


def _gpu(
    kind: str, memory: float, bandwidth: float, link: float, host: float, per_host: int = 8
) -> Chip:
    """`link` and `host`: bytes of NVLink (or PCIe) one way, half of what data sheets add up. The network is 400 Gbit/s a GPU."""
    flops = PEAK_FLOPS[kind]
    return Chip(
        platform="cuda",
        kind=kind,
        memory=memory * GIB * GPU_SHARE,
        flops=flops,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
        network=50e9,
        host=host * 1e9,
        per_host=per_host,
    )


GPU_SHARE = 0.92
"""Share of a GPU's memory that programs can have with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92; the driver and NCCL take the rest."""

# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (bandwidth, interconnect); hosts and network: jax-ml.github.io/scaling-book/tpus.
# Memory is what their compiler allows a program.
# GPUs: NVIDIA's data sheets of A100 80 GB SXM, H100 SXM, H200 SXM and L4; memory as nvidia-smi shows it.
_CHIPS = {
    "v4": _tpu("TPU v4", 31.75, 1228, 2400, 4),
    "v5e": _tpu("TPU v5e", 15.75, 819, 1600, 8),
    "v5p": _tpu("TPU v5p", 95.74, 2765, 4800, 4),
    "v6e": _tpu("TPU v6e", 31.25, 1640, 3584, 8, host=32, network=800),
    "a100": _gpu("NVIDIA A100", 80.0, 2039, 300, 32),
    "h100": _gpu("NVIDIA H100", 79.6, 3350, 450, 64),
    "h200": _gpu("NVIDIA H200", 140.4, 4800, 450, 64),
    "l4": _gpu("NVIDIA L4", 22.5, 300, 32, 32),
}
_CORES = {"v4": 2, "v5p": 2}
"""Generations whose names count TensorCores: how many a chip has."""

# Slices as the documentation of each generation lists them: chips to how they are connected.
_TORUS_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_TORUS_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
}
_SHAPES = {"v4": _TORUS_3D, "v5p": _TORUS_3D, "v5e": _TORUS_2D, "v6e": _TORUS_2D}
_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CPUS = tuple(range(1, 65))


MOST_SLICES = 256


def names() -> list[str]:
    """All names that `topology` knows, those of several slices aside."""
    slices = [
        f"{kind}-{chips * _CORES.get(kind, 1)}"
        for kind, shapes in _SHAPES.items()
        for chips in shapes
    ]
    gpus = [
        f"{kind}-{count}"
        for kind, chip in _CHIPS.items()
        if chip.platform == "cuda"
        for count in _GPUS
    ]
    return [*slices, *gpus, *(f"cpu-{count}" for count in _CPUS)]


def topology(name: str) -> Topology:
    """The machine of this name.

    >>> found = topology("v5p-128")
    >>> found.num_chips, found.num_hosts, found.shape
    (64, 16, 'v5p:4x4x4')
    >>> topology("2xv5e-16").num_chips
    32

    Raises:
        ValueError: there is none; names the nearest.
    """
    slices, _, one = name.partition("x")
    if one in names() and slices.isdecimal() and 1 <= int(slices) <= MOST_SLICES:
        part = topology(one)
        if part.shape is None:
            raise ValueError(
                f"topology={name}: only TPUs come in slices. Use {one.partition('-')[0]}-<number of all>"
            )
        count = int(slices)
        return dataclasses.replace(
            part, name=name, num_chips=count * part.num_chips, num_slices=count
        )
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1) or ["v5e-8"]
        kinds = ", ".join([*_CHIPS, "cpu"])
        raise ValueError(
            f"topology={name}: is not known. Did you mean {near[0]}? Kinds are {kinds}; numbers are those of the cloud"
        )
    kind, _, number = name.partition("-")
    if kind == "cpu":
        return Topology(name=name, chip=_cpu(int(number)), num_chips=int(number), shape=None)
    count = int(number) // _CORES.get(kind, 1)
    shape = f"{kind}:{_SHAPES[kind][count]}" if kind in _SHAPES else None
    return Topology(name=name, chip=_CHIPS[kind], num_chips=count, shape=shape)


def _cpu(count: int) -> Chip:
    """A share of this machine: its memory, and speeds of the order of today's server cores (200 GFLOP/s and 10 GB/s each)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = (os.cpu_count() or 1) / count
    return Chip(
        platform="cpu",
        kind="CPU",
        memory=memory / count,
        flops=2e11 * cores,
        bandwidth=1e10 * cores,
        link=5e9 * cores,
        network=5e9 * cores,
        host=1e10 * cores,
        per_host=count,
    )
