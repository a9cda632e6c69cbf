"""What the CUDA compiler has to know of a GPU that is not here: XLA's GpuTargetConfigProto, as text."""

import dataclasses

from jaxdpo.planning.machines import Topology


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """Sizes of a GPU that programs are shaped for (CUDA C++ programming guide, table of compute capabilities; NVIDIA's data sheets)."""

    capability: tuple[int, int]
    processors: int
    threads: int
    """Of a multiprocessor, at most."""
    shared_memory: int
    """Bytes of a multiprocessor; a block can have 1 KiB less."""
    cache: int
    """Bytes of the second level."""
    clock: float
    """GHz."""


_GPUS = {
    "NVIDIA A100": _Gpu((8, 0), 108, 2048, 164 << 10, 40 << 20, 1.41),
    "NVIDIA H100": _Gpu((9, 0), 132, 2048, 228 << 10, 50 << 20, 1.98),
    "NVIDIA H200": _Gpu((9, 0), 132, 2048, 228 << 10, 50 << 20, 1.98),
    "NVIDIA L4": _Gpu((8, 9), 58, 1536, 100 << 10, 48 << 20, 2.04),
}


def target_config(topology: Topology) -> str:
    """The description of a machine's GPUs."""
    gpu, chip = _GPUS[topology.chip.kind], topology.chip
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 << 10}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.processors}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {int(chip.memory)}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.kind}"
"""


def arrangement(topology: Topology) -> str:
    """Slices x hosts x GPUs of a host, as the compiler takes it."""
    return f"1x{topology.num_hosts}x{topology.num_chips // topology.num_hosts}"
