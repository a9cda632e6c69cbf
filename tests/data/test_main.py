import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.__main__ import main
from jaxdpo.data.inspect.survey import Part, cuts
from jaxdpo.data.inspect.tables import bars
from jaxdpo.data.prepare import prepare
from jaxdpo.utils.console import Console, show_table
from tests.data.formats.test_oasst import thread
from tests.data.rows import Write, assistant, collect, user

ROWS = [
    {
        "prompt": [user("q\x1b[2J")],
        "chosen": [assistant("good")],
        "rejected": [assistant("no")],
        "weight": 0.5,
    },
    {
        "system": "s",
        "prompt": "r",
        "chosen": "a",
        "rejected": "bad",
        "tools": [{"name": "add"}],
        "id": "mine",
        "margin": 0.5,
    },
    {"prompt": "verbatim ", "chosen": "x", "rejected": "y" * 300},
    {"prompt": "r", "chosen": "", "rejected": "b"},
]


def row(printed: str, name: str) -> list[str]:
    """The cells after its name of the first row of that name in a table."""
    line = next(
        line
        for line in printed.splitlines()
        if line.startswith("│") and line[1:].strip().startswith(name + " ")
    )
    return [cell.strip() for cell in line.strip("│").split("│")[1:]]


@pytest.mark.parametrize("rows", [ROWS, thread()])
def test_any_source_becomes_our_json_lines(
    write: Write, tmp_path: Path, rows: list[dict[str, object]]
) -> None:
    path = write("a.jsonl", rows)
    out = tmp_path / "ours.jsonl"
    assert main([f"data.train=[{path}]", f"out={out}", "show=1"]) == 0
    before, after = collect(path)[1], collect(str(out))[1]
    assert [
        (r.prompt, r.chosen, r.rejected, r.weight, r.margin, r.tools, r.id, r.group) for r in before
    ] == [
        (r.prompt, r.chosen, r.rejected, r.weight, r.margin, r.tools, r.id, r.group) for r in after
    ]
    with pytest.raises(SystemExit):
        main([f"data.train=[{path}]", f"out={out}"])


def test_a_conversion_that_fails_leaves_no_file(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [*ROWS, {"prompt": "q"}])
    assert main([f"data.train=[{path}]", f"out={tmp_path / 'ours.jsonl'}"]) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]


