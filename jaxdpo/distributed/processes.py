"""The processes of one run, on one machine or on many: who takes part, and what they agree on.

A run is one process, or several that each drive some of its devices. `connect` joins them before
anything else uses JAX. All other functions are collectives: for the main thread alone, and called
by every process in the same order. The rest of the run then is the same program everywhere, and
nothing in it waits for a process that is elsewhere.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEFAULT_PORT = 8476
"""Port of the coordinator where MASTER_PORT does not name another."""
MAX_PORT = 65535
COUNTS_AND_NUMBERS = (
    ("WORLD_SIZE", "RANK"),
    ("WORLD_SIZE", "LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
"""Variables for the number of processes and for that of a process: of torchrun, of MPICH and Intel
MPI, of MVAPICH."""
HEARTBEAT_SECONDS = 100
"""A process that is silent for so long is considered dead, and the others end; JAX's own default.
JAXDPO_HEARTBEAT_SECONDS overrides it."""
LAST_WORDS_SECONDS = 3.0
"""How long process 0, the coordinator, waits before it exits after an error: the others exit with
it, and lose their own messages if they have not been printed yet."""
LOST_CONNECTION = (
    "gloo",
    "nccl",
    "connection",
    "unavailable",
    "aborted",
    "deadline_exceeded",
    "cancelled",
    "heartbeat",
)
"""Words of the errors that collectives raise when another process is gone: of Gloo (CPU), NCCL
(GPU), and of gRPC's status codes, as the tests that kill processes have met them."""

T = TypeVar("T")


