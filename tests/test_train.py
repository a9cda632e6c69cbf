"""`python -m jaxdpo.train` as it is typed: exit codes, output, SIGKILL, and a run on real pairs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.train import main
from tests.runs import folder_with_inputs, metrics, stop_after, untimed, use_one_device
from tests.tiny import params, rows, write_rows


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and rows."""
    return folder_with_inputs(tmp_path_factory.mktemp("train"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """See use_one_device."""
    use_one_device(monkeypatch)


def words(shared: Path, run_dir: Path, *more: str) -> list[str]:
    """A short run's command line."""
    sizes = [
        "data.max_length=32",
        "data.packed_length=64",
        "data.num_packed_lengths=1",
        "train.batch_size=2",
        "optim.learning_rate=1e-3",
    ]
    places = [
        f"run_dir={run_dir}",
        f"model.path={shared / 'model'}",
        f"data.train=[{shared / 'rows.jsonl'}]",
    ]
    return [
        *places,
        *sizes,
        "eval.every=0",
        "log.tensorboard=false",
        "train.compilation_cache=null",
        *more,
    ]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jaxdpo.train", *arguments]


def environment() -> dict[str, str]:
    """One device, and programs as users have them."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }


# --- in this process ---


def test_wrong_options_are_reported_all_at_once_and_no_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                f"run_dir={tmp_path / 'run'}",
                "loss.name=sigmiod",
                "data.trian=[a]",
                "seed=1",
                "seed=2",
            ]
        )
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    err = capsys.readouterr().err
    assert (
        "2 wrong options" in err
        and "Did you mean data.train?" in err
        and "seed is set twice" in err
    )
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "loss.name=sigmiod",
                "loss.label_smoothing=0.1",
                "loss.ref_sync_every=2",
                "reference=none",
            ]
        )
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert all(
        text in err
        for text in (
            "model.path=null",
            "data.train=[]",
            "Did you mean sigmoid?",
            "loss.ref_sync_every=2: moves a reference",
        )
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (["loss.name=hinge", "loss.label_smoothing=0.1"], "loss.label_smoothing=0.1"),
        (["loss.simpo_gamma=1"], "loss.simpo_gamma=1.0"),
        (["reference=none"], "reference=none"),
    ],
)
def test_loss_options_that_do_not_apply_are_errors(
    capsys: pytest.CaptureFixture[str], loss: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["model.path=m", "data.train=[a]", *loss])
    assert ended.value.code == 2 and f"  {expected}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.train=[{shared}/none.jsonl]", "data.train={shared}/none.jsonl"),
        ("model.path={shared}", "config.json"),
        ("data.max_length=600", "data.packed_length=64"),
        ("mesh.fsdp=3", "mesh.fsdp=3"),
    ],
)
def test_inputs_that_cannot_be_used_end_with_one_message(
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    expected: str,
) -> None:
    if word.startswith("mesh"):
        monkeypatch.undo()
    place, _, text = word.format(shared=shared).partition("=")
    given = [
        other for other in words(shared, tmp_path / "run") if not other.startswith(place + "=")
    ]
    try:
        assert main([*given, f"{place}={text}"]) == 1
    except SystemExit as ended:
        assert ended.code == 2
    err = capsys.readouterr().err
    assert expected.format(shared=shared) in err and "Traceback" not in err


def test_done_is_exit_code_0_and_a_run_resumes_from_its_config_file(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words(shared, tmp_path / "run"), "train.steps=2", "--print-config"])
    assert ended.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert main(["--config", str(tmp_path / "c.yaml")]) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    out = capsys.readouterr().out
    assert (
        "13 rows read, 13 parsed, 13 kept" in out
        and "step 2/2  loss 0." in out
        and "done: step 2 of 2" in out
    )
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        main(["--config", str(tmp_path / "run" / "config.yaml")]) == 0
    )  # what a run leaves runs again
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == saved


def test_sigterm_is_exit_code_75_and_a_fault_is_1_and_both_resume(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words(shared, tmp_path / "run"), "train.steps=4"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert main(given) == 75
    assert "stopped and saved: step 2 of 4" in capsys.readouterr().out
    assert main([*given, "loss.beta=3"]) == 1
    assert "loss.beta: 0.1 in the checkpoint, 3.0 now" in capsys.readouterr().err
    assert main(given) == 0
    assert "resuming after step 2" in capsys.readouterr().out


def test_dry_run_shows_everything_up_to_the_first_step(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(shared, tmp_path / "run"), "train.steps=3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "learning_rate: 0.001" in out and "--- rows.jsonl:" in out and "13 rows read" in out
    count = sum(leaf.size for leaf in jax.tree.leaves(params()))
    for text in (
        f"model: llama, {count:,} parameters, float32 matmuls",
        "first step: (1, 1, 64) microbatches x packed sequences x tokens",
        "compile: ",
        "memory of a device: ",
        "time: ",
        " for 3 steps",
    ):
        assert text in out, text


@pytest.mark.slow
def test_dry_run_says_what_is_trained_and_what_is_frozen(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "train.steps=3",
        "lora.rank=2",
        "lora.targets=[q,o]",
        "model.quantize=int8",
        "reference=cached",
    ]
    assert main([*words(shared, tmp_path / "run"), *more, "--dry-run"]) == 0
    out = capsys.readouterr().out
    everything = sum(leaf.size for leaf in jax.tree.leaves(params()))
    assert (
        f"lora: 512 weights trained (rank 2, scale 8, on q, o), {everything:,} frozen in int8"
        in out
    )
    assert (
        "reference=cached: the exact KL" in out
        and "time: " in out
        and not (tmp_path / "run").exists()
    )


# --- as a process ---


def test_the_exit_code_of_the_process(shared: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        command("loss.nam=x"), env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "Did you mean loss.name?" in ended.stderr and not ended.stdout
    assert not list(tmp_path.iterdir())


def killed(arguments: list[str], run_dir: Path, after: int, delay: float) -> int:
    """Kill a run some time after metrics.jsonl has step `after`; the steps logged by then."""
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path = run_dir / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and f'"step": {after}, ' in path.read_text():
                break
            time.sleep(0.01)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    return path.read_text().count('"grad_norm"')


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits_after_sigkill_at_any_moment(
    shared: Path, tmp_path: Path
) -> None:
    """SIGKILL in the first, second and third epoch, wherever the loop is by then."""
    many = write_rows(tmp_path / "rows.jsonl", rows(130))
    more = [
        f"data.train=[{many}]",
        "train.epochs=3",
        "checkpoint.save_every=7",
        "eval.every=11",
        f"train.compilation_cache={tmp_path / 'c'}",
    ]

    def given(name: str) -> list[str]:
        keys = {word.partition("=")[0] for word in more}
        return [
            word for word in words(shared, tmp_path / name) if word.partition("=")[0] not in keys
        ] + more

    subprocess.run(
        command(*given("whole")), env=environment(), check=True, stdout=subprocess.DEVNULL
    )
    total, epoch = (
        untimed(tmp_path / "whole")[-1]["step"],
        untimed(tmp_path / "whole")[-1]["step"] // 3,
    )
    chance = random.Random(time.time_ns())
    moments = [(epoch * i + chance.randrange(5, epoch - 10), chance.random() / 5) for i in range(3)]
    logged = [killed(given("killed"), tmp_path / "killed", *moment) for moment in moments]
    subprocess.run(
        command(*given("killed")), env=environment(), check=True, stdout=subprocess.DEVNULL
    )
    (step, ours, _), (_, theirs, _) = (
        restore_params(tmp_path / "killed"),
        restore_params(tmp_path / "whole"),
    )
    assert step == total > 150, (moments, logged)
    assert flat(ours) == flat(theirs) and untimed(tmp_path / "killed") == untimed(
        tmp_path / "whole"
    ), (moments, logged)


def flat(tree: dict) -> dict[str, bytes]:
    """Every array's bits, by path."""
    found = {}
    for key, value in tree.items():
        found |= (
            {f"{key}/{path}": bits for path, bits in flat(value).items()}
            if isinstance(value, dict)
            else {key: value.tobytes()}
        )
    return found


@pytest.mark.slow
def test_a_real_model_on_real_pairs(real_data: Path, tmp_path: Path) -> None:
    pairs, model = (
        real_data / "hh-rlhf" / "harmless-base-test.jsonl.gz",
        real_data / "models" / "stories260K",
    )
    arguments = [
        f"run_dir={tmp_path}",
        f"model.path={model}",
        f"data.train=[{pairs}]",
        "train.steps=30",
        "optim.learning_rate=1e-4",
    ]
    more = ["data.num_packed_lengths=1", "eval.every=30", "train.compilation_cache=null"]
    ended = subprocess.run(
        command(*arguments, *more), env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    (report,) = json.loads((tmp_path / "data_report.json").read_text())["sets"]["train"]
    assert (report["rows_read"], report["parsed"], report["kept"]) == (2312, 2299, 2299)
    assert {reason: entry["count"] for reason, entry in report["dropped"].items()} == {
        "empty answer": 4,
        "roles do not alternate": 4,
        "turn marker inside an answer": 5,
    }
    assert "2312 rows read, 2299 parsed, 2299 kept" in ended.stdout
    found = metrics(tmp_path)
    steps, evaluations = (
        [row for row in found if "loss" in row],
        [row for row in found if "eval/loss" in row],
    )
    # float32 rounding of log-probs of some hundred nats, times beta
    assert abs(steps[0]["loss"] - 0.693147) < 1e-5 and abs(steps[0]["rewards/margins"]) < 1e-5
    assert evaluations[0]["eval/rewards/margins"] == 0 < evaluations[-1]["eval/rewards/margins"]
    assert evaluations[-1]["eval/kl/token_exact"] > 0 == evaluations[0]["eval/kl/token_exact"]
