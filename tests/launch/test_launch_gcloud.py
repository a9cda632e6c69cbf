"""The gcloud commands that --dry-run prints, against a table and gcloud's own lint."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.launch.tools import LAUNCH, run, tool

PLACE = {"--project", "--zone"}
COMMANDS: dict[str, set[str]] = {
    "compute tpus queued-resources create": {
        "--node-id",
        "--accelerator-type",
        "--runtime-version",
        "--spot",
        "--valid-until-duration",
    },
    "compute tpus queued-resources describe": {"--format"},
    "compute tpus queued-resources delete": {"--force", "--quiet"},
    "compute tpus queued-resources list": set(),
    "compute tpus tpu-vm ssh": {"--worker", "--command"},
    "compute tpus tpu-vm scp": {"--worker"},
    "compute tpus tpu-vm list": set(),
    "compute instances create": {
        "--machine-type",
        "--boot-disk-size",
        "--boot-disk-type",
        "--maintenance-policy",
        "--image-family",
        "--image-project",
        "--provisioning-model",
        "--instance-termination-action",
    },
    "compute instances start": set(),
    "compute instances delete": {"--delete-disks", "--quiet"},
    "compute instances list": {"--filter"},
    "compute disks list": {"--filter"},
    "compute ssh": {"--command"},
    "compute scp": set(),
}
"""The gcloud commands that the scripts may use, with their flags beside PLACE. gcloud's own lint
checks them (a slow test)."""
TPU_COMMANDS = [
    "create",
    "push",
    "preflight x=1",
    "run --config configs/v5e-16.yaml data.train=[a.jsonl]",
    "resume x=1",
    "stop",
    "status",
    "logs -n 5",
    "state",
    "delete",
]
GPU_COMMANDS = [
    "create",
    "push",
    "preflight x=1",
    "run x=1",
    "resume x=1",
    "stop",
    "status",
    "logs -n 5",
    "delete",
]


def dry_run(script: str, command: str, **variables: str) -> list[str]:
    lines = run(
        LAUNCH / script, "--dry-run", *command.split(), ZONE="us-west4-a", **variables
    ).splitlines()
    return [line for line in lines if not line.startswith("env COPYFILE_DISABLE=1 tar ")]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """Every command that --dry-run prints, with and without the optional variables."""
    more = {"PROJECT": "my-project", "WAIT": "2h", "SHARE": "10.0.0.2:/runs", "SPOT": "0"}
    lines = []
    for script, commands in (("tpu_vm.sh", TPU_COMMANDS), ("gpu_vm.sh", GPU_COMMANDS)):
        for command in commands:
            lines += dry_run(script, command)
            lines += dry_run(script, command, **more)
    for kind in ("v4-8", "v5p-128", "v6e-8"):
        lines += dry_run("tpu_vm.sh", "create", TPU=kind)
    return lines


def unknown(line: str) -> str | None:
    """What of a command is not in the table; None: nothing."""
    words = shlex.split(line)[1:]
    command = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if command is None:
        return f"unknown command: {line}"
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    strange = flags - COMMANDS[command] - PLACE
    return f"unknown flags {sorted(strange)}: {line}" if strange else None


def test_printed_commands_are_those_of_the_table(printed: list[str]) -> None:
    assert [problem for line in printed if (problem := unknown(line))] == []
    assert {
        name for name in COMMANDS if not any(line.startswith(f"gcloud {name} ") for line in printed)
    } == set()
    assert unknown("gcloud compute tpus tpu-vm list --zone=a --all") and unknown(
        "gcloud compute tpus tpu-vm reimage x"
    )


@pytest.mark.slow
def test_gcloud_itself_accepts_the_commands(printed: list[str], tmp_path: Path) -> None:
    wrong = (
        "gcloud compute tpus queued-resources create x --node-id=x --accelerator-typ=v4-8 "
        "--runtime-version=x"
    )
    commands = tmp_path / "commands.json"
    # One command of those that differ in values alone.
    kinds = {re.sub(r"=('[^']*'|\S+)", "", line): line for line in printed}
    commands.write_text(json.dumps([{"command_string": line} for line in [*kinds.values(), wrong]]))
    gcloud = tool("gcloud", "Google Cloud SDK")
    found = json.loads(
        run(
            gcloud,
            "meta",
            "lint-gcloud-commands",
            f"--commands-file={commands}",
            CLOUDSDK_CONFIG=str(tmp_path),
        )
    )
    assert len(found) >= len(COMMANDS)
    assert [
        (item["command_string"], item["error_message"])
        for item in found[:-1]
        if not item["success"]
    ] == []
    assert not found[-1]["success"], "the lint must find the misspelt flag"


def test_each_accelerator_type_has_its_runtime_version() -> None:
    created = {
        kind: dry_run("tpu_vm.sh", "create", TPU=kind)[0] for kind in ("v5e-16", "v5p-128", "v6e-8")
    }
    assert (
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
        in created["v5e-16"]
    )
    assert (
        "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --spot" in created["v5p-128"]
    )
    assert "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --spot" in created["v6e-8"]
    assert "--spot" not in dry_run("tpu_vm.sh", "create", SPOT="0")[0]


def test_each_of_several_gpu_hosts_gets_its_process_id() -> None:
    lines = dry_run(
        "gpu_vm.sh", "run run_dir=/mnt/runs/a data.train=[a.jsonl]", HOSTS="me@one me@two"
    )
    command = "cd jaxdpo && launch/on_host.sh start run_dir=/mnt/runs/a 'data.train=[a.jsonl]'"
    environment = "export JAX_COORDINATOR_ADDRESS=one:8476 JAX_PROCESS_COUNT=2 JAX_PROCESS_ID"
    expected = [
        ["ssh", f"me@{host}", f"{environment}={i}; {command}"]
        for i, host in enumerate(("one", "two"))
    ]
    assert [shlex.split(line) for line in lines] == expected
