"""Input that is wrong or hostile, from `cases/bad-input` beside the real data: each command ends in
time, with the exit code and the reason that the README there calls right."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def changed(home: Path, folder: Path, file: str, change: Callable[[dict], Any]) -> Path:
    """A copy of a tiny model in which a JSON file is what `change` makes of it."""
    shutil.copytree(home / "models/chatml", folder)
    content = json.loads((folder / file).read_text())
    result = change(content)
    (folder / file).write_text(json.dumps(content if result is None else result))
    return folder


def far_token(content: dict) -> None:
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": 4 * 10**9, "content": "<x>"}
    )


BROKEN = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
SETTINGS = "tokenizer_config.json"


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", lambda c: c.update(num_attention_heads=2**39), "num_attention_heads=5497"),
        ("config.json", lambda c: c.update(eos_token_id=2**70), "eos_token_id"),
        ("config.json", lambda c: c.update(eos_token_id=[[2], None]), "eos_token_id"),
        (SETTINGS, lambda _: [], "its tokenizer could not be loaded"),
        ("tokenizer.json", lambda c: c.update(pre_tokenizer=BROKEN), "unmatched parenthesis"),
        ("tokenizer.json", lambda c: c.update(normalizer=CHARSMAP), "precompiled_charsmap"),
        ("tokenizer.json", far_token, "the added token '<x>' has the id 4000000000"),
        (SETTINGS, lambda c: c.update(chat_template="{{ 1 / 0 }}"), "division by zero"),
        (
            SETTINGS,
            lambda c: c.update(chat_template="{{ ''|attr('__class__') }}x{{ eos_token }}"),
            "access to attribute '__class__'",
        ),
        (
            SETTINGS,
            lambda c: c.update(
                chat_template="{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}"
            ),
            "more than 67,108,864 characters",
        ),
    ],
)
def test_bad_models(
    cases: Path, home: Path, tmp_path: Path, file: str, change: Callable[[dict], Any], reason: str
) -> None:
    model = changed(home, tmp_path / "m", file, change)
    done = run(
        home,
        "train",
        f"run_dir={tmp_path / 'run'}",
        f"model.path={model}",
        f"data.train=[{cases / 'chat/chat.jsonl'}]",
        "train.steps=1",
        *SHORT_RUN,
    )
    assert done.code == 1 and reason in done.err, done.said


def test_special_tokens_in_a_prompt_are_text(bad: Path, home: Path, tmp_path: Path) -> None:
    done = run(
        home,
        "generate",
        "model.path=models/plain",
        f"prompts={bad / 'g-special/p.jsonl'}",
        "max_new_tokens=4",
        f"out={tmp_path / 'out.jsonl'}",
    )
    assert done.code == 0, done.said
    (row,) = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["prompt"] == "</s><s>" and row["prompt_tokens"] == len("</s><s>")
