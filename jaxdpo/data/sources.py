"""Where preference pairs come from: local files and hub sets, each with a parser from a raw row to a record.

Adding a set: write a parser here, add its row to SOURCES (and its name to data.format), add a fixture test (docs/data.md).
"""

import dataclasses
import difflib
import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions

from jaxdpo.data.files import file_kind, read_rows
from jaxdpo.data.records import (
    DataReport,
    Dropped,
    Message,
    Parser,
    Preference,
    Text,
    Turns,
    is_unicode,
    printable,
    read_text,
    shared_length,
)

logger = logging.getLogger(__name__)

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ANSWER = "\n\nAssistant:"
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
COLUMNS = ("prompt", "chosen", "rejected", "weight", "id")
ROWS_TO_DETECT = 16


# --- hh-rlhf: {chosen, rejected}, each a whole dialogue in one string ---------------------------------------------------------


def parse_hh(row: Mapping[str, Any]) -> Preference | Dropped:
    """Anthropic/hh-rlhf. The prompt ends with the last Assistant marker inside what both dialogues share.

    Cutting at the end of the shared text itself would move the words with which both answers begin into the prompt.

    Raises:
        ValueError: a column is missing or not a string.
    """
    _require_columns(row, "chosen", "rejected")
    chosen, rejected = (_string(row[column], column) for column in ("chosen", "rejected"))
    cut = chosen.rfind(HH_ANSWER, 0, shared_length(chosen, rejected))
    if cut < 0:
        return Dropped("no shared prompt")
    answers = [text[cut + len(HH_ANSWER) :] for text in (chosen, rejected)]
    if any(HH_TURN.search(answer) for answer in answers):
        return Dropped("turn marker inside an answer")
    before, *parts = HH_TURN.split(chosen[:cut])
    roles = [HH_ROLES[name] for name in parts[0::2]]
    if before or roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or len(roles) % 2 == 0:
        return Dropped("roles do not alternate")
    prompt = tuple(Message(role, text.removeprefix(" ")) for role, text in zip(roles, parts[1::2], strict=True))
    return _checked(row, prompt, *(_answer(answer.removeprefix(" ")) for answer in answers))


