"""A description of a GPU for XLA's CUDA compiler where the GPU itself is not present.

The compiler takes it as the text of a GpuTargetConfigProto; openxla/xla has examples in
`xla/backends/gpu/target_config/specs/`.
"""

import dataclasses

from jaxdpo.planning.machines import Topology


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """The hardware limits that kernels are shaped for."""

    capability: tuple[int, int]
    sms: int
    """Streaming multiprocessors (SM)."""
    threads_per_sm: int
    shared_memory: int
    """Bytes per SM; a thread block can use 1 KiB less."""
    l2_cache: int
    """Bytes."""
    clock_ghz: float


# Threads and shared memory per SM: CUDA C++ programming guide, table "technical specifications
# per compute capability". SMs, L2 cache and boost clock: NVIDIA's data sheets and white papers.
_GPUS = {
    # capability, SMs, threads, shared memory, L2 cache, GHz
    "NVIDIA A100": _Gpu((8, 0), 108, 2048, 164 << 10, 40 << 20, 1.41),
    "NVIDIA H100": _Gpu((9, 0), 132, 2048, 228 << 10, 50 << 20, 1.98),
    "NVIDIA H200": _Gpu((9, 0), 132, 2048, 228 << 10, 50 << 20, 1.98),
    "NVIDIA L4": _Gpu((8, 9), 58, 1536, 100 << 10, 48 << 20, 2.04),
}


def target_config(topology: Topology) -> str:
    """The GpuTargetConfigProto of a machine's GPUs, as text."""
    chip = topology.chip
    gpu = _GPUS[chip.kind]
    # Literal limits are the same for all of these GPUs (CUDA C++ programming guide), but for the
    # FP32 units per SM: an A100 has 64. XLA reads that number for its cost model.
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 << 10}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  threads_per_core_limit: {gpu.threads_per_sm}
  core_count: {gpu.sms}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {int(chip.memory)}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.kind}"
"""


def topology_shape(topology: Topology) -> str:
    """Partitions x hosts x GPUs per host, in the compiler's notation."""
    return f"1x{topology.num_hosts}x{topology.num_chips // topology.num_hosts}"
