"""preflight: what it finds on a machine that is ready, and each problem that a machine may have."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxdpo import preflight
from jaxdpo.utils import files
from tests.tiny import config, rows, write_model, write_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", rows(8))
    return folder


def findings(folder: Path, **changes: object) -> dict[str, preflight.Finding]:
    return {finding.about: finding for finding in preflight.preflight(config(folder, **changes))}


def test_a_machine_that_is_ready(inputs: Path, tmp_path: Path) -> None:
    found = findings(
        inputs, run_dir=str(tmp_path / "run"), train__compilation_cache=str(tmp_path / "cache")
    )
    assert list(found) == ["versions", "devices", "memory", "model", "data", "run_dir", "cache"]
    assert [finding for finding in found.values() if not finding.ok] == []
    assert f"jax {jax.__version__}" in found["versions"].text
    assert found["devices"].text.startswith(f"{jax.device_count()} x ")
    assert "data 8" in found["model"].text
    assert "64 MiB written and read back" in found["run_dir"].text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "checkpoints", "run"], (
        "nothing is left but the folders"
    )


PROBLEMS = [
    (
        "model",
        {"model": {"path": "/nowhere"}},
        "model.path=/nowhere: is neither a local folder nor a model on the hub that can be fetched",
    ),
    ("model", {"mesh": {"fsdp": 3}}, "mesh.fsdp=3"),
    ("data", {"data": {"train": ["/nowhere.jsonl"]}}, "data.train=/nowhere.jsonl"),
    (
        "run_dir",
        {"run_dir": "/proc/run"},
        "run_dir=/proc/run: cannot write to /proc/run",
    ),
    (
        "cache",
        {"train__compilation_cache": "/proc/cache"},
        "train.compilation_cache=/proc/cache: cannot write there",
    ),
]


@pytest.mark.parametrize(
    ("about", "changes", "message"),
    PROBLEMS,
    ids=[message.split(":")[0] for *_, message in PROBLEMS],
)
def test_each_problem_is_reported_with_its_option(
    inputs: Path,
    tmp_path: Path,
    about: str,
    changes: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "PROBE_BYTES", 1000)
    found = findings(inputs, **({"run_dir": str(tmp_path / "run")} | changes))
    assert [name for name, finding in found.items() if not finding.ok] == [about]
    assert message in found[about].text


def test_truncated_weight_files(inputs: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    found = findings(inputs, model={"path": str(tmp_path / "model")}, run_dir=str(tmp_path / "run"))
    assert not found["model"].ok and "model.safetensors" in found["model"].text


def test_data_whose_rows_are_all_dropped(inputs: Path, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "same.jsonl", [{"prompt": "w1", "chosen": " w2", "rejected": " w2"}]
    )
    found = findings(inputs, data__train=[path], run_dir=str(tmp_path / "run"))
    assert not found["data"].ok and "no row that can be used" in found["data"].text


def test_a_disk_without_room(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = findings(
        inputs, run_dir=str(tmp_path / "run"), train__compilation_cache=str(tmp_path / "cache")
    )
    assert [name for name, finding in found.items() if not finding.ok] == ["run_dir", "cache"]
    assert "1,000" in found["run_dir"].text and "1,000" in found["cache"].text


def test_an_accelerator_that_jax_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "ACCELERATORS", {str(tmp_path): "a machine that is not used"})
    assert "8 x" in preflight.devices()
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ValueError, match="a machine that is not used"):
        preflight.devices()


def test_memory_that_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MIN_MEMORY", 1 << 60)
    with pytest.raises(ValueError, match="are free: end what takes it"):
        preflight.memory()


def test_the_command_on_a_machine_that_is_ready_and_on_one_that_is_not(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"model.path={inputs}/model",
        f"data.train=[{inputs}/rows.jsonl]",
        f"run_dir={tmp_path}/run",
        "data.eval_fraction=0.2",
    ]
    assert preflight.main([*arguments, "train.compilation_cache=null"]) == 0
    assert "\nok      model     llama, 19,616 parameters" in capsys.readouterr().out
    assert preflight.main([*arguments, "train.compilation_cache=/proc/cache"]) == 1
    assert (
        "\nPROBLEM cache     train.compilation_cache=/proc/cache: cannot write there"
        in capsys.readouterr().out
    )


def test_a_machine_on_which_jax_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["model.path=x", "data.train=[y]", "eval.every=0"]

    def no_devices() -> None:
        raise RuntimeError("there is no such backend")

    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", no_devices)
        assert preflight.main(arguments) == 1
    assert (
        capsys.readouterr().err
        == "jaxdpo.preflight: JAX cannot start here: there is no such backend\n"
    )
    monkeypatch.setenv("NNODES", "2")
    assert preflight.main(arguments) == 1
    assert "JAX_PROCESS_ID or NODE_RANK" in capsys.readouterr().err


IN_A_FOLDER_EACH = """#!/bin/sh
[ "$1" = -m ] || exec {python} "$@"
mkdir -p {folder}/$JAX_PROCESS_ID && cd {folder}/$JAX_PROCESS_ID
exec {python} -c "import sys; from jaxdpo import preflight as p; p.VISIBLE_SECONDS = 1
sys.exit(p.main(sys.argv[3:]))" "$@"
"""


@pytest.mark.slow
def test_the_command_in_two_processes_with_a_folder_each(inputs: Path, tmp_path: Path) -> None:
    """run_dir is relative and the processes have different working folders, so neither would find
    what the other saved."""
    arguments = [
        f"model.path={inputs}/model",
        f"data.train=[{inputs}/rows.jsonl]",
        "run_dir=run",
        "data.eval_fraction=0.2",
    ]
    arguments.append("train.compilation_cache=null")
    fake = tmp_path / "python"
    fake.write_text(IN_A_FOLDER_EACH.format(python=sys.executable, folder=tmp_path))
    fake.chmod(0o755)
    environment = os.environ | {
        "PYTHON": str(fake),
        "MODULE": "jaxdpo.preflight",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [ROOT / "launch" / "local_processes.sh", "2", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    problem = "run_dir=run: is not the folder that the first process writes to"
    assert f"process 1: PROBLEM shared    {problem}" in done.stdout
    assert "process 0: ok      shared" in done.stdout


@pytest.mark.parametrize("every", [None, 5])
def test_data_of_one_prompt_hold_nothing_out(
    inputs: Path, tmp_path: Path, every: int | None
) -> None:
    row = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    path = write_rows(tmp_path / "one.jsonl", [row, row | {"chosen": " w4"}])
    changes: dict[str, Any] = {"data__train": [path], "run_dir": str(tmp_path / "run")}
    found = findings(inputs, **changes, eval__every=every)["split"]
    assert found.ok is (every is None) and "no pair is held out" in found.text
    off = findings(inputs, **changes, data__eval_fraction=0.0)
    assert "split" not in off