def is_hh(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like hh-rlhf: no prompt, and both dialogues open with a Human turn."""
    texts = (row.get("chosen"), row.get("rejected"))
    return row.get("prompt") is None and all(isinstance(text, str) and text.startswith("\n\nHuman:") for text in texts)


# --- {prompt, chosen, rejected} or implicit prompt, as strings or as messages -------------------------------------------------


def parse_preference(row: Mapping[str, Any]) -> Preference | Dropped:
    """TRL's preference rows: prompt, chosen, rejected as strings or message lists; without a prompt, both answers contain it.

    Raises:
        ValueError: a column is missing or has the wrong type.
    """
    _require_columns(row, "chosen", "rejected")
    if row["chosen"] is None or row["rejected"] is None:
        return Dropped("an answer is null")
    chosen, rejected = (read_text(row[column], column) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("columns 'chosen' and 'rejected' differ in type: both must be strings or both lists of messages")
    prompt = None if row.get("prompt") is None else read_text(row["prompt"], "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _from_strings(row, prompt, chosen, rejected)
    return _from_messages(row, prompt, tuple(chosen), tuple(rejected))  # type: ignore[arg-type]


def _from_strings(row: Mapping[str, Any], prompt: Text | None, chosen: str, rejected: str) -> Preference | Dropped:
    if isinstance(prompt, tuple):
        return _checked(row, prompt, _answer(chosen), _answer(rejected))
    if prompt is not None:
        return _checked(row, prompt, chosen, rejected)
    shared = chosen[: shared_length(chosen, rejected)]
    word = re.search(r"\s+\S*\Z", shared)  # the word in which they part belongs to the answers whole, with the space before it
    if word is None or not word.start():
        return Dropped("no shared prompt")
    return _checked(row, shared[: word.start()], chosen[word.start() :], rejected[word.start() :])


def _from_messages(row: Mapping[str, Any], prompt: Text | None, chosen: Turns, rejected: Turns) -> Preference | Dropped:
    if isinstance(prompt, str):
        prompt = (Message("user", prompt),)
    if prompt is None:
        shared = shared_length(chosen[:-1], rejected[:-1])  # the last turn of each is its answer, even if they are the same
        return _checked(row, chosen[:shared], chosen[shared:], rejected[shared:])
    if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:  # the answers repeat the prompt column
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _checked(row, prompt, chosen, rejected)


def _checked(row: Mapping[str, Any], prompt: Text, chosen: Text, rejected: Text) -> Preference | Dropped:
    """The record, unless it has nothing to learn from."""
    weight = _weight(row.get("weight"))
    if isinstance(prompt, tuple):
        if not prompt or prompt[-1].role == "assistant":
            return Dropped("prompt ends with an assistant turn" if prompt else "no shared prompt")
        if any(len(answer) != 1 or not isinstance(answer[0], Message) or answer[0].role != "assistant" for answer in (chosen, rejected)):
            return Dropped("answer is not one assistant turn")
    if any(not (answer if isinstance(answer, str) else answer[0].content).strip() for answer in (chosen, rejected)):
        return Dropped("empty answer")
    if chosen == rejected:
        return Dropped("identical answers")
    if weight == 0:
        return Dropped("weight 0")
    own_id = row.get("id")
    record = Preference(prompt, chosen, rejected, id=str(own_id) if isinstance(own_id, str | int) else "", weight=weight)
    return record if all(map(is_unicode, record.texts)) else Dropped("text is not valid Unicode")


def _answer(text: str) -> Turns:
    return (Message("assistant", text),)


def _require_columns(row: Mapping[str, Any], *names: str) -> None:
    if missing := [name for name in names if name not in row]:
        found = ", ".join(printable(str(name)) for name in row) or "none"
        raise ValueError(f"column {' and '.join(map(repr, missing))} is missing; columns found: {found}")


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {type(value).__name__}, must be a string")
    return value


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"column 'weight' is {printable(repr(value))}, must be a number that is not negative")
    return float(value)


# --- the table of sets, and reading one ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """One row format, and the hub set that has it."""

    parse: Parser
    columns: tuple[str, ...]
    """Columns that the parser reads; others are reported as ignored."""
    hub: str | None = None
    """Hub id of the set, offered under this source's name."""
    subsets: tuple[str, ...] = ()
    """Folders of the hub set, offered as name/subset."""


SOURCES: dict[str, Source] = {
    "hh-rlhf": Source(
        parse_hh,
        ("chosen", "rejected", "weight", "id"),
        hub="Anthropic/hh-rlhf",
        subsets=("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"),
    ),
    "preference": Source(parse_preference, COLUMNS),
}


@dataclasses.dataclass(frozen=True)
class SetSpec:
    """One entry of data.train or data.eval, taken apart."""

    text: str
    path: Path | None
    """The file, or None for a hub set."""
    source: str | None
    """Row of SOURCES that a hub name fixes; None: found from the rows."""
    hub: str | None
    subset: str | None
    split: str
    count: int | None
    """Rows to read at most."""


def parse_spec(text: str, option: str) -> SetSpec:
    """Take `path[:count]` or `name[:split][:count]` apart. Hub sets default to split train, or test for data.eval.

    Raises:
        ValueError: an unknown set name (the nearest is offered), or a count below 1.
    """
    head, _, tail = text.rpartition(":")
    rest, count = (head, int(tail)) if tail.isdecimal() and not Path(text).is_file() else (text, None)
    if count == 0:
        raise ValueError(f"{option}={text}: the count must be at least 1")
    path = Path(rest).expanduser()
    if path.exists() or file_kind(path) or rest.startswith((".", "/", "~")) or (len(path.parts) > 1 and path.parent.is_dir()):
        return SetSpec(text, path, None, None, None, "", count)
    name, _, split = rest.partition(":")
    source, hub, subset = _hub_set(name, f"{option}={text}")
    return SetSpec(text, None, source, hub, subset, split or ("test" if option == "data.eval" else "train"), count)


def _hub_set(name: str, place: str) -> tuple[str | None, str, str | None]:
    """(row of SOURCES or None, hub id, subset or None) of a set's name."""
    offered: dict[str, tuple[str, str, str | None]] = {}
    for source, row in SOURCES.items():
        if row.hub is not None:
            offered[source] = offered[row.hub] = (source, row.hub, None)
            offered.update({f"{source}/{subset}": (source, row.hub, subset) for subset in row.subsets})
    if name in offered:
        return offered[name]
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.8)
    if near or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        files = [str(path) for path in Path().iterdir() if file_kind(path)]
        nearest = near or difflib.get_close_matches(name, [*files, *offered], n=1, cutoff=0.0)
        raise ValueError(
            f"{place}: no such file or set. Did you mean {nearest[0]}? Sets: {', '.join(offered)}. "
            "A file ends in .jsonl, .json or .parquet; any hub set in TRL's format is written owner/name"
        )
    return None, name, None


