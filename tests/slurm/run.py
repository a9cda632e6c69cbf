"""launch/slurm.sbatch on a real SLURM cluster of this machine: SIGTERM, save, requeue, resume.

    python tests/slurm/run.py             SIGTERM by scancel after a third of the steps (2 minutes)
    python tests/slurm/run.py --limit 2   SIGTERM from SLURM before the time limit of two minutes;
                                          also a cancelled job that must not come back

Two tasks train. They must end with the bits of an uninterrupted run. It needs slurmctld, slurmd and
munge (Debian: apt-get install slurmctld slurmd slurm-client munge), no systemd and no
configuration: everything is in a temporary folder and is stopped at the end. Without them it says
so and ends with 0.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from jaxdpo.checkpoints.restore import restore_params  # noqa: E402
from tests.runs import untimed  # noqa: E402
from tests.tiny import rows, write_model, write_rows  # noqa: E402

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
STEPS = 120
SAVE_EVERY = 50
PATIENCE = 1800.0
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: a requeued job starts when its old credentials have expired, by default in 2 minutes.


class Failure(Exception):
    """SLURM or the run did not do what it should."""


def main() -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        help="time limit in minutes, which the run exceeds. SLURM signals up to 80 s before it",
    )
    limit = parser.parse_args().limit
    # An exception, so that the daemons are stopped on SIGTERM.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        print(
            f"skipped: {', '.join(missing)} not installed "
            "(apt-get install slurmctld slurmd slurm-client munge)"
        )
        return 0
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        try:
            figures = check(folder, limit)
        except (Failure, subprocess.SubprocessError) as failure:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}")
                print(*log.read_text(errors="replace").splitlines()[-40:], sep="\n")
            print(f"FAILED: {failure}")
            return 1
    print(json.dumps(figures, indent=1))
    return 0


def check(folder: Path, limit: int) -> dict[str, Any]:
    """The uninterrupted run and the requeued one; returns the figures to print."""
    environment = prepare(folder)
    started = time.monotonic()
    straight = [
        str(ROOT / "launch" / "local_processes.sh"),
        "2",
        *arguments(folder, "straight", 20),
    ]
    steps = STEPS
    if limit:
        # As many steps as exceed the limit, by the step time of a short run.
        subprocess.run(straight, env=environment, check=True, cwd=folder, timeout=PATIENCE)
        rows_logged = metrics(folder / "straight")
        per_step = sorted(row["step_seconds"] for row in rows_logged if "step_seconds" in row)[10]
        shutil.rmtree(folder / "straight")
        steps = max(STEPS, round(60 * limit / per_step))
    straight[2:] = arguments(folder, "straight", steps)
    subprocess.run(straight, env=environment, check=True, cwd=folder, timeout=PATIENCE)
    alone = time.monotonic() - started
    with slurm(folder, environment):
        version = output(["sinfo", "--version"], environment).strip()
        figures = interrupted(folder, environment, steps, limit)
        if limit:
            cancelled(folder, environment)
    if not same_bits(folder / "straight", folder / "queued"):
        raise Failure("the requeued run did not end with the bits of the uninterrupted one")
    return {
        "slurm": version,
        "steps": steps,
        "uninterrupted_seconds": round(alone, 1),
        **figures,
        "same_parameters_and_metrics": True,
    }


def prepare(folder: Path) -> dict[str, str]:
    """Inputs of the runs, and the environment of both."""
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", rows(60))
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "NPROC": "32"}
    flags |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    return (
        dict(os.environ)
        | flags
        | {"PYTHON": sys.executable, "SLURM_CONF": str(folder / "slurm.conf")}
    )


def arguments(folder: Path, name: str, steps: int) -> list[str]:
    """The options of a run of two processes with fsdp."""
    return [
        f"model.path={folder}/model",
        f"data.train=[{folder}/rows.jsonl]",
        f"run_dir={folder}/{name}",
        "data.eval_fraction=0.2",
        "data.max_length=32",
        "data.packed_length=64",
        "data.num_packed_lengths=1",
        "optim.learning_rate=1e-3",
        "train.batch_size=4",
        f"train.steps={steps}",
        "eval.every=0",
        f"checkpoint.save_every={SAVE_EVERY}",
        "log.tensorboard=false",
        "mesh.fsdp=2",
        f"train.compilation_cache={folder}/cache",
    ]


@contextlib.contextmanager
def slurm(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A SLURM cluster of this machine alone."""
    host = socket.gethostname().split(".")[0]
    user = output(["id", "-un"], environment).strip()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, folder=folder, user=user, ports=free_ports(2))
    )
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    paths = [
        f"--{name}={folder}/munge.{name.split('-')[0]}"
        for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    daemons = [
        ["munged", "--foreground", "--force", *paths],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    with contextlib.ExitStack() as stack:
        for daemon in daemons:
            stack.enter_context(running(daemon, folder, environment))
            time.sleep(1)
        wait_for(
            lambda: output(["sinfo", "--noheader", "--format=%T"], environment).strip() == "idle",
            "the node is idle",
            60,
        )
        try:
            yield
        finally:
            subprocess.run(["scancel", "--user", user], env=environment)
            wait_for(
                lambda: not output(["squeue", "--noheader"], environment).strip(),
                "no job is left",
                60,
            )


@contextlib.contextmanager
def running(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A daemon in the foreground, its output in a log."""
    with (folder / f"{command[0]}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def free_ports(count: int) -> list[int]:
    """Ports that no process listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def submit(folder: Path, environment: dict[str, str], name: str, steps: int, *more: str) -> str:
    """Submit launch/slurm.sbatch for two tasks on this machine; returns the job id."""
    machine = [
        "--nodes=1",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "--gpus-per-node=0",
        f"--output={folder}/{name}.log",
    ]
    file = str(ROOT / "launch" / "slurm.sbatch")
    return output(
        ["sbatch", "--parsable", *machine, *more, file, *arguments(folder, name, steps)],
        environment,
    ).strip()


def interrupted(
    folder: Path, environment: dict[str, str], steps: int, limit: int
) -> dict[str, Any]:
    """A job that gets SIGTERM, is requeued and finishes; returns the figures to print."""
    times = [f"--time={limit}", "--signal=TERM@20"] if limit else ["--time=30"]
    began = time.monotonic()
    job = submit(folder, environment, "queued", steps, *times)
    if not limit:
        wait_for(
            lambda: len(metrics(folder / "queued")) >= steps // 3, "a third of the steps are done"
        )
        output(["scancel", "--signal=TERM", job], environment)
    log = folder / "queued.log"
    wait_for(
        lambda: f"job {job}: exit 75" in log.read_text(), "the processes saved and ended with 75"
    )
    to_save = time.monotonic() - began
    last = metrics(folder / "queued")[-1]["step"] if metrics(folder / "queued") else 0
    if last >= steps:
        raise Failure("the run was done before the signal came")
    wait_for(
        lambda: f"job {job}, start 2" in log.read_text(), "the job is requeued and starts again"
    )
    wait_for(lambda: f"job {job}: exit 0" in log.read_text(), "the requeued job is done")
    text = log.read_text()
    restarts = text.count(f"job {job}, start ") - 1
    resumed = [int(line.split()[-1]) for line in text.splitlines() if "resuming after step" in line]
    if not resumed or resumed[0] < last:
        raise Failure(
            f"step {last} was done when the signal came, but it was resumed after {resumed}"
        )
    found = [row["step"] for row in metrics(folder / "queued")]
    if found != list(range(1, steps + 1)):
        raise Failure("metrics.jsonl does not hold each step once")
    seconds = round(time.monotonic() - began, 1)
    signalled = (
        f"SLURM, before the time limit of {limit} minutes" if limit else "scancel --signal=TERM"
    )
    return {
        "signal": signalled,
        "seconds_to_exit_75": round(to_save, 1),
        "resumed_after_steps": resumed,
        "restarts": restarts,
        "queued_seconds": seconds,
    }


def cancelled(folder: Path, environment: dict[str, str]) -> None:
    """A job that its user cancels saves too, and is not requeued."""
    job = submit(folder, environment, "cancelled", 100_000, "--time=30")
    wait_for(lambda: len(metrics(folder / "cancelled")) >= 3, "the job to be cancelled trains")
    output(["scancel", job], environment)
    wait_for(
        lambda: not output(["squeue", "--noheader"], environment).strip(),
        "the cancelled job is gone",
        120,
    )
    time.sleep(20)
    state = output(["scontrol", "show", "job", job], environment)
    if "JobState=CANCELLED" not in state or "Restarts=0" not in state:
        raise Failure(f"the cancelled job came back:\n{state}")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The complete rows of metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same parameters and metrics."""
    (step, params, _), (other_step, other_params, _) = restore_params(one), restore_params(other)
    return (
        step == other_step and flat(params) == flat(other_params) and untimed(one) == untimed(other)
    )


def flat(tree: Any, name: str = "") -> dict[str, bytes]:
    """The bytes of every array of a nested dict."""
    if isinstance(tree, dict):
        return {
            path: value
            for key, branch in tree.items()
            for path, value in flat(branch, f"{name}/{key}").items()
        }
    return {name: tree.tobytes()}


def output(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise Failure(f"{' '.join(command[:3])}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wait_for(is_so: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Poll once a second."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(FileNotFoundError):
            if is_so():
                return
        if time.monotonic() > until:
            raise Failure(f"after {seconds:.0f} s it is still not the case that {what}")
        time.sleep(1)


if __name__ == "__main__":
    raise SystemExit(main())
