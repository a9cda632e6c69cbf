"""Compiling ahead of time: the very train step, for devices that are not here."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxdpo.planning.batch_shapes import Rows
from jaxdpo.planning.gpu_targets import arrangement, target_config
from jaxdpo.planning.hlo_collectives import Collective, collectives
from jaxdpo.planning.machines import GIB, Topology
from jaxdpo.training.program import Program

TPU_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""What libtpu has to be told where there is no TPU: ask no metadata server, take no lock."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Unavailable(Exception):
    """There is no compiler for this platform here; the message says what brings it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a step."""

    peak: float
    """Bytes of a device's memory while the step runs, at most."""
    arguments: float
    """Those that hold state, reference, base and batch."""
    fits: bool
    """False: the compiler refused the program for its memory, which `peak` then is."""
    collectives: list[Collective]


def compiler_devices(topology: Topology, *, offload: bool = False) -> list[Any]:
    """Devices to compile for.

    Args:
        offload: whether the program keeps something in the memory of the hosts.

    Raises:
        Unavailable: the platform's compiler is not installed, or cannot compile that for devices that are elsewhere.
    """
    if topology.chip.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.num_chips:
            raise Unavailable(
                f"this process has {len(found)} CPU devices; start it with JAX_NUM_CPU_DEVICES={topology.num_chips}"
            )
        return found[: topology.num_chips]
    if topology.chip.platform == "cuda":
        if offload:
            raise Unavailable(
                "away from a GPU, JAX tells the CUDA compiler nothing of the host's memory (train.offload)"
            )
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise Unavailable(
            'the TPU compiler is not installed: pip install "jax[tpu]" brings it, also where there is no TPU'
        )
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.shape or "", num_slices=topology.num_slices
    )
    return list(described.devices)


def _gpus(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("jax_plugins") is None:
        raise Unavailable(
            'the CUDA compiler is not installed: pip install "jax[cuda12]" brings it, also where there is no GPU'
        )
    describe = {"target_config": target_config(topology), "topology": arrangement(topology)}
    found = topologies.get_topology_desc(platform="cuda", topology_name=topology.name, **describe)
    return list(found.devices)


def compile_step(program: Program, rows: Rows) -> Compiled:
    """Compile the train step for its longest rows."""
    lowered = program.lower(rows.batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(peak=refused_bytes(str(error)), arguments=0.0, fits=False, collectives=[])
    memory: Any = compiled.memory_analysis()
    waiting = (
        memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    )  # which a TPU's peak includes
    on_cpu = (
        program.options.forward.on_cpu
    )  # where the compiler's own peak leaves out what is temporary
    added = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Compiled(
        peak=float(added if on_cpu else memory.peak_memory_in_bytes - waiting),
        arguments=float(memory.argument_size_in_bytes),
        fits=True,
        collectives=collectives(compiled.as_text() or "", program.mesh),
    )


def refused_bytes(message: str) -> float:
    """How much memory a refused program wants at least, as the TPU compiler tells it: "Used 25.31G of 15.75G hbm", or "the total memory
    required for HLO temporaries (19.00G) exceeds available HBM (15.75G)"."""
    found = re.search(
        r"Used ([\d.]+)([KMG]) of|required for .*?\(([\d.]+)([KMG])\) exceeds", message
    )
    number, unit = [part for part in found.groups() if part] if found else ("inf", "G")
    return float(number) * _UNITS[unit]


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB"
