"""Where preference pairs come from: local files and hub sets, and the forms that their rows have.

Adding a set: write a parser in a file of its own, add its row to FORMATS (and its name to data.format) and the set to HUB_SETS, add
a fixture test (docs/data.md).
"""

import collections
import dataclasses
import difflib
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats import hh_rlhf, oasst, ranked, shp, trl
from jaxdpo.data.formats.common import EMPTY, IDENTICAL, OPTIONAL, Parser, Row
from jaxdpo.data.formats.preference import Dropped, Preference
from jaxdpo.data.readers import file_hash, file_kind, read_rows
from jaxdpo.data.report import DataReport
from jaxdpo.data.splits import split_files
from jaxdpo.utils.text import printable

logger = logging.getLogger(__name__)

PlacedRows = Iterator[tuple[str, Row]]
"""Rows with where they stand: pairs.jsonl:3."""

ROWS_TO_DETECT = 16

READING_OPTIONS = (
    "format",
    "pairing",
    "max_pairs_per_prompt",
    "shp",
    "oasst",
    "identical",
    "empty",
)
"""Options of the data section that decide which records a set gives."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One form of rows."""

    parse: Parser
    columns: tuple[str, ...]
    """Columns that the parser reads; others are reported as ignored."""
    detect: Callable[[Row], bool]
    """Whether a row looks like it."""
    gather: Callable[[PlacedRows], PlacedRows] | None = None
    """Turns rows into those that the parser reads, where one pair is made of several."""
    pairs_per_prompt: int = 0
    """Most training pairs with one prompt that the set's authors recommend. 0: no limit."""


FORMATS: dict[str, Format] = {
    "hh-rlhf": Format(hh_rlhf.parse_hh, hh_rlhf.COLUMNS, hh_rlhf.is_hh),
    "shp": Format(shp.parse_shp, shp.COLUMNS, shp.is_shp, pairs_per_prompt=shp.PAIRS_PER_POST),
    "oasst": Format(oasst.parse_oasst, oasst.COLUMNS, oasst.is_oasst, gather=oasst.gather_trees),
    "ranked": Format(ranked.parse_ranked, ranked.RANKED_COLUMNS, ranked.is_ranked),
    "ab": Format(ranked.parse_ab, ranked.AB_COLUMNS, ranked.is_ab),
    "preference": Format(trl.parse_preference, trl.COLUMNS, lambda row: True),
}
"""Forms of rows by their name in data.format; the first that fits the first rows of a set is taken."""


@dataclasses.dataclass(frozen=True)
class HubSet:
    """A set on the hub that is offered under a short name."""

    hub: str
    format: str
    subsets: tuple[str, ...] = ()
    """Folders of the set, offered as name/subset."""
    splits: tuple[str, str | None] = ("train", "test")
    """Splits that data.train and data.eval mean when they name none; None: there is no such split."""


HUB_SETS: dict[str, HubSet] = {
    "hh-rlhf": HubSet(
        "Anthropic/hh-rlhf",
        "hh-rlhf",
        ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"),
    ),
    "shp": HubSet("stanfordnlp/SHP", "shp", shp.SUBREDDITS, ("train", "validation")),
    "oasst1": HubSet("OpenAssistant/oasst1", "oasst", splits=("train", "validation")),
    "oasst2": HubSet("OpenAssistant/oasst2", "oasst", splits=("train", "validation")),
    "ultrafeedback": HubSet(
        "HuggingFaceH4/ultrafeedback_binarized", "preference", splits=("train_prefs", "test_prefs")
    ),
    "ultrafeedback-trl": HubSet("trl-lib/ultrafeedback_binarized", "preference"),
    "orca-dpo-pairs": HubSet("Intel/orca_dpo_pairs", "preference", splits=("train", None)),
    "dpo-mix-7k": HubSet("argilla/dpo-mix-7k", "preference"),
}


@dataclasses.dataclass(frozen=True)
class SetSpec:
    """One entry of data.train or data.eval, taken apart."""

    text: str
    option: str
    path: Path | None = None
    """The file or folder, or None for a hub set."""
    format: str | None = None
    """Form of the rows that a known hub set has; None: found from the rows."""
    hub: str = ""
    revision: str | None = None
    """Commit, tag or branch of the hub set."""
    subset: str | None = None
    split: str | None = None
    """None: the usual one of a folder."""
    count: int | None = None
    """Rows to read at most."""

    @property
    def place(self) -> str:
        """The option and its value, for messages."""
        return f"{self.option}={printable(self.text)}"