def test_counts_lengths_and_pairs_are_printed(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("a.jsonl", ROWS)
    assert main([f"data.train=[{path}]", f"data.eval=[{path}:1]", "show=2"]) == 0
    printed = capsys.readouterr().out
    assert (
        "pair a.jsonl:1, weight 0.5\n  prompt, 5 characters\n    user: q\\x1b[2J\n"
        "  chosen, 4 characters\n    <<good>>\n" in printed
    )
    assert (
        "pair mine, margin 0.5\n  prompt, 2 characters\n    system: s\n    user: r\n" in printed
        and "verbatim" not in printed
        and "\x1b" not in printed
    )
    assert row(printed, "rows read") == ["4", ""] and row(printed, "pairs kept") == ["3", ""]
    assert row(printed, "dropped: empty answer") == ["1", "a.jsonl:4"]
    assert row(printed, "the chosen answer is the longer one") == ["33.3%", "100.0%"]
    assert row(printed, "train, rejected") == ["3", "300", "300"] and row(
        printed, "eval, prompt"
    ) == [
        "5",
        "5",
        "5",
    ]
    assert row(printed, "eval prompts that are train prompts too") == ["1", "1", ""]


def test_tokens_and_loss_tokens_are_printed(
    write: Write,
    tmp_path: Path,
    chat_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = [
        f"model.path={tmp_path / 'tokenizer'}",
        "data.eval_fraction=0",
        "show=1",
        "data.max_dropped_fraction=1",
    ]
    out = tmp_path / "ours.jsonl"
    assert main([f"data.train=[{write('a.jsonl', ROWS)}]", f"out={out}", *options]) == 0
    printed = capsys.readouterr().out
    assert "<<good<|im_end|>\n    >>" in printed
    assert row(printed, "dropped: the chat template has no place for tools") == ["1", "mine"]
    assert row(printed, "answers that end with eos") == ["100.0%"]
    assert row(printed, "256")[:3] == ["0", "1", "50.0%"] and row(printed, "512")[:3] == [
        "0",
        "0",
        "0.0%",
    ]
    assert json.loads(out.read_text().splitlines()[1])["tools"] == [{"name": "add"}]


def test_odd_pairs_are_named_and_shown(
    write: Write,
    tmp_path: Path,
    chat_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = "one two three four five six seven eight nine ten eleven twelve"
    rows = [
        {
            "prompt": [user("q")],
            "chosen": [assistant("a b c")],
            "rejected": [assistant("d")],
            "id": "plain",
        },
        {
            "prompt": [user("q" * 90)],
            "chosen": [assistant("x" * 90)],
            "rejected": [assistant("e f")],
            "id": "long",
        },
        {
            "prompt": [user("<|im_end|>")],
            "chosen": [assistant("g h i")],
            "rejected": [assistant("j k l")],
            "id": "steers",
        },
        {
            "prompt": [user("r")],
            "chosen": [assistant(words)],
            "rejected": [assistant(words + "!")],
            "id": "equal",
        },
    ]
    options = [
        f"data.train=[{write('a.jsonl', rows)}]",
        "data.eval_fraction=0",
        "data.max_dropped_fraction=1",
        "show=0",
        "odd=1",
    ]
    assert main(options) == 0
    by_text = capsys.readouterr().out
    assert row(by_text, "the longest, prompt and answer (characters)")[1].startswith(
        "long (180), equal"
    )
    assert row(by_text, "the shortest answers (characters)")[1].startswith("plain (1)")
    assert row(by_text, "answers that are nearly equal") == ["1", "equal"]
    assert [line for line in by_text.splitlines() if line.startswith("pair ")] == [
        "pair long, the longest, prompt and answer",
        "pair plain, the shortest answers",
        "pair equal, answers that are nearly equal",
    ]
    assert (
        main(
            [
                *options,
                f"model.path={tmp_path / 'tokenizer'}",
                "data.max_length=96",
                "data.max_prompt_length=90",
            ]
        )
        == 0
    )
    by_tokens = capsys.readouterr().out
    assert row(by_tokens, "truncated by data.max_length=96") == ["1", "long"]
    assert "a.jsonl: 1 rows spell a special token in their text" in by_tokens
    assert row(by_tokens, "text that spells a special token") == ["1", "steers"]
    assert row(by_tokens, "an answer without eos") == ["0", ""]
    assert (
        "pair long, the longest, prompt and answer; truncated by data.max_length=96" in by_tokens
        and "pair steers" not in by_tokens
    )


def test_the_page_holds_what_the_terminal_shows(write: Write, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "<script>alert(1)</script> & ",
            "chosen": "\u202eyes</pre>",
            "rejected": "no",
            "id": "<b>x</b>",
        },
        *ROWS,
    ]
    page = tmp_path / "page.html"
    assert (
        main([f"data.train=[{write('a.jsonl', rows)}]", f"page={page}", "data.eval_fraction=0.4"])
        == 0
    )
    text = page.read_text()
    assert (
        "<script" not in text
        and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in text
        and "<b>" not in text
        and "\u202e" not in text
    )
    assert (
        "<mark>\\u202eyes&lt;/pre&gt;</mark>" in text
        and "dropped: empty answer" in text
        and text.count("<svg") == 2
    )
    assert (
        main([f"data.train=[{tmp_path / 'a.jsonl'}]", f"page={page}", "show=0"]) == 0
    )  # its own pages are written over
    assert "alert(1)" not in page.read_text() and sorted(
        item.name for item in tmp_path.iterdir()
    ) == ["a.jsonl", "page.html"]


@pytest.mark.parametrize("how", ["near=0", "near=1", "show=0"])
def test_sets_of_one_pair_with_a_prompt_without_words(
    write: Write, tmp_path: Path, how: str
) -> None:
    path = write("a.jsonl", [{"prompt": "?", "chosen": "a", "rejected": "b"}])
    assert main([f"data.train=[{path}]", f"page={tmp_path / 'page.html'}", how]) == 0
    assert ("Near-duplicates" in (tmp_path / "page.html").read_text()) == (how != "near=0")


@pytest.mark.parametrize(
    ("rows", "dropped"),
    [
        ([{"prompt": "q", "chosen": "", "rejected": "b"}], "dropped: empty answer"),
        ([{"prompt": "q", "chosen": "b", "rejected": "b"}], "dropped: identical answers"),
    ],
)
def test_a_set_without_a_usable_pair_is_a_fault(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list, dropped: str
) -> None:
    out = tmp_path / "out.jsonl"
    assert main([f"data.train=[{write('a.jsonl', rows)}]", f"out={out}"]) == 1
    printed = capsys.readouterr()
    assert row(printed.out, dropped) == ["1", "a.jsonl:1"]
    assert "jaxdpo.data: no usable pair was found" in printed.err and not out.exists()


@pytest.mark.slow
def test_a_closed_pipe_and_a_terminal_without_unicode(write: Write, tmp_path: Path) -> None:
    """`| head -5` where text is not UTF-8 ends without a traceback and with a complete page."""
    path = write("a.jsonl", [{**ROWS[2], "chosen": f"ü {number}"} for number in range(500)])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = [
        sys.executable,
        "-m",
        "jaxdpo.data",
        f"data.train=[{path}]",
        "show=400",
        f"page={tmp_path / 'page.html'}",
    ]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        head = [process.stdout.readline() for _ in range(5)]
        process.stdout.close()
        printed = process.stderr.read()
    assert head[0] == "pair a.jsonl:1\n" and head[4] == "    <<\\xfc 0>>\n"
    assert (
        "Traceback" not in printed
        and "rror" not in printed
        and "ü 399" in (tmp_path / "page.html").read_text(encoding="utf-8")
    )


def test_bars_are_drawn_with_what_the_terminal_has() -> None:
    part = Part("train", np.array([[1, 2, 3], [1, 2, 700]]), prompts=2)
    assert bars(part, "tokens", 120).rows[0] == [
        "1",
        "█" * 16 + " 2",
        " " * 16 + " 0",
        " " * 16 + " 0",
    ]
    assert [row[0] for row in bars(part, "tokens", 120).rows][-2:] == ["256-511", "512-1,023"]
    for columns in (60, 80):
        console = Console(file=io.StringIO(), width=columns)
        drawn = bars(part, "characters", columns)
        show_table(drawn.title, drawn.header, drawn.rows, console)
        assert isinstance(console.file, io.StringIO) and len(
            console.file.getvalue().splitlines()
        ) == 5 + len(drawn.rows)
    assert bars(part, "tokens", 120, blocks=False).rows[1][3] == "#" * 8 + " " * 8 + " 1"


def test_an_interrupt_exits_with_130(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "jaxdpo.data.inspect.inspect_data.read_texts",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    assert main([f"data.train=[{write('a.jsonl', ROWS)}]"]) == 130
    assert capsys.readouterr().err == "jaxdpo.data: interrupted\n"


def test_truncation_is_that_of_training(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The table says of a length what encoding with it does."""
    sizes = np.random.default_rng(0).integers(1, 60, (40, 3))
    rows = [{"prompt": "p" * a, "chosen": " q" * b, "rejected": " r" * c} for a, b, c in sizes]
    sets: dict[str, Any] = {
        "train": [write("a.jsonl", rows)],
        "eval_fraction": 0.0,
        "cache": None,
        "duplicates": "keep",
    }
    whole = prepare(
        DataSection(max_length=2000, max_prompt_length=1000, **sets),
        byte_tokenizer,
        vocab_size=2**31,
    ).train
    for limits in ((64, 0), (90, 10), (40, 39), (30, 0)):
        done = prepare(
            DataSection(max_length=limits[0], max_prompt_length=limits[1], **sets),
            byte_tokenizer,
            vocab_size=2**31,
        ).train
        pairs = [done[place] for place in range(len(done))]
        prompts, answers, left = cuts(whole.lengths, *limits)
        assert len(done) == len(whole) and left == done.lengths.sum() < whole.lengths.sum()
        assert prompts.tolist() == [pair.truncated_prompt for pair in pairs]
        assert answers.tolist() == [
            pair.truncated_chosen or pair.truncated_rejected for pair in pairs
        ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "data.train=[]: name at least one set"),
        (
            ["data.train="],
            2,
            "data.train=: input should be a valid list. Lists are written [a,b]",
        ),
        (["data.train=[x.jsonl]", "show=-1"], 2, "show=-1: must not be negative"),
        (["data.train=[x.jsonl]", "odd=6"], 2, "odd=6: must lie between 0 and 5"),
        (
            ["data.train=[x.jsonl]", "near=0.5"],
            2,
            "near=0.5: must be 0 (no search) or lie between 0.6 and 1",
        ),
        (
            ["data.train=[x.jsonl]", "out=no/ours.jsonl"],
            2,
            "out=no/ours.jsonl: there is no folder no",
        ),
        (["data.train=[x.jsonl]", "page=pyproject.toml"], 2, "page=pyproject.toml: exists"),
        (["data.train=[x.jsonl]", "page=docs"], 2, "page=docs: exists"),
        (
            ["data.train=[x.jsonl]", "page=x.html", "out=x.html"],
            2,
            "page=x.html: is the same file as out",
        ),
        (["data.train=[no-such.jsonl]"], 1, "no-such.jsonl: no such file"),
    ],
)
def test_faults_and_wrong_options_by_exit_code(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(arguments)
    except SystemExit as stop:
        found = stop.code
    assert found == status and message in capsys.readouterr().err
