import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.data.__main__ import main
from tests.data.rows import Write, assistant, collect, user
from tests.data.test_oasst import thread

ROWS = [
    {"prompt": [user("q\x1b[2J")], "chosen": [assistant("good")], "rejected": [assistant("no")], "weight": 0.5},
    {"system": "s", "prompt": "r", "chosen": "a", "rejected": "bad", "tools": [{"name": "add"}], "id": "mine"},
    {"prompt": "verbatim ", "chosen": "x", "rejected": "y" * 300},
    {"prompt": "r", "chosen": "", "rejected": "b"},
]


@pytest.mark.parametrize("rows", [ROWS, thread()])
def test_any_source_becomes_our_json_lines(write: Write, tmp_path: Path, rows: list[dict[str, object]]) -> None:
    path = write("a.jsonl", rows)
    out = tmp_path / "ours.jsonl"
    assert main([f"data.train=[{path}]", f"out={out}", "show=1"]) == 0
    before, after = collect(path)[1], collect(str(out))[1]
    assert [(r.prompt, r.chosen, r.rejected, r.weight, r.tools, r.id) for r in before] == [
        (r.prompt, r.chosen, r.rejected, r.weight, r.tools, r.id) for r in after
    ]
    with pytest.raises(SystemExit):
        main([f"data.train=[{path}]", f"out={out}"])


def test_a_conversion_that_fails_leaves_no_whole_file(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [*ROWS, {"prompt": "q"}])
    assert main([f"data.train=[{path}]", f"out={tmp_path / 'ours.jsonl'}"]) == 1
    assert not (tmp_path / "ours.jsonl").exists()
    assert main([f"data.train=[{path}:1]", f"out={tmp_path / 'no' / 'ours.jsonl'}"]) == 1


def test_counts_lengths_and_pairs_are_told(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("a.jsonl", ROWS)
    assert main([f"data.train=[{path}]", f"data.eval=[{path}:1]", "show=2"]) == 0
    told = capsys.readouterr().out
    assert "pair a.jsonl:1, weight 0.5\n  user: q\\x1b[2J\n  chosen: good\n  rejected: no\n" in told
    assert "pair mine, weight 1\n  system: s\n  user: r\n" in told and "verbatim" not in told and "\x1b" not in told
    assert "4 rows read, 3 parsed, 3 kept; dropped 1 (1 empty answer)" in told
    assert "train: 3 pairs; characters p50/p95/max: prompt 5/9/9, chosen 1/4/4, rejected 3/300/300" in told
    assert "the longer answer is the chosen one in 33.3%, equal 0.0%" in told and "eval: 1 pairs" in told


def test_tokens_and_what_is_scored_are_told(
    write: Write, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = [f"model.path={tmp_path / 'tokenizer'}", "data.eval_fraction=0", "show=1", "data.max_dropped_fraction=1"]
    out = tmp_path / "ours.jsonl"
    assert main([f"data.train=[{write('a.jsonl', ROWS)}]", f"out={out}", *options]) == 0
    told = capsys.readouterr().out
    assert "<<good<|im_end|>\n    >>" in told and "1 the chat template has no place for tools" in told
    assert "train: 2 pairs; tokens p50/p95/max" in told and "would cut: 256: 50.0%" in told and len(out.read_text().splitlines()) == 3
    assert json.loads(out.read_text().splitlines()[1])["tools"] == [{"name": "add"}]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "data.train=[]: name at least one set"),
        (["data.train=[x.jsonl]", "show=-1"], 2, "show=-1: must not be negative"),
        (["data.train=[no-such.jsonl]"], 1, "no-such.jsonl: no such file"),
    ],
)
def test_faults(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = main(arguments)
    except SystemExit as stop:
        found = stop.code
    assert found == status and message in capsys.readouterr().err
