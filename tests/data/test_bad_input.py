"""Bad input: each is refused with a message that names option, file and line, and a remedy."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.prepare import prepare
from tests.data.rows import Write, collect

GOOD = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
HUGE = b'{"prompt": "q", "chosen": "' + b"x" * (100 * 2**20) + b'"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "utf16.jsonl",
            GOOD.decode().encode("utf-16"),
            r"utf16\.jsonl:1: not UTF-8 \(byte 0xff at position 0\)\. Convert the file",
        ),
        (
            "latin.jsonl",
            GOOD + GOOD.replace(b"q", b"\xe9"),
            r"latin\.jsonl:2: not UTF-8 \(byte 0xe9",
        ),
        (
            "latin.csv",
            b"prompt,chosen,rejected\nq,a,b\nq,\xe9,b\n",
            r"latin\.csv:3: not UTF-8 \(byte 0xe9 at position 2\)",
        ),
        ("broken.jsonl", GOOD + GOOD[:20], r"broken\.jsonl:2: broken JSON"),
        (
            "broken.csv",
            b'prompt,chosen,rejected\nq,"a\n,b\n',
            r"broken\.csv:2: broken CSV \(unexpected end of data\)",
        ),
        (
            "short.csv",
            b"prompt,chosen,rejected\nq,a,b\n\nq,a\n",
            r"short\.csv:4: has 2 cells, the header has 3",
        ),
        ("empty.jsonl", b"", "has no rows"),
        ("empty.csv", b"prompt,chosen,rejected\n", "has no rows"),
        ("empty.json", b"[]", "has no rows"),
        (
            "column.jsonl",
            GOOD + b'{"prompt": "q", "chosen": "a"}\n',
            r"column\.jsonl:2: column 'rejected' is missing; columns found",
        ),
        (
            "type.jsonl",
            GOOD + GOOD.replace(b'"b"', b"true"),
            r"type\.jsonl:2: column 'rejected' is bool, must be a string or a list",
        ),
        (
            "mixed.jsonl",
            GOOD + GOOD.replace(b'"a"', b'[{"role": "assistant", "content": "a"}]'),
            r"mixed\.jsonl:2: columns .* differ in type",
        ),
        (
            "number.csv",
            b"prompt,chosen,rejected,weight\nq,a,b,heavy\n",
            r"number\.csv:2: column 'weight' is 'heavy', must be a number",
        ),
        ("cut.jsonl.gz", gzip.compress(GOOD * 2000)[:-30], r"cut\.jsonl\.gz: damaged gzip file"),
        ("cut.arrow", b"\xff\xff\xff\xff\x00", r"cut\.arrow: not a readable Arrow file"),
    ],
)
def test_bad_files(write: Write, name: str, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.train=.*{name}: .*{message}"):
        collect(write(name, content))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".jsonl.gz"])
def test_a_line_of_100_megabytes_is_not_read_whole(write: Write, ending: str) -> None:
    content = (b"prompt,chosen,rejected\n" if ending == ".csv" else GOOD) + HUGE
    path = write("huge" + ending, gzip.compress(content, 1) if ending.endswith(".gz") else content)
    with pytest.raises(
        ValueError,
        match=r"huge\S*:2: the line is longer than 32 MiB\. Is each row on a line of its own\?",
    ):
        collect(path)


def test_no_usable_row(write: Write, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("useless.jsonl", [{"prompt": "q", "chosen": "a", "rejected": ""}] * 3)
    section = DataSection(train=[path], max_length=64, max_prompt_length=32)
    with pytest.raises(
        ValueError,
        match=r"data\.train=.*useless\.jsonl: no valid pair is left\. .*3 rows read.*3 empty "
        r"answer",
    ):
        prepare(section, byte_tokenizer, 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ultrafedback",
            r"data\.train=ultrafedback: no such file or set\. Did you mean ultrafeedback\?",
        ),
        ("OpenAssistant/oasst", r"Did you mean OpenAssistant/oasst[12]\?"),
        ("shp/askvets", r"Did you mean shp/askvet\?"),
        (
            "no-such-folder/pairs.jsonl",
            r"no such file; the folder no-such-folder does not exist either",
        ),
    ],
)
def test_unknown_names(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        collect(text)


def test_the_hub_without_a_network(tmp_path: Path) -> None:
    program = "from tests.data.rows import collect\ncollect('hh-rlhf/harmless-base:test:5')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 1
        and "data.train=hh-rlhf/harmless-base:test:5: the hub set Anthropic/hh-rlhf "
        "could not be loaded"
        in last
    )
    assert "download it and name the folder" in last


def test_csv_cells(write: Write) -> None:
    turns: list[dict[str, Any]] = [{"role": "user", "content": 'q, "quoted"'}]
    cell = json.dumps(turns).replace('"', '""')
    header = "\ufeffprompt,chosen,rejected,weight,id\r\n"
    text = f'{header}"{cell}",[1],"two\nlines",0.5,x\r\n007,1.0,true,,\r\n'
    first, second = collect(write("a.csv", text.encode()))[1]
    assert first.prompt and not isinstance(first.prompt, str)
    assert first.prompt[0].content == 'q, "quoted"' and (first.weight, first.id) == (0.5, "x")
    assert [first.chosen[0].content, first.rejected[0].content] == ["[1]", "two\nlines"]  # type: ignore[union-attr]
    assert (second.prompt, second.chosen, second.rejected, second.id) == (
        "007",
        "1.0",
        "true",
        "a.csv:4",
    )
