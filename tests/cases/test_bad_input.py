"""Input that is wrong or hostile, from `cases/bad-input` beside the real data: each command ends in
time, with the exit code and the reason that the README there calls right."""

import os
from pathlib import Path

import pytest

from tests.cases.commands import SHORT_RUN, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def bad(cases: Path) -> Path:
    return cases / "bad-input"


def test_bad_options(bad: Path, home: Path, tmp_path: Path) -> None:
    deep = run(home, "train", "--print-config", "--config", bad / "cfg-yaml-deep/c.yaml")
    assert deep.code == 2 and "nested too deeply" in deep.err
    endless = run(home, "train", "--config", "/dev/zero")
    assert endless.code == 2 and "--config /dev/zero" in endless.err
    words = ("optim.learning_rate=1e300", "train.steps=true", "seed=false")
    huge = ("data.packed_length=9000000000000000", "train.batch_size=10000000000")
    wrong = run(home, "train", "model.path=~nosuchuser/m", *words, *huge)
    assert wrong.code == 2
    for word in ("model.path=~nosuchuser/m", "optim.learning_rate=", *words[1:], *huge):
        assert word.replace("true", "True").replace("false", "False") in wrong.err


@pytest.mark.parametrize(
    "env", [{}, {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_a_path_with_an_umlaut(
    cases: Path, home: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    done = run(
        home,
        "train",
        f"run_dir={tmp_path / 'rün'}",
        "model.path=models/chatml",
        f"data.train=[{cases / 'chat/chat.jsonl'}]",
        "train.steps=1",
        "data.num_packed_lengths=1000000000",
        *SHORT_RUN,
        env=env,
    )
    assert done.code == 0, done.said
    assert (tmp_path / "rün/checkpoints/1").is_dir()


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("data-null-columns/x.jsonl", "no usable pair"),
        ("data-csv-nul/x.csv", "x.csv:2: "),
        ("data-arrow-list-null/x.arrow", "no usable pair"),
        ("data-arrow-neg-offsets/x.arrow", "x.arrow: not a readable Arrow file"),
        ("data-oasst-cycle/x.jsonl", "no usable pair"),
        ("train-margin-1e39/x.jsonl", "x.jsonl:1: column 'margin' is 1e+39"),
    ],
)
def test_bad_rows(bad: Path, home: Path, file: str, reason: str) -> None:
    done = run(home, "data", f"data.train=[{bad / file}]")
    assert done.code == 1 and reason in done.err


def test_prompts_that_are_no_file(bad: Path, home: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "p.txt"
    os.mkfifo(fifo)
    done = run(home, "generate", "model.path=models/chatml", f"prompts={fifo}", limit=60)
    assert done.code in (1, 2) and str(fifo) in done.err
