"""Ahead-of-time compilation: the train step, compiled for devices that are not present."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxdpo.planning.batch_shapes import BatchShapes
from jaxdpo.planning.gpu_targets import target_config, topology_shape
from jaxdpo.planning.hlo_collectives import Collective, collectives
from jaxdpo.planning.machines import Topology
from jaxdpo.training.program import Program

TPU_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""What libtpu needs without a TPU: query no metadata server, and take no lock file, with which two
compilers side by side would fail."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class CompilerUnavailable(Exception):
    """This machine has no compiler for the platform; the message says how to get it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """The compiler's figures of a train step."""

    peak: float
    """Peak memory of a device, bytes."""
    arguments: float
    """Bytes of it for state, reference, base and batch."""
    fits: bool
    """False: the compiler refused the program for needing `peak`."""
    collectives: list[Collective]


def compiler_devices(topology: Topology, *, offload: bool = False) -> list[Any]:
    """Devices to compile for.

    Args:
        offload: whether the program keeps arrays in host memory.

    Raises:
        CompilerUnavailable: the platform's compiler is not installed, or cannot compile offload
            without the devices.
    """
    if topology.chip.platform == "cpu":
        return _cpu_devices(topology)
    if topology.chip.platform == "cuda":
        if offload:
            raise CompilerUnavailable(
                "without a GPU, JAX's CUDA compiler does not know host memory (train.offload)"
            )
        return _gpu_devices(topology)
    return _tpu_devices(topology)


def _cpu_devices(topology: Topology) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < topology.num_chips:
        raise CompilerUnavailable(
            f"this process has {len(devices)} CPU devices; "
            f"start it with JAX_NUM_CPU_DEVICES={topology.num_chips}"
        )
    return devices[: topology.num_chips]


def _gpu_devices(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("jax_plugins") is None:
        raise CompilerUnavailable(
            'the CUDA compiler is not installed: pip install "jax[cuda12]" brings it; '
            "it needs no GPU"
        )
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.name,
        target_config=target_config(topology),
        topology=topology_shape(topology),
    )
    return list(described.devices)


def _tpu_devices(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise CompilerUnavailable(
            'the TPU compiler is not installed: pip install "jax[tpu]" brings it; it needs no TPU'
        )
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.shape or "", num_slices=topology.num_slices
    )
    return list(described.devices)


def compile_step(program: Program, shapes: BatchShapes) -> CompiledStep:
    """Compile the train step for the longest packed sequences."""
    lowered = program.lower(shapes.batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = refused_bytes(str(error))
        return CompiledStep(peak=needed, arguments=0.0, fits=False, collectives=[])
    memory: Any = compiled.memory_analysis()
    if program.options.forward.on_cpu:
        # The CPU compiler's peak leaves out temporary buffers.
        peak = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    else:
        # A TPU program's peak includes what it keeps in host memory.
        host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
        peak = memory.peak_memory_in_bytes - host
    return CompiledStep(
        peak=float(peak),
        arguments=float(memory.argument_size_in_bytes),
        fits=True,
        collectives=collectives(compiled.as_text() or "", program.mesh),
    )


def refused_bytes(message: str) -> float:
    """The least memory that a refused program needs, read from the TPU compiler's message.

    "Used 25.31G of 15.75G hbm", or "the total memory required for HLO temporaries (19.00G) exceeds
    available HBM (15.75G)"; infinite where the message has neither.
    """
    found = re.search(
        r"Used ([\d.]+)([KMG]) of|required for .*?\(([\d.]+)([KMG])\) exceeds", message
    )
    if found is None:
        return float("inf")
    number, unit = [part for part in found.groups() if part]
    return float(number) * _UNITS[unit]
