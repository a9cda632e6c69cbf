"""How a process learns from its environment that it is one of several, or that it is alone."""

import pytest

from jaxdpo.distributed.processes import Settings, settings

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
}
TPU = {"TPU_ML_PLATFORM": "JAX"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "1"}

TORCH = {"WORLD_SIZE": "16", "RANK": "9", "MASTER_ADDR": "b", "MASTER_PORT": "29500"}
TORCHRUN = TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}

ENVIRONMENTS: list[tuple[dict[str, str], Settings | None]] = [
    ({}, None),
    (EXPLICIT, Settings("a:1", 2, 1, ())),
    (EXPLICIT | {"JAX_PROCESS_COUNT": "1", "JAX_PROCESS_ID": "0"}, None),
    (EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Settings("a:1", 2, 1, None)),
    (
        {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "b", "MASTER_PORT": "29500"},
        Settings("b:29500", 2, 0, ()),
    ),
    (
        {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "b:1234", "MASTER_PORT": "29500"},
        Settings("b:1234", 2, 0, ()),
    ),
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "b"}, Settings("b:8476", 2, 1, ())),
    ({"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "b"}, None),
    ({"MASTER_ADDR": "b", "MASTER_PORT": "1"}, None),  # images have it for torch
    (TORCH, Settings("b:29500", 16, 9, ())),  # Kubeflow: one process a pod
    (TORCHRUN, Settings("b:29501", 16, 9, (1,))),  # the agent has the port itself
    (TORCHRUN | {"MASTER_PORT": "65535"}, Settings("b:8476", 16, 9, (1,))),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Settings("b:29501", 16, 9, ())),
    (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "1"}, Settings("b:29501", 16, 9, ())),
    (TORCHRUN | {"JAX_LOCAL_DEVICE_IDS": "1"}, Settings("b:29501", 16, 9, None)),
    (TORCHRUN | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Settings("a:1", 16, 9, (1,))),
    (TORCHRUN | EXPLICIT, Settings("a:1", 2, 1, ())),
    (TORCHRUN | {"NNODES": "2", "NODE_RANK": "1"}, Settings("b:29501", 16, 9, (1,))),
    (TORCHRUN | SLURM, Settings("b:29501", 16, 9, (1,))),  # torchrun, started by srun
    (TORCH | {"LOCAL_RANK": "1", "LOCAL_SIZE": "8"}, Settings("b:29500", 16, 9, (1,))),  # deepspeed
    # What a batch script exports for torch, around one process a node.
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "b"} | SLURM, Settings(None, 2, 1, None)),
    (
        {"WORLD_SIZE": "16", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "b"},
        Settings("b:8476", 2, 1, ()),
    ),
    (TORCH | {"WORLD_SIZE": "1", "RANK": "0"}, None),
    ({"RANK": "0", "LOCAL_RANK": "0"}, None),
    ({"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
    (SLURM | {"PMI_SIZE": "2", "PMI_RANK": "1"}, Settings(None, 2, 1, None)),
    (SLURM | EXPLICIT, Settings("a:1", 2, 1, ())),
    (
        SLURM,
        Settings(None, 2, 1, None),
    ),  # two tasks on a node: each has the GPU that JAX takes for it
    (
        SLURM | {"SLURM_STEP_NUM_NODES": "2"},
        Settings(None, 2, 1, ()),
    ),  # alone on its node: all of its GPUs
    (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Settings(None, 2, 1, ())),  # bound to its GPU already
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, Settings(None, 2, 1, None)),
    (SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Settings("a:1", 2, 1, None)),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # in the batch script, outside srun
    ({"OMPI_COMM_WORLD_SIZE": "2"}, Settings()),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    (TPU, Settings()),
    (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
    (TPU | {"JAX_PLATFORMS": "cpu"}, None),
    (TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, Settings()),
    (TPU | {"TPU_WORKER_HOSTNAMES": "a"}, None),
    (TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Settings()),
    ({"TPU_PROCESS_ADDRESSES": "local"}, None),  # notebooks
    ({"KUBERNETES_SERVICE_HOST": "x"}, None),
]


@pytest.mark.parametrize(
    ("env", "wanted"),
    ENVIRONMENTS,
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_the_environment_says_how_a_process_takes_part(
    env: dict[str, str], wanted: Settings | None
) -> None:
    assert settings(env) == wanted


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"NNODES": "2", "NODE_RANK": "0"},
            r"but JAX_COORDINATOR_ADDRESS or MASTER_ADDR is not set",
        ),
        (
            {"JAX_PROCESS_ID": "1"},
            r"JAX_PROCESS_COUNT or NNODES and JAX_COORDINATOR_ADDRESS or MASTER_ADDR is not set",
        ),
        (EXPLICIT | {"JAX_PROCESS_ID": "2"}, r"process 2 of 2: must be 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, r"but JAX_COORDINATOR_ADDRESS or MASTER_ADDR is not"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "b"},
            r"WORLD_SIZE=2: speaks of several .* unset WORLD",
        ),
        ({"RANK": "1", "MASTER_ADDR": "b"}, r"RANK=1: speaks of several processes"),
        ({"LOCAL_RANK": "3"}, r"LOCAL_RANK=3: speaks of several processes"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, r"PMI_SIZE=4: speaks of several processes"),
        ({"MV2_COMM_WORLD_SIZE": "4"}, r"MV2_COMM_WORLD_SIZE=4: speaks of several processes"),
        (TORCH | {"RANK": "16"}, r"process 16 of 16: must be 0 to 15. Correct RANK"),
        (TORCH | {"WORLD_SIZE": "two"}, r"WORLD_SIZE=two: must be a whole number"),
        (TORCH | {"LOCAL_RANK": "0"}, r"LOCAL_RANK=0: .* Set LOCAL_WORLD_SIZE"),
        (EXPLICIT | {"JAX_PROCESS_COUNT": "two"}, r"JAX_PROCESS_COUNT=two: must be a whole number"),
    ],
)
def test_an_incomplete_environment_is_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(env)
