"""The demo: its inputs are what it says, and a run of it really learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdpo import demo
from jaxdpo.data.tokenizer_json import load_tokenizer
from jaxdpo.models.hf.config_json import load_model_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new demo folder with its model and pairs."""
    monkeypatch.chdir(tmp_path)
    made = demo._new_folder()
    demo._write_model(made / "model")
    demo._write_pairs(made, seed=0)
    return made


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_word_of_the_task_is_a_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder / "model"))
    assert load_model_config(folder / "model").vocab_size == len(tokenizer)
    for row in lines(folder / "pairs.jsonl"):
        for text in (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
            assert len(ids) < 64  # data.max_length: nothing is cut


def test_pairs_prefer_the_patient_answer_and_sft_answers_are_of_both_manners(folder: Path) -> None:
    pairs, sft = lines(folder / "pairs.jsonl"), lines(folder / "sft.jsonl")
    assert len(pairs) == len(sft) == len({row["prompt"] for row in pairs}) == 24 * 24
    assert all(row["chosen"].strip().startswith(demo.PATIENT_OPENINGS) for row in pairs)
    assert not any(row["rejected"].strip().startswith(demo.PATIENT_OPENINGS) for row in pairs)
    patient = sum(row["chosen"].strip().startswith(demo.PATIENT_OPENINGS) for row in sft)
    assert 0.4 < patient / len(sft) < 0.6


def test_a_demo_takes_the_next_free_folder(folder: Path) -> None:
    assert str(folder) == os.path.join("runs", "demo-1") and demo._new_folder().name == "demo-2"


def test_the_demo_takes_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(["seed=1"])
    assert ended.value.code == 2 and "seed: there is no such option" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path) -> None:
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAXDPO_DATA")
    }
    ended = subprocess.run(
        [sys.executable, "-m", "jaxdpo.train"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    made = tmp_path / "runs" / "demo-1"
    measured = [row for row in lines(made / "dpo" / "metrics.jsonl") if "eval/loss" in row]
    before, after = measured[0], measured[-1]
    assert (
        before["eval/rewards/accuracies_ties_half"] == 0.5
        and after["eval/rewards/accuracies"] > 0.9
    )
    assert (
        after["eval/rewards/margins"]
        > 1
        > before["eval/rewards/margins"]
        == before["eval/kl/token_exact"]
        == 0
    )
    assert after["eval/kl/token_exact"] > 0.01
    table = next(part for part in ended.stdout.split("\n\n") if "held-out questions" in part)
    row = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]]
        for line in table.splitlines()
        if line.count("│") == 4
    }
    assert row["accuracy (a tie counts half)"] == [
        "0.50",
        f"{after['eval/rewards/accuracies_ties_half']:.2f}",
    ]
    assert row["margin between the rewards"] == ["0.00", f"{after['eval/rewards/margins']:.2f}"]
    shares = [int(cell.rstrip("%")) for cell in row["sampled answers that are patient"]]
    assert 15 < shares[0] < 85 and shares[1] > 90
