from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Message, Preference
from jaxdpo.data.formats.trl import parse_preference
from jaxdpo.inference.prompts import Prompt, read_prompts

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
]


def test_rows_with_strings_or_messages(write: Callable[..., str]) -> None:
    path = write("some.jsonl", [{"prompt": "Why?", "id": 3}, {"prompt": TURNS}])
    turns = tuple(Message(turn["role"], turn["content"]) for turn in TURNS)
    assert read_prompts(path) == [Prompt("Why?", "some.jsonl:1"), Prompt(turns, "some.jsonl:2")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "system_prompt": "Be brief."},
        {"prompt": [{"role": "user", "content": "Why?"}], "system_message": "Be brief."},
        {"prompt": "Why?", "history": [["Hi", "Hello"]], "system": None},
        {"prompt": {"messages": TURNS, "tools": [{"name": "add"}]}},
        {"prompt": "Why?", "system": " ", "messages": TURNS},
    ],
)
def test_a_row_gives_the_prompt_that_training_reads(
    write: Callable[..., str], row: dict[str, Any]
) -> None:
    (prompt,) = read_prompts(write("some.jsonl", [row]))
    kept = {name: value for name, value in row.items() if name != "messages"}
    (trained,) = parse_preference({**kept, "chosen": "a", "rejected": "b"}, DataSection())
    assert isinstance(trained, Preference)
    assert (prompt.text, prompt.tools) == (trained.prompt, trained.tools)


def test_lines_of_text(write: Callable[..., str]) -> None:
    path = write("some.txt", "\ufeffWhy?\r\n\n  How\u2028so? \n".encode())
    assert read_prompts(path) == [
        Prompt("Why?", "some.txt:1"),
        Prompt("  How\u2028so? ", "some.txt:3"),
    ]


def test_a_list_holds_the_prompts_themselves() -> None:
    assert read_prompts(["Why?", "some.jsonl"]) == [
        Prompt("Why?", "prompts:1"),
        Prompt("some.jsonl", "prompts:2"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            [{"prompt": "x"}, {"q": "Why?"}, {"prompt": 3}],
            ["a.jsonl:2: column 'prompt' is missing", "found: q", "a.jsonl:3", "int"],
        ),
        ("a.jsonl", [{"prompt": []}, {"prompt": " "}], ["a.jsonl:1", "a.jsonl:2", "is empty"]),
        ("a.jsonl", [{"prompt": "x", "images": ["a.png"]}], ["'images' holds media"]),
        ("a.jsonl", [{"prompt": "x", "question": "y"}], ["'prompt' and 'question' both hold"]),
        ("a.jsonl", [{"prompt": TURNS[:2]}], ["ends with an assistant turn"]),
        ("a.jsonl", [{"prompt": [{"role": "user"}]}], ["message 1 of column 'prompt'"]),
        ("a.jsonl", [{"prompt": "\ud83d"}], ["a.jsonl:1: is not valid Unicode"]),
        ("a.jsonl", b'{"prompt": "x"}\n{torn', ["a.jsonl:2", "broken JSON"]),
        ("a.jsonl", b"", ["holds no prompt"]),
        ("a.txt", b"\n \n", ["holds no prompt"]),
        ("a.txt", b"x\n\xff", ["not UTF-8"]),
        ("a.xlsx", b"x", ["write the prompts themselves as a list"]),
        ("nothing.jsonl", None, ["no such file"]),
        ("nothing.txt", None, ["cannot be read"]),
        ("Who are you?", None, ["write the prompts themselves as a list"]),
    ],
)
def test_invalid_prompts_are_reported_with_file_and_row(
    tmp_path: Path, write: Callable[..., str], name: str, content: Any, expected: list[str]
) -> None:
    path = str(tmp_path / name) if content is None else write(name, content)
    with pytest.raises(ValueError) as error:
        read_prompts(path)
    assert all(text in str(error.value) for text in expected), str(error.value)
    assert str(error.value).startswith("prompts=")


def test_an_empty_list() -> None:
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts([])