class Settings(NamedTuple):
    """Arguments of jax.distributed.initialize; None: JAX asks the scheduler or the machine."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    """Devices of this machine that belong to this process; (): all of them."""


def settings(env: Mapping[str, str]) -> Settings | None:
    """How this process takes part in a run, from its environment; None: it is the only one.

    In this order: JAX_PROCESS_COUNT, JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS; WORLD_SIZE, RANK
    and MASTER_ADDR[:MASTER_PORT], as torchrun, Kubeflow and accelerate set them; NNODES, NODE_RANK
    and MASTER_ADDR; SLURM, Open MPI or a TPU slice where one has started several processes; else
    one process.

    Raises:
        ValueError: part of what is needed is missing, or is not a number.

    >>> settings({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"})[:3]
    ('10.0.0.1:8476', 2, 1)
    >>> settings({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "23456"})[:3]
    ('a:23456', 2, 1)
    """
    is_explicit = bool(env.get("JAX_PROCESS_COUNT") or env.get("JAX_PROCESS_ID"))
    world, rank = _number(env, "WORLD_SIZE"), _number(env, "RANK")
    # Before NNODES and NODE_RANK, which a script may export for torchrun itself.
    if not is_explicit and world is not None and world > 1 and rank is not None:
        return _settings_of_torchrun(env, world, rank)
    count = _number(env, "JAX_PROCESS_COUNT", "NNODES")
    number = _number(env, "JAX_PROCESS_ID", "NODE_RANK")
    detected = _detected(env)
    if count == 1:
        return None
    if count is None and number is None:
        if detected is None:
            _refuse_leftovers(env)
            return None
        return detected._replace(coordinator_address=env.get("JAX_COORDINATOR_ADDRESS"))
    address = env.get("JAX_COORDINATOR_ADDRESS") or _master(env)
    names = ("JAX_PROCESS_COUNT or NNODES", "JAX_PROCESS_ID or NODE_RANK")
    # JAX reads JAX_LOCAL_DEVICE_IDS by itself if it is passed None.
    devices = None if "JAX_LOCAL_DEVICE_IDS" in env else ()
    return _complete(address, count, number, devices, names)


def _complete(
    address: str | None,
    count: int | None,
    number: int | None,
    devices: tuple[int, ...] | None,
    names: tuple[str, str],
) -> Settings:
    """The settings, if nothing is missing; `names` are those of count and number.

    Raises:
        ValueError: something is, or the number is none of the count.
    """
    needed = {names[0]: count, names[1]: number, "JAX_COORDINATOR_ADDRESS or MASTER_ADDR": address}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(
            f"the environment speaks of several processes, but {' and '.join(missing)} is not set. "
            "Set all three, or none"
        )
    assert count is not None and number is not None
    if not 0 <= number < count:
        raise ValueError(
            f"process {number} of {count}: must be 0 to {count - 1}. Correct {names[1]}"
        )
    return Settings(address, count, number, devices)


def _settings_of_torchrun(env: Mapping[str, str], world: int, rank: int) -> Settings:
    """One of `world` processes of torchrun or of what sets its variables, with its devices.

    Raises:
        ValueError: the address is missing, or it cannot be known which devices are its own.
    """
    local_rank = _number(env, "LOCAL_RANK")
    local_world = _number(env, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # LOCAL_SIZE: deepspeed
    bound = "CUDA_VISIBLE_DEVICES" in env and "," not in env["CUDA_VISIBLE_DEVICES"]
    devices: tuple[int, ...] | None = ()
    if "JAX_LOCAL_DEVICE_IDS" in env:
        devices = None
    elif local_rank is not None and local_world != 1 and not bound:
        if local_world is None:
            raise ValueError(
                f"LOCAL_RANK={local_rank}: how many processes this machine has is not known, so "
                "neither which devices are its own. Set LOCAL_WORLD_SIZE or JAX_LOCAL_DEVICE_IDS"
            )
        devices = (local_rank,)
    address = env.get("JAX_COORDINATOR_ADDRESS") or _master(env)
    if address and "TORCHELASTIC_RUN_ID" in env and not env.get("JAX_COORDINATOR_ADDRESS"):
        # torchrun's own store listens at MASTER_PORT.
        host, _, port = address.rpartition(":")
        address = f"{host}:{int(port) + 1 if int(port) < MAX_PORT else DEFAULT_PORT}"
    return _complete(address, world, rank, devices, ("WORLD_SIZE", "RANK"))


def _refuse_leftovers(env: Mapping[str, str]) -> None:
    """Refuse to be alone where the environment speaks of other processes: each would be a run.

    Raises:
        ValueError: it does, with what to set.
    """
    for count_name, number_name in COUNTS_AND_NUMBERS:
        count, number = _number(env, count_name), _number(env, number_name)
        if (count or 1) <= 1 and not (count is None and (number or 0) > 0):
            continue
        name, value = (number_name, number) if count is None else (count_name, count)
        raise ValueError(
            f"{name}={value}: speaks of several processes, but not of how they find each other. "
            "Set WORLD_SIZE, RANK and MASTER_ADDR (or JAX_PROCESS_COUNT, JAX_PROCESS_ID and "
            f"JAX_COORDINATOR_ADDRESS) for each; if this process is the only one, unset {name}"
        )


def _number(env: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if not env.get(name):
            continue
        if not env[name].isdecimal():
            raise ValueError(f"{name}={env[name]}: must be a whole number")
        return int(env[name])
    return None


def _master(env: Mapping[str, str]) -> str | None:
    address = env.get("MASTER_ADDR")
    if not address or re.search(r":\d+$", address):
        return address
    return f"{address}:{env.get('MASTER_PORT') or DEFAULT_PORT}"


def _detected(env: Mapping[str, str]) -> Settings | None:
    """Several processes as a scheduler or a TPU slice starts them; what is None, JAX finds out."""
    if "SLURM_JOB_ID" in env and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
        if tasks == 1:
            return None
        return Settings(None, tasks, int(env["SLURM_PROCID"]), _slurm_devices(env, tasks))
    if int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return Settings()
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return None
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:
        several = "," in workers or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1
        return Settings() if several else None
    # On a Cloud TPU VM, importing jax sets this. JAX asks the machine for other hosts of its slice.
    on_tpu_vm = env.get("TPU_ML_PLATFORM") == "JAX" and not env.get("TPU_SKIP_MDS_QUERY")
    return Settings() if on_tpu_vm else None


def _slurm_devices(env: Mapping[str, str], tasks: int) -> tuple[int, ...] | None:
    """All visible GPUs, for a task that is alone on its node or was given its own; else None: JAX
    takes one for each task."""
    alone = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1) == tasks
    bound = "CUDA_VISIBLE_DEVICES" in env and "," not in env["CUDA_VISIBLE_DEVICES"]
    return () if alone or bound else None


def connect(env: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of the run, if the environment speaks of any; returns when all are
    there.

    Call it before anything else uses JAX's devices, and before signal handlers are installed: JAX
    installs its own.

    Raises:
        ValueError: the environment is incomplete.
    """
    found = settings(env)
    if found is not None:
        timeout = _number(env, "JAXDPO_HEARTBEAT_SECONDS") or HEARTBEAT_SECONDS
        jax.distributed.initialize(*found, heartbeat_timeout_seconds=timeout)


def is_first() -> bool:
    """Whether this is process 0, which writes the files and logs."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag of any process is set."""
    return bool(_gather(np.asarray([flag])).any())


def from_first(value: Any) -> Any:
    """Process 0's value, a JSON value. Others may pass anything."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value if is_first() else None).encode()
    # A collective needs arrays of one shape: process 0's length first, then its bytes.
    size = int(_gather(np.asarray([len(text)]))[0, 0])
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(_gather(padded)[0].tobytes())


def on_first(check: Callable[[], T]) -> T:
    """What `check` returns on process 0, which alone calls it, for all processes; a JSON value.

    Raises:
        ValueError: on all, if `check` raises it.
    """
    outcome: tuple[Any, str | None] = None, None
    if is_first():
        try:
            outcome = check(), None
        except ValueError as error:
            outcome = None, str(error)
    value, problem = from_first(outcome)
    if problem is not None:
        raise ValueError(problem)
    return value


def array_from_first(value: np.ndarray) -> np.ndarray:
    """Process 0's array; others pass one of the same shape and dtype."""
    return value if jax.process_count() == 1 else _gather(value)[0]


def differing(values: Mapping[str, str]) -> list[str]:
    """Names of the values that are not the same on all processes; all have the same names."""
    if not values:
        return []
    digests = [
        np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in values.values()
    ]
    gathered = _gather(np.stack(digests))
    same = (gathered == gathered[:1]).all(axis=(0, 2))
    return [name for name, equal in zip(values, same, strict=True) if not equal]


def _gather(value: np.ndarray) -> np.ndarray:
    """[processes, ...]: what each process passed; all pass the same shape and dtype."""
    if jax.process_count() == 1:
        return value[None]
    with jax.transfer_guard("allow"):
        gathered = np.asarray(multihost_utils.process_allgather(value))
    return gathered.reshape(jax.process_count(), *value.shape)


class Votes:
    """What the processes want (to stop, to save), asked once a step without waiting: an answer is
    that of one step before.

    The question follows the step on the devices' own queue. With one process, the answer is
    immediate.
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None
        if jax.process_count() > 1:
            devices = Mesh(np.asarray(jax.devices()), ("device",))
            self._spread = NamedSharding(devices, PartitionSpec("device"))
            everywhere = NamedSharding(devices, PartitionSpec())
            self._highest = jax.jit(lambda votes: votes.max(), out_shardings=everywhere)

    def cast(self, vote: int) -> int:
        """Give this process's vote; returns the highest vote of all processes."""
        if jax.process_count() == 1:
            return vote
        before = self._asked
        one = np.asarray([vote], np.int32)
        with jax.transfer_guard("allow"):
            votes = jax.make_array_from_callback((len(jax.devices()),), self._spread, lambda _: one)
        self._asked = self._highest(votes)
        return 0 if before is None else int(jax.device_get(before))


def is_lost(error: Exception) -> bool:
    """Whether an error of the devices means that another process is gone."""
    text = str(error).lower()
    return jax.process_count() > 1 and any(word in text for word in LOST_CONNECTION)


def end(code: int) -> int:
    """The exit status of a process that failed or lost the others.

    Where there are others, the process ends here: an orderly exit waits for them, which might never
    end. Process 0, without which none can go on, gives them time to print what is wrong with
    themselves.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():
            time.sleep(LAST_WORDS_SECONDS)
        os._exit(code)
    return code
