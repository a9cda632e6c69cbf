import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data import disk_cache, prepare, sources
from jaxdpo.data.disk_cache import TableWriter, load_or_make
from jaxdpo.data.pair_table import EncodedPair, to_columns
from jaxdpo.data.prepare import Prepared

Write = Callable[..., str]
PAIRS = [
    EncodedPair(
        *(np.arange(n + 1, dtype=np.int32) for n in (i % 3, i % 5, i % 7)),
        id=f"ü:{i}",
        prompt_key=i,
    )
    for i in range(50)
]


def make(writer: TableWriter) -> str:
    for start in range(0, 50, 20):
        writer.append(to_columns(PAIRS[start : start + 20]))
    return "notes"


def unwanted(*_: object) -> None:
    pytest.fail("the pairs are there already")


@pytest.mark.parametrize("kept", [True, False])
def test_pairs_come_back_from_files(tmp_path: Path, kept: bool) -> None:
    root = str(tmp_path / "cache") if kept else None
    table, notes = load_or_make(root, {"data": 1}, make)
    assert notes == "notes" and list(table.ids) == [pair.id for pair in PAIRS]
    for index, pair in enumerate(PAIRS):
        assert all(
            np.array_equal(a, b) for a, b in zip(table[index].answers, pair.answers, strict=True)
        )
    assert isinstance(table.columns["tokens"].base, np.memmap)
    again, _ = load_or_make(root, {"data": 1}, make if root is None else unwanted)
    assert again.fingerprint() == table.fingerprint()


def test_temporary_files_go_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache.tempfile, "tempdir", str(tmp_path))
    table, _ = load_or_make(None, {}, make)
    assert len(list(tmp_path.iterdir())) == 1
    del table
    assert not list(tmp_path.iterdir())


def test_no_pairs_are_a_table_too(tmp_path: Path) -> None:
    table, notes = load_or_make(str(tmp_path), {}, lambda writer: [])
    assert len(table) == 0 and notes == []


def prepared(tokenizer: PreTrainedTokenizerFast, root: Path, path: str, **options: Any) -> Prepared:
    section = DataSection(
        **{
            "max_length": 64,
            "max_prompt_length": 32,
            "train": [path],
            "cache": str(root),
            **options,
        }
    )
    return prepare.prepare(section, tokenizer, 1000)


def folders(root: Path) -> set[Path]:
    return {path for path in root.iterdir() if path.is_dir()}