def read_set(text: str, data_format: str, option: str) -> tuple[DataReport, Iterator[Preference]]:
    """Open one entry of data.train or data.eval.

    Returns the report, whose counts grow while the records are taken from the iterator beside it.

    Raises:
        ValueError: the set cannot be opened, is empty, or (while iterating) a row has the wrong form; names file and row.
    """
    spec = parse_spec(text, option)
    place = f"{option}={printable(text)}: "
    rows = itertools.islice(_placed(read_rows(spec.path) if spec.path else _hub_rows(spec), place), spec.count)
    head = list(itertools.islice(rows, ROWS_TO_DETECT))
    if not head:
        raise ValueError(f"{place}has no rows")
    report = DataReport(text)
    forced = spec.source or (None if data_format == "auto" else data_format)
    report.format = forced or ("hh-rlhf" if all(is_hh(row) for _, row in head) else "preference")
    source = SOURCES[report.format]
    report.ignored_columns = tuple(str(name) for name in head[0][1] if name not in source.columns)
    how = "forced by data.format" if forced and not spec.source else "known set" if forced else "found from its rows"
    logger.info("%s=%s: format %s (%s)", option, printable(text), report.format, how)
    name = spec.path.name if spec.path else f"{spec.hub}/{spec.subset or ''}:{spec.split}"
    return report, _records(itertools.chain(head, rows), source.parse, report, name, place)


def _placed(rows: Iterable[tuple[int, Any]], place: str) -> Iterator[tuple[int, Any]]:
    """The rows; an error while reading them is told with the option that named their set."""
    try:
        yield from rows
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


def _records(rows: Iterable[tuple[int, Any]], parse: Parser, report: DataReport, name: str, place: str) -> Iterator[Preference]:
    for number, row in rows:
        report.rows_read += 1
        try:
            record = parse(row)
        except ValueError as error:
            raise ValueError(f"{place}{printable(name)}, row {number}: {error}") from None
        if isinstance(record, Dropped):
            report.drop(record.reason, f"{name}:{number}")
        else:
            report.parsed += 1
            yield record if record.id else dataclasses.replace(record, id=f"{name}:{number}")


def _hub_rows(spec: SetSpec) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = datasets.load_dataset(spec.hub or "", data_dir=spec.subset, split=spec.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"the hub set {spec.hub} could not be loaded ({printable(str(error))}). "
            "Check the name, split and network, or download it and name the file"
        ) from None
    yield from enumerate(rows, start=1)  # type: ignore[arg-type]
