"""Rows, folders and settings as users have them: what each README of `cases` beside the real data
calls right, on the commands themselves.

Skipped without JAXDPO_DATA. The tests of the rooms hold the same kinds of fault on inputs of their
own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases.commands import ROOT, SHORT_RUN, Done, check_pairs, converted, data, run, train

pytestmark = pytest.mark.slow

# --- rows ---


def test_label_a_gt_b(cases: Path, home: Path, tmp_path: Path) -> None:
    folder = cases / "label-a-gt-b"
    check_pairs(cases, converted(home, tmp_path, folder / "judged.jsonl"), 12)
    check_pairs(cases, converted(home, tmp_path, folder / "judged-ties.jsonl"), 6)
    assert re.search(r"filtered: tie\s*│\s*1\b", data(home, folder / "judged-ties.jsonl").out)


def test_score_name(cases: Path, home: Path, tmp_path: Path) -> None:
    file = cases / "score-name/answers-pm_score.jsonl"
    done = data(home, file)
    if done.code == 0:
        check_pairs(cases, converted(home, tmp_path, file), 12)
    else:
        assert "pm_score" in done.err and "data.score" in done.err
    check_pairs(cases, converted(home, tmp_path, file, "data.score=pm_score"), 12)


def test_prompt_input(cases: Path, home: Path, tmp_path: Path) -> None:
    rows = converted(home, tmp_path, cases / "prompt-input/input-chosen-rejected.jsonl")
    check_pairs(cases, rows, 12)
    for row in rows:
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["prompt"][1]["content"].endswith("?")


def test_alpaca_history(cases: Path, home: Path, tmp_path: Path) -> None:
    rows = converted(home, tmp_path, cases / "alpaca-history/history.jsonl")
    check_pairs(cases, rows, 12)
    for row in rows:
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize("name", ["pandas", "pandas-prompt"])
def test_csv_python_lists(cases: Path, home: Path, tmp_path: Path, name: str) -> None:
    rows = converted(home, tmp_path, cases / f"csv-python-lists/{name}.csv")
    check_pairs(cases, rows, 12)
    assert all(row["prompt"][0]["role"] == "user" for row in rows)


def test_images_column(cases: Path, home: Path) -> None:
    done = data(home, cases / "images-column/images.jsonl")
    assert done.code == 1 and "images" in done.said


@pytest.mark.parametrize(
    "name", ["messages-chosen-rejected", "openai-preferred_output", "roles-Human-Assistant"]
)
def test_other_formats(cases: Path, home: Path, tmp_path: Path, name: str) -> None:
    check_pairs(cases, converted(home, tmp_path, cases / f"other-formats/{name}.jsonl"), 12)


# --- messages, templates, tokenizers ---


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_reasoning_field(cases: Path, home: Path, name: str) -> None:
    file = cases / f"reasoning-field/{name}.jsonl"
    shown = data(home, file, "show=1", model="models/full")
    assert shown.code == 0 and "<think>" in shown.out
    # A template without a place for it does not make the words vanish.
    assert data(home, file, model="models/chatml").code == 1


@pytest.mark.parametrize("name", ["call-in-the-prompt", "call-is-the-answer"])
def test_tool_calls(cases: Path, home: Path, name: str) -> None:
    done = data(home, cases / f"tool-calls/{name}.jsonl", "show=1", model="models/full")
    assert done.code == 0, done.said
    assert "<tool_call>" in done.out and "tide_table" in done.out


def test_templated_strings(cases: Path, home: Path) -> None:
    file = cases / "templated-strings/chatml-strings.jsonl"
    refused = data(home, file)
    assert refused.code == 1 and "data.strings" in refused.err

    def prompt_tokens(done: Done) -> list[str]:
        found = re.findall(r"^  prompt, (\d+) tokens", done.out, re.MULTILINE)
        assert found, done.said
        return found

    as_messages = data(home, cases / "chat/chat.jsonl")
    as_templated = data(home, file, "data.strings=templated")
    assert prompt_tokens(as_templated)[0] == prompt_tokens(as_messages)[0] == "52"


def test_template_not_found(cases: Path, home: Path, tmp_path: Path) -> None:
    chat = f"data.train=[{cases / 'chat/chat.jsonl'}]"
    plain = run(
        home,
        "train",
        "--dry-run",
        f"run_dir={tmp_path / 'plain'}",
        "model.path=models/plain",
        chat,
        *SHORT_RUN,
    )
    assert plain.code == 0 and re.search("no chat template", plain.said), plain.said
    found = data(home, cases / "chat/chat.jsonl", "show=1", model="models/tmpljson")
    assert found.code == 0 and "<|im_start|>" in found.out


def test_named_templates(cases: Path, home: Path) -> None:
    done = data(home, cases / "chat/chat.jsonl", model="models/named_nodefault")
    assert done.code == 1 and "data.chat_template" in done.err
    chosen = data(
        home, cases / "chat/chat.jsonl", "data.chat_template=chat", model="models/named_nodefault"
    )
    assert chosen.code == 0, chosen.said
    tools = data(home, cases / "chat/tools-only.jsonl", "show=1", model="models/named")
    assert tools.code == 0 and "Tools: " in tools.out


def test_ids_beyond_rows(cases: Path, home: Path) -> None:
    done = run(
        home,
        "generate",
        "model.path=models/short",
        f"prompts={cases / 'chat/chat.jsonl'}",
        "max_new_tokens=4",
    )
    assert done.code == 1 and "257" in done.err


def test_documented_prompt_list(home: Path) -> None:
    done = run(
        home, "generate", "model.path=models/chatml", "prompts=[Who are you?]", "max_new_tokens=4"
    )
    assert done.code == 0 and "> Who are you?" in done.out


# --- runs ---


@pytest.mark.parametrize("name", ["one-prompt", "one-row"])
def test_one_prompt(cases: Path, home: Path, tmp_path: Path, name: str) -> None:
    file = cases / f"one-prompt/{name}.jsonl"
    done = train(home, tmp_path / "run", file, "train.batch_size=4", "log.tensorboard=false")
    if done.code != 0:
        assert "data.eval" in done.err and "step 1/" not in done.said
    else:
        assert "done: step" in done.said and "validation" in done.said


def test_warmup_longer(cases: Path, home: Path, tmp_path: Path) -> None:
    words = ("train.batch_size=4", "optim.warmup_steps=150", *SHORT_RUN)
    done = train(home, tmp_path / "run", cases / "chat/chat.jsonl", *words)
    assert done.code in (1, 2) and "optim.warmup_steps=150" in done.err


def test_option_names(cases: Path, home: Path, tmp_path: Path) -> None:
    words = ("optim.warmup_ratio=0.1", "train.gradient_accumulation_steps=4", "log.wandb=true")
    done = train(home, tmp_path / "run", cases / "chat/chat.jsonl", "train.epochs=0.5", *words)
    assert done.code == 2
    assert "lora.rank" not in done.err and "train.compilation_cache" not in done.err
    assert "train.batch_size" in done.err and "log.tensorboard" in done.err


def test_run_dir_brackets(cases: Path, home: Path, tmp_path: Path) -> None:
    words = ("train.steps=2", *SHORT_RUN)
    done = train(home, tmp_path / "exp[1]", cases / "chat/chat.jsonl", *words)
    assert done.code == 2 and "run_dir=" in done.err and "[" in done.err
    assert not (tmp_path / "exp[1]").exists()


def test_more_epochs(cases: Path, home: Path, tmp_path: Path) -> None:
    chat = cases / "chat/chat.jsonl"
    words = ("train.batch_size=4", *SHORT_RUN)
    assert train(home, tmp_path / "run", chat, "train.epochs=2", *words).code == 0
    more = train(home, tmp_path / "run", chat, "train.epochs=3", *words)
    assert more.code == 0 and "done: step 9 of 9" in more.said and "schedule" in more.said


def test_adapter_ranks_by_layer(home: Path) -> None:
    done = run(
        home, "generate", "model.path=models/adapters/perlayer", "prompts=[a]", "max_new_tokens=4"
    )
    assert done.code == 0 or "differ between layers" in done.err, done.said


def test_bf16_no_updates(cases: Path, home: Path, tmp_path: Path) -> None:
    words = ("model.param_dtype=bfloat16", "optim.learning_rate=5e-7", "train.steps=60")
    done = train(home, tmp_path / "run", cases / "chat/chat.jsonl", *words, *SHORT_RUN)
    assert done.code == 0 and re.search(r"warning: .*bfloat16", done.said), done.said


def test_two_processes(cases: Path, home: Path, tmp_path: Path) -> None:
    words = (
        f"run_dir={tmp_path / 'run'}",
        "model.path=models/chatml",
        f"data.train=[{cases / 'chat/chat.jsonl'}]",
        "train.batch_size=4",
        "train.steps=3000",
        "checkpoint.save_every=500",
        *SHORT_RUN,
    )
    first = subprocess.Popen(
        [sys.executable, "-m", "jaxdpo.train", *words],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("step 1/"):
                break
        second = run(home, "train", *words, "seed=1")
        assert second.code not in (0, 75) and str(first.pid) in second.err, second.said
    finally:
        first.terminate()
        first.communicate()
    assert first.returncode == 75
    steps = []
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        steps.append(json.loads(line)["step"])
    assert steps == list(range(1, len(steps) + 1))


def test_export_stop_token(cases: Path, home: Path, tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    done = run(
        home,
        "train",
        f"run_dir={run_dir}",
        "model.path=models/qwenbase",
        f"data.train=[{cases / 'chat/chat.jsonl'}]",
        "train.steps=2",
        *SHORT_RUN,
    )
    assert done.code == 0, done.said
    assert run(home, "export", f"run_dir={run_dir}", f"out={out}").code == 0
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    im_end = 258
    assert im_end in ends
