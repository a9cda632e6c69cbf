"""Several real processes on loopback are one run: same numbers, any number resumes it, no hangs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.distributed import processes
from tests.runs import metrics, untimed

ROOT = Path(__file__).parents[2]


def test_alone_everything_is_agreed_at_once() -> None:
    assert (
        processes.any_of(True) is True and processes.any_of(False) is False and processes.is_first()
    )
    assert (
        processes.from_first({"a": [1, None]}) == {"a": [1, None]}
        and processes.on_first(lambda: 3) == 3
    )
    assert (
        processes.differing({"a": "x", "b": "y"}) == []
        and processes.differing({}) == []
        and processes.end(4) == 4
    )
    votes = processes.Votes()
    assert [votes.cast(vote) for vote in (0, 2, 1)] == [0, 2, 1]
    with pytest.raises(ValueError, match="no"):
        processes.on_first(lambda: (_ for _ in ()).throw(ValueError("no")))


# --- real processes ---

TOTAL = 12


def start(
    shared: Path, run_dir: Path, processes: int, *more: str, devices: int = 1, steps: int = TOTAL
) -> list[subprocess.Popen[str]]:
    """The processes of a run, which print into files in its folder."""
    run_dir.mkdir(exist_ok=True)
    words = [
        f"run_dir={run_dir}",
        f"model.path={shared / 'model'}",
        f"data.train=[{shared / 'rows.jsonl'}]",
        f"train.steps={steps}",
    ]
    words += [
        "data.max_length=32",
        "data.packed_length=64",
        "data.num_packed_lengths=1",
        "data.eval_fraction=0.3",
        "data.cache=null",
    ]
    words += [
        "train.batch_size=4",
        "optim.learning_rate=1e-3",
        "log.tensorboard=false",
        f"train.compilation_cache={shared / 'cache'}",
    ]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAXDPO_HEARTBEAT_SECONDS": "10",
    }
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_COUNT": str(processes)}
    started = []
    for number in range(processes):
        own = {"JAX_PROCESS_ID": str(number)} if processes > 1 else {}
        command = [sys.executable, "-m", "jaxdpo.train", *words, *more]
        with (run_dir / f"out-{number}.txt").open("w") as out:
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment | own, stdout=out, stderr=out, text=True
                )
            )
    return started


def ended(run: Sequence[subprocess.Popen[str]], seconds: float = 240) -> list[int]:
    """Exit statuses; all are killed when they take too long."""
    until = time.monotonic() + seconds
    try:
        return [process.wait(max(1.0, until - time.monotonic())) for process in run]
    finally:
        for process in run:
            process.kill()
            process.wait()


def told(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run_dir.glob("out-*.txt")))


def wait_for_rows(run: Sequence[subprocess.Popen[str]], run_dir: Path, count: int) -> None:
    """Return when so many steps are logged."""
    path, until = run_dir / "metrics.jsonl", time.monotonic() + 240
    while not path.exists() or path.read_text().count('"loss"') < count:
        assert time.monotonic() < until and all(process.poll() is None for process in run), told(
            run_dir
        )
        time.sleep(0.05)


KEYS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "logps/chosen",
    "logps/rejected",
    "eval/loss",
    "epoch",
    "tokens",
)


def same(ours: Path, theirs: Path, step: int, tolerance: float = 1e-6) -> None:
    """Two runs agree in metrics and parameters."""
    one, other = metrics(ours), metrics(theirs)
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for a, b in zip(one, other, strict=True):
        for key in a.keys() & set(KEYS):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (key, a["step"])
    trees: list[dict[str, Any]] = [restore_params(run, step)[1] for run in (ours, theirs)]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.fixture(scope="module")
def alone(shared: Path) -> Path:
    """The run of one process on one device."""
    assert ended(start(shared, shared / "alone", 1, "eval.every=5", "checkpoint.save_every=4")) == [
        0
    ], told(shared / "alone")
    return shared / "alone"


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_resumes_their_checkpoint(
    shared: Path, alone: Path, tmp_path: Path
) -> None:
    """One of them gets the signal, and both stop after the same step."""
    both = start(
        shared, tmp_path, 2, "eval.every=5", "checkpoint.save_every=4", "mesh.fsdp=2", "log.every=1"
    )
    wait_for_rows(both, tmp_path, 5)
    both[1].send_signal(signal.SIGTERM)
    codes = ended(both)
    assert codes in ([75, 75], [0, 0]), told(tmp_path)
    stopped_at = restore_params(tmp_path)[0]
    assert stopped_at == max(row["step"] for row in metrics(tmp_path)) and (codes == [0, 0]) == (
        stopped_at == TOTAL
    )
    assert (tmp_path / "out-1.txt").read_text().count("step") <= 1, (
        "the first process alone tells what happens"
    )
    assert ended(start(shared, tmp_path, 1, "eval.every=5", "checkpoint.save_every=4")) == [0], (
        told(tmp_path)
    )
    same(tmp_path, alone, TOTAL)


@pytest.mark.slow
@pytest.mark.parametrize("waiting", ["[]", "[reference,moments]"])
def test_four_processes_resume_the_checkpoint_of_one(
    shared: Path, alone: Path, tmp_path: Path, waiting: str
) -> None:
    """On a mesh of another form, over other processes, perhaps with state in other memories."""
    first = start(shared, tmp_path, 1, "eval.every=5", "checkpoint.save_every=4")
    wait_for_rows(first, tmp_path, 4)
    first[0].send_signal(signal.SIGTERM)
    assert ended(first)[0] in (75, 0), told(tmp_path)
    four = [
        "eval.every=5",
        "checkpoint.save_every=4",
        "mesh.data=2",
        "mesh.fsdp=2",
        f"train.offload={waiting}",
    ]
    assert ended(start(shared, tmp_path, 4, *four)) == [0] * 4, told(tmp_path)
    same(tmp_path, alone, TOTAL, tolerance=1e-6 if waiting == "[]" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes(
    shared: Path, tmp_path: Path, victim: int
) -> None:
    """And then ends in the same bits as processes that nobody disturbed."""
    options, steps = ("eval.every=0", "checkpoint.save_every=5", "log.every=1"), 80
    both = start(shared, tmp_path, 2, *options, steps=steps)
    wait_for_rows(both, tmp_path, 12)
    both[victim].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    code = ended([both[1 - victim]], 60)[0]
    assert code == 75 or code < 0, (code, told(tmp_path))  # by itself, or by JAX (SIGABRT)
    assert time.monotonic() - killed_at < 10 + 10, "the heartbeat's ten seconds, and ten more"
    ended([both[victim]])
    assert 5 <= restore_params(tmp_path)[0] < steps
    unbroken = shared / "unbroken"
    if not unbroken.exists():
        assert ended(start(shared, unbroken, 2, *options, steps=steps)) == [0, 0], told(unbroken)
    assert ended(start(shared, tmp_path, 2, *options, steps=steps)) == [0, 0], told(tmp_path)
    states = [restore_params(run, steps)[1] for run in (tmp_path, unbroken)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *states))) and untimed(
        tmp_path
    ) == untimed(unbroken)


@pytest.mark.slow
def test_fewer_processes_resume_the_checkpoint_of_four(
    shared: Path, alone: Path, tmp_path: Path
) -> None:
    options = ("eval.every=5", "checkpoint.save_every=4")
    four = start(shared, tmp_path / "four", 4, *options, "mesh.data=2", "mesh.fsdp=2")
    wait_for_rows(four, tmp_path / "four", 1)
    four[2].send_signal(signal.SIGTERM)
    assert ended(four) == [75] * 4, told(tmp_path / "four")
    assert 1 <= restore_params(tmp_path / "four")[0] < TOTAL
    for fewer in (1, 2):
        run_dir = tmp_path / str(fewer)
        shutil.copytree(tmp_path / "four", run_dir)
        assert ended(start(shared, run_dir, fewer, *options)) == [0] * fewer, told(run_dir)
        same(run_dir, alone, TOTAL)


@pytest.mark.slow
def test_a_run_of_two_processes_has_one_owner_and_is_refused_a_second_time(
    shared: Path, tmp_path: Path
) -> None:
    first = start(shared, tmp_path, 2, steps=4000)
    wait_for_rows(first, tmp_path, 2)
    printed = [(tmp_path / f"out-{number}.txt").read_text() for number in range(2)]
    owner = json.loads((tmp_path / ".lock").read_text())
    assert owner["pid"] == first[0].pid
    try:
        assert ended(start(shared, tmp_path, 2, steps=4000)) == [1, 1]
        for number in range(2):
            said = (tmp_path / f"out-{number}.txt").read_text()
            assert f"this run is going on already (process {first[0].pid} on " in said, printed
    finally:
        first[0].send_signal(signal.SIGTERM)
    assert ended(first) == [75, 75]
    assert not (tmp_path / ".lock").exists()
    steps = [row["step"] for row in metrics(tmp_path) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_processes_that_were_started_differently_are_refused(shared: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    program = f"""
import json, sys
from jaxdpo.distributed import processes
processes.connect({{
    "JAX_COORDINATOR_ADDRESS": "{address}",
    "JAX_PROCESS_COUNT": "2",
    "JAX_PROCESS_ID": sys.argv[1],
}})
number = int(sys.argv[1])
votes = processes.Votes()
cast = [votes.cast(vote) for vote in ((0, 2, 0), (1, 0, 0))[number]]
try:
    refused = processes.on_first(lambda: (_ for _ in ()).throw(ValueError("full")))
except ValueError as error:
    refused = str(error)
differ = processes.differing({{"x": "1", "y": sys.argv[1]}})
any_of = processes.any_of(number == 1)
print(json.dumps([any_of, processes.from_first({{"a": number}}), differ, cast, refused]))
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=240)[0].splitlines()[-1] for process in both]
    assert [json.loads(line) for line in said] == [[True, {"a": 0}, ["y"], [0, 1, 2], "full"]] * 2
