import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from jaxdpo.data.splits import split_files
from tests.data.rows import assistant, collect, user

ROWS = [
    {
        "prompt": [user("q")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
        "weight": 2.0,
    },
    {
        "prompt": [user("r")],
        "chosen": [assistant("c")],
        "rejected": [assistant("d")],
        "weight": None,
    },
]


def texts(text: str, **options: Any) -> list[str]:
    return [
        record.prompt[0].content
        for record in collect(text, **options)[1]
        if not isinstance(record.prompt, str)
    ]


def test_a_folder_from_save_to_disk(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one", num_shards=2)
    report, records = collect(str(tmp_path / "one"))
    assert [record.weight for record in records] == [2.0, 1.0] and report.format == "preference"
    assert [record.id for record in records] == [
        "data-00000-of-00002.arrow:1",
        "data-00001-of-00002.arrow:1",
    ]
    assert texts(f"{tmp_path / 'one'}:1") == ["q"]


def test_a_folder_with_splits_from_save_to_disk(tmp_path: Path) -> None:
    splits = {
        "train": datasets.Dataset.from_list(ROWS[:1]),
        "test": datasets.Dataset.from_list(ROWS[1:]),
    }
    datasets.DatasetDict(splits.items()).save_to_disk(tmp_path / "both")
    assert [
        texts(f"{tmp_path / 'both'}{split}") for split in ("", ":train", ":test", ":test:1")
    ] == [["q"], ["q"], ["r"], ["r"]]
    assert texts(str(tmp_path / "both"), option="data.eval") == ["r"]
    with pytest.raises(
        ValueError, match=r"has no split tost\. Its splits: test, train\. Write .*both:test"
    ):
        texts(f"{tmp_path / 'both'}:tost")


def test_a_copy_of_a_hub_set(tmp_path: Path) -> None:
    data = tmp_path / "copy" / "data"
    data.mkdir(parents=True)
    lines = [json.dumps(row).encode() for row in ROWS]
    (data / "train-00000-of-00002.jsonl").write_bytes(lines[0])
    (data / "train-00001-of-00002.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (data / "test.jsonl").write_bytes(lines[1])
    (data / ".train.jsonl").write_bytes(b"no rows")
    (tmp_path / "copy" / "README.md").write_text("no rows")
    assert texts(str(tmp_path / "copy")) == ["q", "r"]
    assert texts(f"{tmp_path / 'copy'}:test") == ["r"] and texts(
        str(tmp_path / "copy"), option="data.eval"
    ) == ["r"]


def test_folders_that_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder without rows"):
        split_files(tmp_path, None, ("train",))
    (tmp_path / "pairs.jsonl").write_bytes(b"")
    assert split_files(tmp_path, None, ("train",)) == [tmp_path / "pairs.jsonl"]
    (tmp_path / "more.csv").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"has no split train or all\. Its splits: more, pairs\. Write"
    ):
        split_files(tmp_path, None, ("train", "all"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "its state.json is not from"),
        ('{"_data_files": [{"name": 1}]}', "its state.json is not from"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "names files outside"),
        ('{"_data_files": [], "_split": "train"}', "has no split test, it is the split train"),
    ],
)
def test_a_damaged_state_file(tmp_path: Path, state: str, message: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(ValueError, match=message):
        split_files(tmp_path, "test", ("train",))
