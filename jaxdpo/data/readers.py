"""Rows of local files: JSON lines, JSON arrays, CSV, Parquet and Arrow, plain or gzipped.

Not datasets.load_dataset because it copies a file into its own cache before the first row, unifies
the columns of all rows, and names neither file nor line when a row is broken.
"""

import codecs
import csv
import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from jaxdpo.utils.text import printable

Row = dict[str, Any]

MAX_BLANK_LINES = 10**6
"""Most blank lines after each other: a small .gz can hold gigabytes of them."""
MAX_LINE = 32 * 2**20
"""Longest line of a text file, in bytes: far above any row, and memory for a file without lines."""


def file_kind(path: Path) -> str | None:
    """The ending that says how to read a file, without .gz: a key of READERS, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if suffixes and suffixes[-1] in READERS:
        return suffixes[-1]
    return None


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row), one at a time; only a .json array is read at once.

    In JSON lines and CSV the number is that of the line.

    Raises:
        ValueError: the file is missing, damaged, not UTF-8 or not what its ending says; names file
            and line.
    """
    kind = file_kind(path)
    if not path.is_file() or kind is None:
        raise ValueError(_not_readable(path))
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            yield from READERS[kind](stream, str(path))  # type: ignore[arg-type]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}). Copy it again") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def file_hash(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        ValueError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(_not_readable(path))
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def _not_readable(path: Path) -> str:
    if path.is_dir():
        return f"{path}: is a folder. Name a file in it that ends in {', '.join(READERS)}"
    if path.exists():
        return f"{path}: unknown ending. Files end in {', '.join(READERS)}, also with .gz"
    if not path.parent.is_dir():
        return f"{path}: no such file; the folder {path.parent} does not exist either"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if near:
        return f"{path}: no such file. Did you mean {path.parent / near[0]}?"
    return f"{path}: no such file in {path.parent}"


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without the byte order mark."""
    number = num_blank = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(
                f"{name}:{number}: the line is longer than {MAX_LINE >> 20} MiB. "
                "Is each row on a line of its own?"
            )
        num_blank = num_blank + 1 if line in (b"\n", b"\r\n") else 0
        if num_blank > MAX_BLANK_LINES:
            raise ValueError(
                f"{name}:{number}: {MAX_BLANK_LINES:,} blank lines after each other. "
                "Is it the right file?"
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line


def _read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(stream, name):
        if line.strip():
            place = f"{name}:{number}"
            yield number, _object(_parse(line.rstrip(b"\r\n"), place), place)


def _read_json(stream: BinaryIO, name: str) -> Iterator[tuple[int, Row]]:
    """An array of objects (read at once), or JSON lines under another ending."""
    first = stream.read(64)
    stream.seek(0)
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _read_lines(stream, name)
        return
    rows = _parse(stream.read().removeprefix(codecs.BOM_UTF8), name)
    for number, row in enumerate(rows, start=1):
        yield number, _object(row, f"{name}:{number}")


def _read_csv(stream: BinaryIO, name: str) -> Iterator[tuple[int, Row]]:
    """Cells are text, except empty ones (null), numbers in CSV_NUMBERS, and messages as JSON."""
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(_csv_lines(stream, name), strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not header:
                header = cells
                if len(set(header)) != len(header):
                    raise ValueError(f"{name}:{number}: {_RepeatedName(header)}")
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(
                        f"{name}:{number}: has {len(cells)} cells, the header has {len(header)}"
                    )
                row = {}
                for column, text in zip(header, cells, strict=True):
                    row[column] = _cell(column, text)
                yield number, row
    except csv.Error as error:
        raise ValueError(f"{name}:{start}: broken CSV ({error})") from None


def _csv_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    for number, line in _lines(stream, name):
        if b"\0" in line:
            raise ValueError(
                f"{name}:{number}: holds a byte 0, which no text has. Write the file again as UTF-8"
            )
        yield _decode(line, f"{name}:{number}")


def _cell(column: str, text: str) -> Any:
    if not text:
        return None
    try:
        if column in CSV_NUMBERS:
            return float(text)
        if text.startswith(("[{", "[ {")):
            value = json.loads(text)
            if all(_is_message_or_tool(item) for item in value):
                return value
    except ValueError:
        pass  # text that only looks like it
    return text


def _is_message_or_tool(item: Any) -> bool:
    return isinstance(item, dict) and bool(item.keys() & {"role", "from", "function"})


CSV_NUMBERS = ("weight", "margin", "labels", "score_A", "score_B", "rank")
"""Columns of CSV files whose cells are numbers."""


def _read_arrow(stream: BinaryIO, name: str) -> Iterator[tuple[int, Row]]:
    """The stream format, as datasets writes it."""
    try:
        batches = pyarrow.ipc.open_stream(stream)
        yield from _batch_rows(batches)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name}: not a readable Arrow file ({printable(str(error))})") from None


def _batch_rows(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[tuple[int, Row]]:
    """Numbered rows of batches that are checked first: damaged offsets crash the reading."""
    number = 0
    for batch in batches:
        batch.validate(full=True)
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _read_parquet(stream: BinaryIO, name: str) -> Iterator[tuple[int, Row]]:
    try:
        batches = pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024)
        yield from _batch_rows(batches)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name}: not a readable Parquet file ({printable(str(error))})") from None


READERS: dict[str, Callable[[BinaryIO, str], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        raise ValueError(
            f"{place}: not UTF-8 (byte 0x{bad:02x} at position {error.start}). "
            "Convert the file to UTF-8"
        ) from None


class _RepeatedName(Exception):
    """Two columns or fields have one name: all but one would be lost."""

    def __init__(self, names: Sequence[str]) -> None:
        again = next(name for name in names if names.count(name) > 1)
        super().__init__(
            f"the name {printable(repr(again))} is there twice. Rename or remove one of them"
        )


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _RepeatedName([name for name, _ in pairs])
    return fields


def _parse(data: bytes, place: str) -> Any:
    try:
        return json.loads(_decode(data, place), object_pairs_hook=_fields_once)
    except _RepeatedName as error:
        raise ValueError(f"{place}: {error}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = error.msg.removesuffix(" starting at")
        raise ValueError(
            f"{place}: broken JSON ({reason} at {where}column {error.colno})"
        ) from None
    except RecursionError:
        raise ValueError(f"{place}: broken JSON (nested too deeply)") from None


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f"{place}: a row must be a JSON object with named columns, "
            f"this is {type(value).__name__}"
        )
    return value