# --- names ---


def parse_spec(text: str, option: str) -> SetSpec:
    """Take `file[:count]`, `folder[:split][:count]` or `name[@revision][:split][:count]` apart.

    Raises:
        ValueError: an unknown set name (the nearest is offered), no split, or a count below 1.
    """
    head, _, tail = text.rpartition(":")
    rest, count = (
        (head, int(tail)) if tail.isdecimal() and not Path(text).is_file() else (text, None)
    )
    if count == 0:
        raise ValueError(f"{option}={text}: the count must be at least 1")
    spec = SetSpec(text, option, count=count)
    folder, _, split = rest.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return dataclasses.replace(spec, path=Path(folder).expanduser(), split=split)
    path = Path(rest).expanduser()
    if (
        path.exists()
        or file_kind(path)
        or rest.startswith((".", "/", "~"))
        or (len(path.parts) > 1 and path.parent.is_dir())
    ):
        return dataclasses.replace(spec, path=path)
    return _hub_spec(spec, *rest.partition(":")[::2])


def _hub_spec(spec: SetSpec, name: str, split: str) -> SetSpec:
    name, _, revision = name.partition("@")
    known, subset = _known_set(name, spec)
    usual = known.splits[spec.option == "data.eval"]
    if not split and usual is None:
        raise ValueError(
            f"{spec.place}: the set has no split for validation. Name one, or leave data.eval out to hold back pairs of data.train"
        )
    return dataclasses.replace(
        spec,
        format=known.format or None,
        hub=known.hub,
        revision=revision or None,
        subset=subset,
        split=split or usual,
    )


def _known_set(name: str, spec: SetSpec) -> tuple[HubSet, str | None]:
    """The set that a name means, and its subset."""
    offered: dict[str, tuple[HubSet, str | None]] = {}
    for short, known in HUB_SETS.items():
        offered[short] = offered[known.hub] = (known, None)
        offered.update({f"{short}/{subset}": (known, subset) for subset in known.subsets})
    if name in offered:
        return offered[name]
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.8)
    if near or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        files = [str(path) for path in Path().iterdir() if file_kind(path)]
        nearest = near or difflib.get_close_matches(name, [*files, *offered], n=1, cutoff=0.0)
        raise ValueError(
            f"{spec.place}: no such file or set. Did you mean {nearest[0]}? Sets: {', '.join(HUB_SETS)}. "
            "A file ends in .jsonl, .json, .csv or .parquet; any hub set with rows of a known form is written owner/name"
        )
    return HubSet(name, ""), None


# --- reading ---


def set_identity(text: str, option: str) -> list[Any]:
    """JSON values that change when the rows of an entry do: its name, and hashes of its files or the hub set's own fingerprint.

    Raises:
        ValueError: the set cannot be opened.
    """
    spec = parse_spec(text, option)
    try:
        if spec.path is None:
            return [text, _hub_set(spec)._fingerprint]
        return [text, *([file.name, file_hash(file)] for file in _files(spec, spec.path))]
    except ValueError as error:
        raise ValueError(f"{spec.place}: {error}") from None


def read_set(
    text: str, section: DataSection, option: str
) -> tuple[DataReport, Iterator[Preference]]:
    """Open one entry of data.train or data.eval.

    Returns the report, whose counts grow while the records are taken from the iterator beside it.

    Raises:
        ValueError: the set cannot be opened, is empty, or (while iterating) a row has the wrong form; names file and row.
    """
    spec = parse_spec(text, option)
    rows = itertools.islice(_placed_rows(spec), spec.count)
    head = list(itertools.islice(rows, ROWS_TO_DETECT))
    if not head:
        raise ValueError(f"{spec.place}: has no rows")
    forced = spec.format or (None if section.format == "auto" else section.format)
    name = forced or next(
        name for name, form in FORMATS.items() if all(form.detect(row) for _, row in head)
    )
    how = (
        "forced by data.format"
        if forced and not spec.format
        else "known set"
        if forced
        else "found from its rows"
    )
    logger.info("%s: format %s (%s)", spec.place, name, how)
    form = FORMATS[name]
    columns = dict.fromkeys(itertools.chain.from_iterable(row for _, row in head))
    ignored = tuple(str(column) for column in columns if column not in (*form.columns, *OPTIONAL))
    report = DataReport(text, name, ignored_columns=ignored)
    records = _records(itertools.chain(head, rows), form, section, report, spec.place)
    limit = (
        0
        if option == "data.eval"
        else form.pairs_per_prompt
        if section.max_pairs_per_prompt is None
        else section.max_pairs_per_prompt
    )
    return report, _limited(records, limit, report) if limit else records


