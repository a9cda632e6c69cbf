"""The processes of one run, on one machine or on many: who takes part, and what they agree on.

A run is one process, or several that each hold some of its devices. `connect` makes them one before anything else touches JAX. What
follows is for the main thread alone, and every process must call it at the same places: the rest of the run then is the same
program everywhere, and nothing in it waits for a process that is elsewhere.
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
HEARTBEAT_SECONDS = 100
"""A process that is not heard of for so long is taken for dead, and the others end. JAXDPO_HEARTBEAT_SECONDS overrides it."""
LAST_WORDS_SECONDS = 3.0
_DIGEST_BYTES = 32

T = TypeVar("T")


class Settings(NamedTuple):
    """What jax.distributed.initialize is told; None: JAX asks the scheduler or the machine."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    """Devices of this machine that belong to this process; (): all of them."""


def settings(env: Mapping[str, str]) -> Settings | None:
    """How this process takes part in a run, from its environment; None: it is the only one.

    In this order: JAX_PROCESS_COUNT, JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS, or NNODES, NODE_RANK and MASTER_ADDR[:MASTER_PORT];
    SLURM, Open MPI or a TPU slice where one has started several processes; else one process.

    Raises:
        ValueError: part of what is needed is missing, or is no number.

    >>> settings({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"})
    Settings(coordinator_address='10.0.0.1:8476', num_processes=2, process_id=1, local_device_ids=())
    """
    count, number = (
        _number(env, "JAX_PROCESS_COUNT", "NNODES"),
        _number(env, "JAX_PROCESS_ID", "NODE_RANK"),
    )
    detected = _detected(env)
    if count == 1:
        return None
    if count is None and number is None:
        return (
            None
            if detected is None
            else detected._replace(coordinator_address=env.get("JAX_COORDINATOR_ADDRESS"))
        )
    address = env.get("JAX_COORDINATOR_ADDRESS") or _master(env)
    needed = {
        "JAX_PROCESS_COUNT or NNODES": count is None,
        "JAX_PROCESS_ID or NODE_RANK": number is None,
        "JAX_COORDINATOR_ADDRESS or MASTER_ADDR": address is None,
    }
    missing = [name for name, lacks in needed.items() if lacks]
    if missing:
        raise ValueError(
            f"the environment speaks of several processes, but {' and '.join(missing)} is not set. Set all three, or none"
        )
    assert count is not None and number is not None
    if not 0 <= number < count:
        raise ValueError(
            f"process {number} of {count}: must be 0 to {count - 1}. Correct JAX_PROCESS_ID or NODE_RANK"
        )
    return Settings(address, count, number, None if "JAX_LOCAL_DEVICE_IDS" in env else ())


def _number(env: Mapping[str, str], *names: str) -> int | None:
    name = next((name for name in names if env.get(name)), None)
    if name is None:
        return None
    if not env[name].isdecimal():
        raise ValueError(f"{name}={env[name]}: must be a whole number")
    return int(env[name])


def _master(env: Mapping[str, str]) -> str | None:
    address = env.get("MASTER_ADDR")
    return (
        address
        if not address or re.search(r":\d+$", address)
        else f"{address}:{env.get('MASTER_PORT') or DEFAULT_PORT}"
    )


def _detected(env: Mapping[str, str]) -> Settings | None:
    """Several processes as a scheduler or a TPU slice starts them; JAX finds the address, and what else is None."""
    if "SLURM_JOB_ID" in env and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
        return (
            Settings(None, tasks, int(env["SLURM_PROCID"]), _slurm_devices(env, tasks))
            if tasks > 1
            else None
        )
    if int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return Settings()
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return None
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:
        return (
            Settings() if "," in workers or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1 else None
        )
    # What importing jax leaves behind on a Cloud TPU VM. Whether others belong to its slice, JAX asks the machine.
    return (
        Settings()
        if env.get("TPU_ML_PLATFORM") == "JAX" and not env.get("TPU_SKIP_MDS_QUERY")
        else None
    )


def _slurm_devices(env: Mapping[str, str], tasks: int) -> tuple[int, ...] | None:
    """JAX takes one GPU for each task; a task that is alone on its node, or was given its own GPUs, has all that it sees."""
    alone = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1) == tasks
    bound = env.get("CUDA_VISIBLE_DEVICES", "").count(",") == 0 and "CUDA_VISIBLE_DEVICES" in env
    return () if alone or bound else None


def connect(env: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of the run, if the environment speaks of any; returns when all are there.

    To be called before anything else touches JAX's devices, and before signal handlers are installed: JAX brings its own.

    Raises:
        ValueError: the environment is incomplete.
    """
    found = settings(env)
    if found is not None:
        timeout = _number(env, "JAXDPO_HEARTBEAT_SECONDS") or HEARTBEAT_SECONDS
        jax.distributed.initialize(*found, heartbeat_timeout_seconds=timeout)


def is_first() -> bool:
    """Whether this process writes the files and tells what happens."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag of any process is set."""
    return bool(_gather(np.asarray([flag])).any())


def from_first(value: Any) -> Any:
    """What the first process has; a JSON value. Others may pass anything."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value if is_first() else None).encode()
    size = int(_gather(np.asarray([len(text)]))[0, 0])
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(_gather(padded)[0].tobytes())


def on_first(check: Callable[[], T]) -> T:
    """What `check` returns on the first process, which alone calls it, for all processes; a JSON value.

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
    """The first process's array; others pass one of the same shape and type."""
    return value if jax.process_count() == 1 else _gather(value)[0]


def differing(values: Mapping[str, str]) -> list[str]:
    """Names of the values that are not the same on all processes; all have the same names."""
    digests = [
        np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in values.values()
    ]
    gathered = _gather(np.stack(digests)) if digests else np.zeros((1, 0, _DIGEST_BYTES), np.uint8)
    same = (gathered == gathered[:1]).all(axis=(0, 2))
    return [name for name, equal in zip(values, same, strict=True) if not equal]


def _gather(value: np.ndarray) -> np.ndarray:
    """[processes, ...]: what each process passed; all pass the same shape and type."""
    if jax.process_count() == 1:
        return value[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(value)).reshape(
            jax.process_count(), *value.shape
        )


class Votes:
    """What the processes want, asked once a step without waiting for an answer: the answer is that of one step before.

    The question travels behind the step on the devices' own queue. With one process, the answer is immediate.
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None
        if jax.process_count() > 1:
            devices = Mesh(np.asarray(jax.devices()), ("device",))
            self._spread, self._everywhere = (
                NamedSharding(devices, PartitionSpec(*axes)) for axes in (["device"], [])
            )
            self._highest = jax.jit(lambda votes: votes.max(), out_shardings=self._everywhere)

    def cast(self, vote: int) -> int:
        """Give this process's vote; returns the highest vote of all processes."""
        if jax.process_count() == 1:
            return vote
        before, one = self._asked, np.asarray([vote], np.int32)
        with jax.transfer_guard("allow"):
            votes = jax.make_array_from_callback((len(jax.devices()),), self._spread, lambda _: one)
        self._asked = self._highest(votes)
        return 0 if before is None else int(jax.device_get(before))


def is_lost(error: Exception) -> bool:
    """Whether an error of the devices means that another process is gone: its connections say so, or who counts heartbeats."""
    said = (
        "gloo",
        "nccl",
        "connection",
        "unavailable",
        "aborted",
        "deadline_exceeded",
        "cancelled",
        "heartbeat",
    )
    return jax.process_count() > 1 and any(word in str(error).lower() for word in said)


def end(code: int) -> int:
    """The exit status of a process that failed or lost the others. Where there are others, it ends here: waiting for them might not end.

    The first process, without which none can go on, leaves them the time to say what is wrong with themselves.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(LAST_WORDS_SECONDS if is_first() else 0)
        os._exit(code)
    return code