@pytest.fixture
def path(write: Write) -> str:
    return write(
        "a.jsonl",
        [{"prompt": f"q {i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(40)],
    )


def test_the_second_start_reads_no_row(
    tmp_path: Path,
    path: str,
    byte_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = prepared(byte_tokenizer, tmp_path / "c", path)
    monkeypatch.setattr(prepare, "read_set", unwanted)
    second = prepared(byte_tokenizer, tmp_path / "c", path)
    assert first.report == second.report and first.train.fingerprint() == second.train.fingerprint()
    assert prepared(
        byte_tokenizer, tmp_path / "c", path, eval_fraction=0.5, duplicates="keep"
    ).report["train"]["pairs"] < len(first.train)


def test_whatever_changes_the_pairs_makes_other_folders(
    tmp_path: Path,
    path: str,
    write: Write,
    byte_tokenizer: PreTrainedTokenizerFast,
    metaspace_tokenizer: PreTrainedTokenizerFast,
) -> None:
    root = tmp_path / "c"
    seen: set[Path] = set()

    def is_new(
        tokenizer: PreTrainedTokenizerFast = byte_tokenizer, path: str = path, **options: Any
    ) -> bool:
        prepared(tokenizer, root, path, **options)
        new = folders(root) - seen
        seen.update(new)
        return bool(new)

    assert is_new() and not is_new(num_proc=3, shuffle=False)
    assert is_new(metaspace_tokenizer)
    assert is_new(max_length=65) and is_new(max_prompt_length=31)
    assert is_new(path=path + ":30") and is_new(empty="error")
    template = write("t.jinja", b"{% for m in messages %}{{ m.content }}{% endfor %}")
    assert is_new(chat_template=template)
    Path(path).write_text(Path(path).read_text().replace("good 7", "fine 7"))
    assert is_new()


def test_pairs_of_another_tokenizer_are_refused(
    tmp_path: Path,
    path: str,
    byte_tokenizer: PreTrainedTokenizerFast,
    metaspace_tokenizer: PreTrainedTokenizerFast,
) -> None:
    root = tmp_path / "c"
    prepared(byte_tokenizer, root, path)
    (ours,) = folders(root)
    prepared(metaspace_tokenizer, root, path)
    (theirs,) = folders(root) - {ours}
    ours.rename(tmp_path / "away")
    theirs.rename(ours)
    with pytest.raises(
        ValueError,
        match=r"data\.cache: the pairs in .* were made with another tokenizer\. Remove .* to "
        r"have it made again",
    ):
        prepared(byte_tokenizer, root, path)


@pytest.mark.parametrize("harm", ["cut", "gone", "meta"])
def test_damaged_files_are_refused_by_name(
    tmp_path: Path, path: str, byte_tokenizer: PreTrainedTokenizerFast, harm: str
) -> None:
    prepared(byte_tokenizer, tmp_path / "c", path)
    (folder,) = folders(tmp_path / "c")
    if harm == "cut":
        os.truncate(folder / "tokens.bin", 40)
    elif harm == "gone":
        (folder / "completion_mask.bin").unlink()
    else:
        (folder / "meta.json").write_text(json.dumps({"identity": []})[:-1])
    named = {"cut": "tokens.bin", "gone": "completion_mask.bin", "meta": "meta.json"}[harm]
    with pytest.raises(ValueError, match=rf"{named} is damaged.*Remove"):
        prepared(byte_tokenizer, tmp_path / "c", path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(TableWriter, "append", fail)
    why = {
        errno.ENOSPC: r"no space is left for the encoded pairs in .*Free some",
        errno.EACCES: "cannot be used .Permission denied",
    }[number]
    for root in (str(tmp_path / "c"), None):
        with pytest.raises(ValueError, match=rf"data\.cache={root or 'null'}: {why}"):
            load_or_make(root, {}, make)
    assert not folders(tmp_path / "c"), "nothing half made is left"


def test_a_full_disk_for_real(
    tmp_path: Path, path: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    root = tmp_path / "c"
    root.mkdir()

    class Full(TableWriter):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self._files["tokens"].close()
            self._files["tokens"] = full.open("wb", buffering=0)  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no space is left"):
        patch.setattr(disk_cache, "TableWriter", Full)
        prepared(byte_tokenizer, root, path)
    assert not folders(root)
    assert len(prepared(byte_tokenizer, root, path).train) > 30


def test_a_file_where_the_cache_should_be(
    tmp_path: Path, path: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache=.*: cannot be used .*Name a folder"):
        prepared(byte_tokenizer, tmp_path / "c", path)


def test_what_a_killed_process_left_is_made_anew(
    tmp_path: Path, path: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    root = tmp_path / "c"
    whole = prepared(byte_tokenizer, root, path).train.fingerprint()
    (folder,) = folders(root)
    folder.rename(folder.with_suffix(".partial"))
    (folder.with_suffix(".partial") / "meta.json").unlink()
    assert prepared(byte_tokenizer, root, path).train.fingerprint() == whole and folders(root) == {
        folder
    }


def test_rows_that_cannot_be_read_leave_nothing(
    tmp_path: Path, write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(
        "bad.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 20 + [{"prompt": "q"}]
    )
    with pytest.raises(ValueError, match=r"bad\.jsonl:21"):
        prepared(byte_tokenizer, tmp_path / "c", path)
    assert not folders(tmp_path / "c")


def test_the_second_of_two_processes_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load_or_make(str(tmp_path), {}, make)
    (lock,) = tmp_path.glob("*.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=load_or_make, args=(str(tmp_path), {}, make))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and "waiting for it" in caplog.text
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_hub_set_is_known_by_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    prints: Iterator[str] = iter("aab")

    class Set(sources.datasets.Dataset):
        def __init__(self) -> None:
            self._fingerprint = next(prints)

    monkeypatch.setattr(sources.datasets, "load_dataset", lambda *_, **__: Set())
    first, second, third = (sources.set_identity("hh-rlhf", "data.train") for _ in range(3))
    assert first == second != third
