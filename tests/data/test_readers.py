import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from jaxdpo.data.readers import read_rows

ROWS = [
    {"prompt": "a", "chosen": "b\u2028c", "rejected": "d"},
    {"prompt": "e", "chosen": "f", "rejected": None},
]
Write = Callable[..., str]


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".json", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_and_arrays(write: Write, ending: str, mark: bytes) -> None:
    pack = gzip.compress if ending.endswith(".gz") else bytes
    lines = b"\r\n\n".join(json.dumps(row, ensure_ascii=False).encode() for row in ROWS)
    assert list(read_rows(Path(write("a" + ending, pack(mark + lines))))) == [
        (1, ROWS[0]),
        (3, ROWS[1]),
    ]
    if ".json" in ending and ".jsonl" not in ending.lower():
        assert list(
            read_rows(
                Path(write("b" + ending, pack(mark + b" \n" + json.dumps(ROWS, indent=1).encode())))
            )
        ) == [*enumerate(ROWS, 1)]


@pytest.mark.parametrize("ending", [".parquet", ".parquet.gz"])
def test_parquet(tmp_path: Path, ending: str) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": chat, "chosen": "b", "weight": 0.5},
        {"prompt": None, "chosen": "c", "weight": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = tmp_path / f"b{ending}"
    data = (tmp_path / "a.parquet").read_bytes()
    path.write_bytes(gzip.compress(data, mtime=0) if ending.endswith(".gz") else data)
    assert list(read_rows(path)) == [(1, rows[0]), (2, rows[1])]


def damaged_arrow() -> bytes:
    """A stream of one row whose text ends before it begins."""
    sink = pyarrow.BufferOutputStream()
    batch = pyarrow.RecordBatch.from_pydict({"prompt": ["question"]})
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    whole = sink.getvalue().to_pybytes()
    begin_and_end = np.array([0, 8], np.int32).tobytes()
    head, _, tail = whole.rpartition(begin_and_end)  # the last: the message's header has others
    return head + np.array([7, 2], np.int32).tobytes() + tail


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "\xff"}\n',
            r"a\.jsonl:2: not UTF-8 \(byte 0xff at position 7\)",
        ),
        (
            "a.jsonl",
            b'{"a": 1\n',
            r"a\.jsonl:1: broken JSON \(Expecting ',' delimiter at column 8\)",
        ),
        ("a.jsonl", b'{"a": "b\n', r"a\.jsonl:1: broken JSON \(Unterminated string at column 7\)"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl:3: broken JSON \(Expecting value"),
        (
            "a.jsonl",
            b"[1, 2]\n",
            r"a\.jsonl:1: a row must be a JSON object with named columns, this is list",
        ),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: broken JSON \(nested too deeply\)"),
        ("a.json", b'[{"a": 1},\n{"a" 1}]', r"a\.json: broken JSON .* at line 2, column 6"),
        ("a.json", b'[{"a": 1}, 7]', r"a\.json:2: a row must be a JSON object"),
        ("a.jsonl.gz", b'{"a": 1}\n', r"damaged gzip file \(Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-20], r"damaged gzip file"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1: the name 'a' is there twice\. Rename"),
        ("a.jsonl", b'{"a": 1, "b": 2, "a": 3}', r"a\.jsonl:1: the name 'a' is there twice"),
        ("a.json", b'[{"a": [{"b": 1, "b": 1}]}]', r"a\.json: the name 'b' is there twice"),
        ("a.csv", b"a,b\n1,2\n3,\x004\n", r"a\.csv:3: holds a byte 0"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), r"a\.csv:1: holds a byte 0"),
        (
            "a.jsonl.gz",
            gzip.compress(b"\n" * 2_000_000, mtime=0),
            r"a\.jsonl\.gz:1000001: 1,000,000 blank lines after each other",
        ),
        ("a.arrow", damaged_arrow(), r"a\.arrow: not a readable Arrow file .*offset"),
        ("a.xlsx", b"", r"unknown ending\. Files end in \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_bad_files_are_named_with_the_line(
    write: Write, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_rows(Path(write(name, content))))


def test_a_missing_file_offers_its_nearest_neighbour(write: Write, tmp_path: Path) -> None:
    write("preferences.jsonl", b"")
    for name, message in [
        ("preference.jsonl", r"no such file\. Did you mean .*preferences\.jsonl\?"),
        ("zzz/x.jsonl", r"the folder .*zzz does not exist either"),
        ("qqq.json", r"no such file in"),
        (".", r"is a folder\. Name a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(read_rows(tmp_path / name))


def test_a_line_is_read_before_the_next_one_is_parsed(write: Write) -> None:
    rows = read_rows(Path(write("a.jsonl", b'{"a": 1}\nbroken\n')))
    assert next(rows) == (1, {"a": 1})
