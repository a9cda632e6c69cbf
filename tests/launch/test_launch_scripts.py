"""The scripts of launch/ as they run: some for real, others with fake gcloud, srun and Python."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


def program(path: Path, text: str) -> Path:
    """A shell script that can be run."""
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


def wait_for(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


# --- on_host.sh ---

TRAINER = """
echo "$@"
[[ ${WORD:-} ]] && echo "word $WORD"
trap 'sleep 0.2; exit 75' TERM
case $3 in
  code=*) exit "${3#code=}" ;;
esac
while :; do sleep 0.05; done
"""
"""A fake Python: prints its arguments, and runs until SIGTERM or exits with a given status."""


class Host:
    """A machine with on_host.sh on it."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.environment = os.environ | {
            "JAXDPO_STATE": str(self.state),
            "PYTHON": str(program(folder / "python", TRAINER)),
        }

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LAUNCH / "on_host.sh", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def status(self) -> str:
        return self("status").stdout.strip()


def test_a_run_in_the_background_is_watched_and_stopped(tmp_path: Path) -> None:
    host = Host(tmp_path)
    assert host.status() == "idle"
    assert host("start", "steps=3", "a b").returncode == 0
    assert host.status() == "running"
    wait_for(lambda: host("logs", "-n", "+1").stdout == "-m jaxdpo.train steps=3 a b\n")
    refused = host("start")
    assert refused.returncode == 1 and "a run is going on" in refused.stderr
    assert host("stop").returncode == 0
    wait_for(lambda: host.status() == "exit 75")


def test_a_restart_stops_what_runs_and_reads_the_variables_of_the_machine(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host("start", "first")
    (host.state / "env").write_text("WORD=known\n")
    assert host("restart", "second").returncode == 0
    assert host.status() == "running"
    wait_for(lambda: host("logs", "-n", "2").stdout == "-m jaxdpo.train second\nword known\n")
    host("stop")


@pytest.mark.parametrize("code", [0, 1, 70])
def test_the_exit_status_of_a_run_is_stored(tmp_path: Path, code: int) -> None:
    host = Host(tmp_path)
    host("start", f"code={code}")
    wait_for(lambda: host.status() == f"exit {code}")


def test_a_run_without_process_or_exit_status_was_killed(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host("start")
    host("stop")
    wait_for(lambda: host.status() == "exit 75")
    # As after a power cut: a pid without a process.
    (host.state / "exit").unlink()
    assert host.status() == "exit 137"
    # Or the pid belongs to another process by now.
    (host.state / "pid").write_text(str(os.getpid()))
    assert host.status() == "exit 137"


def test_a_run_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    host = Host(tmp_path)
    program(tmp_path / "python", "trap '' TERM\nwhile :; do sleep 0.05; done")
    host.environment["STOP_SECONDS"] = "1"
    host("start")
    assert "ending it" in host("stop").stderr
    wait_for(lambda: host.status() == "exit 137")


# --- local_processes.sh ---


def local(folder: Path, script: str, count: int = 3) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHON": str(program(folder / "python", script)),
        "PORT": "1234",
        "JAX_PLATFORMS": "cpu",
    }
    command = [LAUNCH / "local_processes.sh", str(count), "x=1", "y=a b"]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def test_each_process_gets_its_id(tmp_path: Path) -> None:
    script = (
        'echo "$JAX_PROCESS_ID of $JAX_PROCESS_COUNT at $JAX_COORDINATOR_ADDRESS: '
        '$JAX_NUM_CPU_DEVICES $NPROC $*"'
    )
    started = local(tmp_path, script)
    printed, _ = started.communicate(timeout=60)
    devices = f"{os.environ.get('DEVICES', 1)} {os.environ['NPROC']}"
    expected = [
        f"{i} of 3 at 127.0.0.1:1234: {devices} -m jaxdpo.train x=1 y=a b" for i in range(3)
    ]
    assert sorted(printed.splitlines()) == expected and started.returncode == 0


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ((0, 0, 0), 0),
        ((0, 75, 0), 75),
        ((75, 0, 134), 134),
        ((134, 137, 75), 137),
        ((1, 75, 134), 1),
        ((75, 134, 2), 2),
        ((70, 0, 75), 70),
    ],
)
def test_the_exit_status_is_the_worst_of_all_processes(
    tmp_path: Path, codes: tuple[int, ...], worst: int
) -> None:
    started = local(
        tmp_path, f"codes=({' '.join(map(str, codes))}); exit ${{codes[$JAX_PROCESS_ID]}}"
    )
    started.communicate(timeout=60)
    assert started.returncode == worst


SAVER = """
import os, signal, sys, time
from pathlib import Path
me = os.environ["JAX_PROCESS_ID"]
got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
Path("ready" + me).touch()
while not got:
    time.sleep(0.02)
time.sleep(0.3 + 0.1 * int(me))
Path("saved" + me).write_text(" ".join(got))
sys.exit(75)
"""


@pytest.mark.parametrize(
    "to_all",
    [False, True],
    ids=["SIGTERM to the script", "Ctrl-C: SIGINT to the process group"],
)
def test_sigterm_reaches_every_process_once_and_all_are_waited_for(
    tmp_path: Path, to_all: bool
) -> None:
    (tmp_path / "saver.py").write_text(SAVER)
    started = local(tmp_path, f"exec {sys.executable} saver.py")
    wait_for(lambda: all((tmp_path / f"ready{i}").exists() for i in range(3)))
    if to_all:
        os.killpg(started.pid, signal.SIGINT)
    else:
        started.terminate()
    _, log = started.communicate(timeout=60)
    assert started.returncode == 75, log
    assert [(tmp_path / f"saved{i}").read_text() for i in range(3)] == ["SIGTERM"] * 3


