"""Unknown options: names of other frameworks get ours, others the most similar name or none."""

import dataclasses
from pathlib import Path

import pytest

from jaxdpo.config import cli, sections
from jaxdpo.config.foreign_names import FOREIGN_NAMES, foreign_hint
from jaxdpo.config.schema import Config
from tests.config.command_line import NEEDED, complaints


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("data.tran=[a]", "data.train"),
        ("optim.learning_rate_=1", "optim.learning_rate"),
        ("modl.path=x", "model.path"),
        ("learning_rate=1", "optim.learning_rate"),
        ("Seed=1", "seed"),
    ],
)
def test_unknown_options_get_the_nearest_name(
    capsys: pytest.CaptureFixture[str], word: str, near: str
) -> None:
    (told,) = complaints(capsys, *NEEDED, word)
    assert told == f"{word.partition('=')[0]}: there is no such option. Did you mean {near}?"


@pytest.mark.parametrize("word", ["zzz=1", "data.abc=1", "log.bucket=1", "loss.reward=1"])
def test_nothing_is_guessed_where_no_name_is_similar(
    capsys: pytest.CaptureFixture[str], word: str
) -> None:
    (told,) = complaints(capsys, *NEEDED, word)
    assert told == f"{word.partition('=')[0]}: there is no such option."


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("optim.lr=1e-6", "Did you mean optim.learning_rate?"),
        ("train.warmup_ratio=0.1", "Did you mean optim.warmup_ratio?"),
        (
            "optim.warmup=10",
            "Did you mean optim.warmup_steps (a number of steps) or optim.warmup_ratio "
            "(a share of them)?",
        ),
        (
            "log.use_wandb=true",
            "Did you mean log.tensorboard (TensorBoard and metrics.jsonl; W&B is not supported)?",
        ),
        (
            "train.gradient_accumulation=4",
            "It is computed from train.batch_size and data.packed_length (gradient accumulation)",
        ),
        (
            "per_device_train_batch_size=2",
            "Did you mean train.batch_size (the global batch, over all devices and microbatches)?",
        ),
        (
            "train.gradient_accumulation_steps=4",
            "It is computed from train.batch_size and data.packed_length (gradient accumulation)",
        ),
        (
            "log.wandb=true",
            "Did you mean log.tensorboard (TensorBoard and metrics.jsonl; W&B is not supported)?",
        ),
        ("bf16=true", "Did you mean model.compute_dtype (bfloat16 or float32)?"),
        ("precompute_ref_log_probs=true", "Did you mean reference=cached?"),
        ("beta=0.1", "Did you mean loss.beta?"),
    ],
)
def test_names_of_other_frameworks_get_ours(
    capsys: pytest.CaptureFixture[str], word: str, hint: str
) -> None:
    (told,) = complaints(capsys, *NEEDED, word)
    assert told == f"{word.partition('=')[0]}: there is no such option. {hint}"


def test_arguments_as_other_frameworks_write_them_are_answered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert complaints(capsys, *NEEDED, "--per-device-eval-batch-size", "--learning_rate=1e-6") == [
        "--per-device-eval-batch-size: not understood. Options are written section.field=value. "
        "It is computed from train.batch_size",
        "--learning_rate=1e-6: not understood. Options are written section.field=value. "
        "Did you mean optim.learning_rate?",
    ]


def test_the_file_of_another_framework_is_answered_name_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "levanter.yaml"
    path.write_text("trainer:\n  train_batch_size: 64\n  mp: f32\nbeta: 0.1\n")
    told = complaints(capsys, *NEEDED, "--config", str(path))
    assert [line.split(":")[0] for line in told] == [
        "beta",
        "trainer.train_batch_size",
        "trainer.mp",
    ]
    assert all("Did you mean" in line for line in told)


def test_answers_to_other_frameworks_name_options_that_exist() -> None:
    options = {name for name, *_ in cli.fields(Config)}
    for name in FOREIGN_NAMES:
        hint = foreign_hint(name, options)
        assert hint is not None, f"{name}: mentions what is no option"
        assert name not in options or hint == f"Did you mean {name}?"


def test_answers_to_other_frameworks_do_not_name_options_of_other_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Small:
        """A command's options."""

        __pydantic_config__ = sections.STRICT_KEYS
        step: int = 0

    with pytest.raises(SystemExit):
        cli.load(Small, ["learning_rate=1"], command="small")
    assert "learning_rate: there is no such option.\n" in capsys.readouterr().err