def _placed_rows(spec: SetSpec) -> PlacedRows:
    """The rows; an error while reading them is told with the option that named their set."""
    try:
        yield from _hub_rows(spec) if spec.path is None else _local_rows(spec, spec.path)
    except ValueError as error:
        raise ValueError(f"{spec.place}: {error}") from None


def _local_rows(spec: SetSpec, path: Path) -> PlacedRows:
    for file in _files(spec, path):
        yield from ((f"{file.name}:{number}", row) for number, row in read_rows(file))


def _files(spec: SetSpec, path: Path) -> list[Path]:
    usual = (
        ("test", "validation", "test_prefs")
        if spec.option == "data.eval"
        else ("train", "train_prefs")
    )
    return list(split_files(path, spec.split, usual)) if path.is_dir() else [path]


def _hub_rows(spec: SetSpec) -> PlacedRows:
    name = spec.hub + (f"/{spec.subset}" if spec.subset else "")
    yield from (
        (f"{name}:{spec.split}:{number}", row) for number, row in enumerate(_hub_set(spec), start=1)
    )  # type: ignore[misc]


def _hub_set(spec: SetSpec) -> datasets.Dataset:
    try:
        rows = datasets.load_dataset(
            spec.hub, data_dir=spec.subset, split=spec.split, revision=spec.revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"the hub set {spec.hub} could not be loaded ({printable(str(error))}). "
            "Check the name, split and network, or download it and name the folder"
        ) from None
    assert isinstance(rows, datasets.Dataset), "one split was asked for"
    return rows


def _records(
    rows: PlacedRows, form: Format, section: DataSection, report: DataReport, place: str
) -> Iterator[Preference]:
    errors = {
        reason
        for reason, how in ((EMPTY, section.empty), (IDENTICAL, section.identical))
        if how == "error"
    }
    try:
        for where, row in (form.gather or iter)(_counted(rows, report)):
            for number, outcome in enumerate(_parsed(form.parse, row, section, where), start=1):
                name = where if number == 1 else f"{where}/{number}"
                if isinstance(outcome, Dropped):
                    if outcome.reason in errors:
                        option = "empty" if outcome.reason == EMPTY else "identical"
                        raise ValueError(
                            f"{printable(name)}: {outcome.reason}. Repair it, or set data.{option}=drop"
                        )
                    report.drop(outcome, name)
                else:
                    report.parsed += 1
                    yield outcome if outcome.id else dataclasses.replace(outcome, id=name)
    except ValueError as error:
        raise ValueError(
            str(error) if str(error).startswith(place) else f"{place}: {error}"
        ) from None


def _counted(rows: PlacedRows, report: DataReport) -> PlacedRows:
    for where, row in rows:
        report.rows_read += 1
        yield where, row


def _parsed(
    parse: Parser, row: Row, section: DataSection, where: str
) -> Iterator[Preference | Dropped]:
    try:
        yield from parse(row, section)
    except ValueError as error:
        raise ValueError(f"{printable(where)}: {error}") from None


def _limited(records: Iterable[Preference], limit: int, report: DataReport) -> Iterator[Preference]:
    """The first pairs of each prompt."""
    seen: collections.Counter[int] = collections.Counter()
    for record in records:
        seen[record.prompt_key] += 1
        if seen[record.prompt_key] > limit:
            report.drop(Dropped(f"more than {limit} pairs of one prompt", filtered=True), record.id)
        else:
            yield record