# --- slurm.sbatch ---


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (75, 0, True),
        (75, 50, True),
        (1, 0, False),
        (2, 0, False),
        (134, 0, True),
        (70, 4, True),
        (137, 5, False),
    ],
)
def test_a_slurm_job_is_requeued_only_where_that_helps(
    tmp_path: Path, code: int, restarts: int, requeued: bool
) -> None:
    program(tmp_path / "srun", f'echo "srun $*"; exit {code}')
    program(tmp_path / "scontrol", 'echo "scontrol $*"')
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    environment = (
        os.environ
        | job
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "/venv/bin/python"}
    )
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "x=1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "srun --kill-on-bad-exit=0 /venv/bin/python -m jaxdpo.train x=1\n" in done.stdout
    assert ("scontrol requeue 7\n" in done.stdout) == requeued
    assert done.returncode == (0 if requeued else code)


# --- tpu_babysit.sh ---

GCLOUD = """
cd {folder}
echo "$*" >> calls
case "$*" in
  *"queued-resources describe"*)
    if [[ -f state ]]; then cat state; else echo "NOT_FOUND: no such thing" >&2; exit 1; fi ;;
  *"queued-resources create"*) [[ ! -f state ]] && echo ACTIVE > state && echo idle > job ;;
  *"queued-resources delete"*) rm -f state ;;
  *"on_host.sh status"*)
    [[ $(cat job) == idle ]] && echo idle && exit
    read -r answer < answers
    sed -i 1d answers
    case $answer in
      gone) echo SUSPENDED > state; exit 255 ;;
      silent) exit 255 ;;
      *) echo "$answer" ;;
    esac ;;
  *"on_host.sh start"* | *"on_host.sh restart"*) echo running > job ;;
esac
"""
"""A fake gcloud and TPU: `answers` holds the run's state, one line for each query."""


def babysit(folder: Path, answers: list[str], **variables: str) -> tuple[int, list[str]]:
    """Exit status, and the actions: create, push, start, restart, delete."""
    program(folder / "gcloud", GCLOUD.format(folder=folder))
    (folder / "answers").write_text("".join(f"{answer}\n" for answer in answers))
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(folder),
        "ZONE": "z",
        "POLL": "0",
        "SHARE": "h:/r",
    } | variables
    command = [LAUNCH / "tpu_babysit.sh", "--config", "x.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    words = {
        "resources create": "create",
        "on_host.sh install": "push",
        "on_host.sh start": "start",
        "on_host.sh restart": "restart",
    }
    words |= {"resources delete": "delete"}
    calls = (folder / "calls").read_text().splitlines()
    return done.returncode, [name for call in calls for part, name in words.items() if part in call]


BEGIN = ["create", "push", "start"]


def test_a_run_is_started_watched_and_cleared_away(tmp_path: Path) -> None:
    assert babysit(tmp_path, ["running", "running", "exit 0"]) == (0, [*BEGIN, "delete"])
    calls = (tmp_path / "calls").read_text()
    assert (
        "jaxdpo && launch/on_host.sh start --config x.yaml\n" in calls and "--worker=all" in calls
    )


def test_a_preempted_machine_is_replaced(tmp_path: Path) -> None:
    assert babysit(tmp_path, ["running", "gone", "running", "gone", "exit 0"]) == (
        0,
        [*BEGIN, *["delete", *BEGIN] * 2, "delete"],
    )


def test_a_saved_run_is_resumed_and_a_lost_connection_is_not_an_end(tmp_path: Path) -> None:
    answers = ["exit 75", "running", "silent", "silent", "exit 134", "exit 0"]
    assert babysit(tmp_path, answers) == (0, [*BEGIN, "restart", "restart", "delete"])


@pytest.mark.parametrize("code", [1, 2])
def test_a_fault_stops_it(tmp_path: Path, code: int) -> None:
    assert babysit(tmp_path, ["running", f"exit {code}"]) == (code, [*BEGIN, "delete"])


def test_it_does_not_restart_for_ever(tmp_path: Path) -> None:
    answers = list(itertools.repeat("exit 137", 9))
    assert babysit(tmp_path, answers, FAULTS="2") == (137, [*BEGIN, "restart", "restart", "delete"])


@pytest.mark.parametrize("variables", [{"SHARE": ""}, {"KEEP": "1"}])
def test_a_machine_that_holds_the_run_is_kept(tmp_path: Path, variables: dict[str, str]) -> None:
    assert babysit(tmp_path, ["exit 0"], **variables) == (0, BEGIN)


def test_the_pushed_archive_can_be_installed(tmp_path: Path) -> None:
    """It has all that `pip install` reads."""
    program(tmp_path / "scp", f'cp "$1" {tmp_path}/sent.tar.gz')
    program(tmp_path / "ssh", f'echo "$2" > {tmp_path}/asked')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTS": "me@there"}
    subprocess.run([LAUNCH / "gpu_vm.sh", "push"], env=environment, check=True, timeout=60)
    listed = subprocess.run(
        ["tar", "-tzf", tmp_path / "sent.tar.gz"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "jaxdpo/train.py",
        "launch/on_host.sh",
        "configs/hh-rlhf.yaml",
    } <= set(listed)
    assert not [name for name in listed if "__pycache__" in name]
    asked = shlex.split((tmp_path / "asked").read_text())
    assert asked[-3:] == ["launch/on_host.sh", "install", "cuda13"]
