"""Machines by name: `v5e-16`, `v5p-128`, `2xv5e-16`, `h100-8`, `cpu-8`, with their peak figures.

TPU names are those of Google Cloud, where the number of a v4 or v5p counts TensorCores, two to a
chip, and that of a v5e or v6e counts chips. `2x` in front means two such slices.
"""

import dataclasses
import difflib
import os

from jaxdpo.models.flops import PEAK_FLOPS

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of device with the manufacturer's peak figures, in bytes, FLOPs and seconds."""

    platform: str
    """tpu, cuda or cpu, as JAX calls it."""
    kind: str
    """The device kind, e.g. "TPU v5e"."""
    memory: float
    """Bytes available to a program."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    bandwidth: float
    """Memory (HBM) bandwidth, bytes/s."""
    link: float
    """Bytes/s to other chips of a slice (ICI) or of a host (NVLink, PCIe), in one direction."""
    network: float
    """Bytes/s to chips of other slices (DCN) or of other GPU hosts, in one direction."""
    host: float
    """Bytes/s to the memory of its host (PCIe), in one direction."""
    per_host: int
    """Chips of a host in the larger machines of this kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A machine, or several connected ones."""

    name: str
    chip: Chip
    num_chips: int
    shape: str | None
    """The torus of a TPU slice in the compiler's notation; None on other platforms."""
    num_slices: int = 1

    @property
    def num_hosts(self) -> int:
        """Hosts of all slices."""
        chips_per_slice = self.num_chips // self.num_slices
        return self.num_slices * max(1, chips_per_slice // self.chip.per_host)

    @property
    def num_linked(self) -> int:
        """Chips that are connected by links: those of a TPU slice, or those of a GPU host."""
        if self.chip.platform == "cuda":
            return min(self.num_chips, self.chip.per_host)
        return self.num_chips // self.num_slices

    def link(self, count: int) -> float:
        """Bytes/s of a collective among `count` neighbouring chips, at its slowest connection."""
        return self.chip.network if self.num_linked % count else self.chip.link


def _tpu(
    kind: str,
    memory: float,
    bandwidth: float,
    ici: float,
    per_host: int,
    *,
    host: float = 15,
    network: float = 200,
) -> Chip:
    """A TPU.

    Args:
        memory: GiB.
        bandwidth: GB/s.
        ici: Gbit/s of all links of a chip, in one direction.
        host: GB/s of PCIe.
        network: Gbit/s of a host.
    """
    return Chip(
        platform="tpu",
        kind=kind,
        memory=memory * GIB,
        flops=PEAK_FLOPS[kind],
        bandwidth=bandwidth * 1e9,
        link=ici / 8 * 1e9,
        network=network / 8 * 1e9 / per_host,
        host=host * 1e9,
        per_host=per_host,
    )


def _gpu(
    kind: str, memory: float, bandwidth: float, link: float, host: float, per_host: int = 8
) -> Chip:
    """A GPU.

    Args:
        memory: GiB.
        bandwidth: GB/s.
        link: GB/s of NVLink (of PCIe where there is none) in one direction: half of what data
            sheets state, which add up both.
        host: GB/s of PCIe, likewise.
    """
    return Chip(
        platform="cuda",
        kind=kind,
        memory=memory * GIB * GPU_MEMORY_FRACTION,
        flops=PEAK_FLOPS[kind],
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
        # One 400 Gbit/s network card per GPU, as in NVIDIA's DGX H100 and the clouds' 8-GPU hosts.
        network=50e9,
        host=host * 1e9,
        per_host=per_host,
    )


GPU_MEMORY_FRACTION = 0.92
"""What a program can use of a GPU's memory with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 (JAX's default
is 0.75); the CUDA context and NCCL need the rest."""

# TPUs: memory bandwidth and ICI from cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; PCIe, chips per
# host and network from jax-ml.github.io/scaling-book/tpus. Memory is what the TPU compiler allows a
# program ("Used 25.31G of 15.75G hbm"), a little less than what the chip has.
# GPUs: NVIDIA's data sheets of A100 80 GB SXM, H100 SXM, H200 SXM and L4; memory as nvidia-smi
# shows it.
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
_CORES_PER_CHIP = {"v4": 2, "v5p": 2}
"""Of the generations whose names count TensorCores."""

# Number of chips -> torus, as the documentation of each generation lists its slices.
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
_TORUSES = {"v4": _TORUS_3D, "v5p": _TORUS_3D, "v5e": _TORUS_2D, "v6e": _TORUS_2D}
_GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CPU_COUNTS = range(1, 65)
MAX_SLICES = 256


def names() -> list[str]:
    """All names that `topology` knows, except those of several slices."""
    found = []
    for kind, toruses in _TORUSES.items():
        found += [f"{kind}-{chips * _CORES_PER_CHIP.get(kind, 1)}" for chips in toruses]
    for kind, chip in _CHIPS.items():
        if chip.platform == "cuda":
            found += [f"{kind}-{count}" for count in _GPU_COUNTS]
    return found + [f"cpu-{count}" for count in _CPU_COUNTS]


def topology(name: str) -> Topology:
    """The machine of this name.

    >>> found = topology("v5p-128")
    >>> found.num_chips, found.num_hosts, found.shape
    (64, 16, 'v5p:4x4x4')
    >>> topology("2xv5e-16").num_chips
    32

    Raises:
        ValueError: the name is not known; the message suggests the nearest one.
    """
    slices, _, slice_name = name.partition("x")
    if slice_name in names() and slices.isdecimal() and 1 <= int(slices) <= MAX_SLICES:
        return _several_slices(name, int(slices), topology(slice_name))
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1) or ["v5e-8"]
        kinds = ", ".join([*_CHIPS, "cpu"])
        raise ValueError(
            f"topology={name}: is not known. Did you mean {near[0]}? "
            f"Kinds are {kinds}; numbers are those of Google Cloud"
        )
    kind, _, number = name.partition("-")
    if kind == "cpu":
        return Topology(name=name, chip=_cpu(int(number)), num_chips=int(number), shape=None)
    num_chips = int(number) // _CORES_PER_CHIP.get(kind, 1)
    shape = f"{kind}:{_TORUSES[kind][num_chips]}" if kind in _TORUSES else None
    return Topology(name=name, chip=_CHIPS[kind], num_chips=num_chips, shape=shape)


def _several_slices(name: str, count: int, one: Topology) -> Topology:
    if one.shape is None:
        kind = one.name.partition("-")[0]
        raise ValueError(
            f"topology={name}: only TPUs come in slices. Use {kind}-<number of all devices>"
        )
    num_chips = count * one.num_chips
    return dataclasses.replace(one, name=name, num_chips=num_chips, num_slices=count)


def _cpu(count: int) -> Chip:
    """A virtual CPU device: an equal share of this machine's memory and cores.

    Speeds are the order of magnitude of today's server cores: 200 GFLOP/s (XLA reaches 440 in
    float32 on two Zen 5 cores) and 10 GB/s each.
    """
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
