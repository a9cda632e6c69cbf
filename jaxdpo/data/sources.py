"""Where preference pairs come from: local files and hub sets, and the formats of their rows.

Adding a set: write a parser in a file of its own, add it to FORMATS (and its name to data.format)
and the set to HUB_SETS, add a fixture test (docs/data.md).
"""

import collections
import contextlib
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
from jaxdpo.data.formats import ab, hh_rlhf, oasst, ranked, shp, trl
from jaxdpo.data.formats.common import EMPTY, IDENTICAL, Parser, Row, Unread, media_column
from jaxdpo.data.formats.preference import Dropped, Preference
from jaxdpo.data.readers import file_hash, file_kind, read_rows
from jaxdpo.data.report import DataReport
from jaxdpo.data.splits import split_files
from jaxdpo.utils.text import printable

logger = logging.getLogger(__name__)

NamedRows = Iterator[tuple[str, Row]]
"""Rows with file and number: pairs.jsonl:3."""

ROWS_TO_DETECT = 16
"""Rows that must all look like a format before it is chosen: one row may lack a column by chance,
and rows in memory twice should be few."""

READING_OPTIONS = (
    "format",
    "pairing",
    "score",
    "max_pairs_per_prompt",
    "shp",
    "oasst",
    "identical",
    "empty",
)
"""Options of the data section that decide which records a set gives."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One format of rows."""

    parse: Parser
    unread: Unread
    """The columns with content that the parser does not read: they are counted and reported."""
    detect: Callable[[Row], bool]
    """Whether a row looks like it."""
    gather: Callable[[NamedRows], NamedRows] | None = None
    """Turns rows into those that the parser reads, where one pair is made of several."""
    pairs_per_prompt: int = 0
    """Most training pairs with one prompt that the set's authors recommend. 0: no limit."""


FORMATS: dict[str, Format] = {
    "hh-rlhf": Format(hh_rlhf.parse_hh, hh_rlhf.unread_hh, hh_rlhf.is_hh),
    "shp": Format(shp.parse_shp, shp.unread_shp, shp.is_shp, pairs_per_prompt=shp.PAIRS_PER_POST),
    "oasst": Format(
        oasst.parse_oasst, oasst.unread_oasst, oasst.is_oasst, gather=oasst.gather_trees
    ),
    "ranked": Format(ranked.parse_ranked, ranked.unread_ranked, ranked.is_ranked),
    "ab": Format(ab.parse_ab, ab.unread_ab, ab.is_ab),
    "preference": Format(trl.parse_preference, trl.unread_preference, lambda row: True),
}
"""Formats by their name in data.format; the first that fits the first rows of a set is taken."""


@dataclasses.dataclass(frozen=True)
class HubSet:
    """A set on the hub that is offered under a short name."""

    hub: str
    format: str
    subsets: tuple[str, ...] = ()
    """Folders of the set, offered as name/subset."""
    splits: tuple[str, str | None] = ("train", "test")
    """Splits that data.train and data.eval mean when they name none; None: there is no such."""


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
    """Format of a known hub set; None: found from the rows."""
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
    name, count = text, None
    head, _, last = text.rpartition(":")
    if last.isdecimal() and not Path(text).is_file():
        name, count = head, int(last)
    if count == 0:
        raise ValueError(f"{option}={text}: the count must be at least 1")
    spec = SetSpec(text, option, count=count)
    folder, _, split = name.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return dataclasses.replace(spec, path=Path(folder).expanduser(), split=split)
    path = Path(name).expanduser()
    # A misspelled path should be reported as a missing file, not as an unknown hub set.
    looks_like_path = name.startswith((".", "/", "~")) or (
        len(path.parts) > 1 and path.parent.is_dir()
    )
    if path.exists() or file_kind(path) or looks_like_path:
        return dataclasses.replace(spec, path=path)
    hub_name, _, split = name.partition(":")
    return _hub_spec(spec, hub_name, split)


def _hub_spec(spec: SetSpec, name: str, split: str) -> SetSpec:
    name, _, revision = name.partition("@")
    known, subset = _known_set(name, spec)
    train_split, eval_split = known.splits
    usual = eval_split if spec.option == "data.eval" else train_split
    if not split and usual is None:
        raise ValueError(
            f"{spec.place}: the set has no split for validation. Name one, or leave data.eval out "
            "to hold back pairs of data.train"
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
        for subset in known.subsets:
            offered[f"{short}/{subset}"] = (known, subset)
    if name in offered:
        return offered[name]
    # 0.8: a misspelled short name, but not every owner/name that shares some letters with one.
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.8)
    if not near and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return HubSet(name, ""), None
    if not near:
        files = [str(path) for path in Path().iterdir() if file_kind(path)]
        near = difflib.get_close_matches(name, [*files, *offered], n=1, cutoff=0.0)
    raise ValueError(
        f"{spec.place}: no such file or set. Did you mean {near[0]}? Sets: {', '.join(HUB_SETS)}. "
        "A file ends in .jsonl, .json, .csv or .parquet; any hub set with rows of a known form is "
        "written owner/name"
    )


# --- reading ---


def set_identity(text: str, option: str) -> list[Any]:
    """JSON values that change when the rows of an entry do.

    They are its name, and hashes of its files or the hub set's own fingerprint.

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

    Returns:
        The report, whose counts grow while the records are taken from the iterator beside it.

    Raises:
        ValueError: the set cannot be opened, is empty, or (while iterating) a row has the wrong
            form; names file and row.
    """
    spec = parse_spec(text, option)
    rows = itertools.islice(_named_rows(spec), spec.count)
    head = list(itertools.islice(rows, ROWS_TO_DETECT))
    if not head:
        raise ValueError(f"{spec.place}: has no rows")
    name, how = _choose_format(spec, section, [row for _, row in head])
    logger.info("%s: format %s (%s)", spec.place, name, how)
    form = FORMATS[name]
    report = DataReport(text, name)
    records = _records(itertools.chain(head, rows), form, section, report, spec.place)
    limit = section.max_pairs_per_prompt
    if limit is None:
        limit = form.pairs_per_prompt
    if limit and option != "data.eval":  # validation measures, so nothing is thinned out there
        records = _limited(records, limit, report)
    return report, records


def check_score(section: DataSection, reports: Iterable[DataReport]) -> None:
    """Check that some set has the lists of answers that data.score is about.

    Raises:
        ValueError: none has.
    """
    formats = sorted({report.format for report in reports})
    if section.score is not None and "ranked" not in formats:
        raise ValueError(
            f"data.score={printable(section.score)}: no set has lists of answers to score "
            f"(formats: {', '.join(formats)}). Leave data.score out"
        )


def _choose_format(spec: SetSpec, section: DataSection, rows: list[Row]) -> tuple[str, str]:
    """The name of the rows' format, and how it was found."""
    if spec.format:
        return spec.format, "known set"
    if section.format != "auto":
        return section.format, "forced by data.format"
    for name, form in FORMATS.items():
        if all(form.detect(row) for row in rows):
            return name, "found from its rows"
    raise AssertionError("the last format takes any row")


def _named_rows(spec: SetSpec) -> NamedRows:
    """The rows; an error while reading them names the option that named their set."""
    try:
        yield from _hub_rows(spec) if spec.path is None else _local_rows(spec, spec.path)
    except ValueError as error:
        raise ValueError(f"{spec.place}: {error}") from None


def _local_rows(spec: SetSpec, path: Path) -> NamedRows:
    for file in _files(spec, path):
        for number, row in read_rows(file):
            yield f"{file.name}:{number}", row


def _files(spec: SetSpec, path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if spec.option == "data.eval":
        return split_files(path, spec.split, ("test", "validation", "test_prefs"))
    return split_files(path, spec.split, ("train", "train_prefs"))


def _hub_rows(spec: SetSpec) -> NamedRows:
    name = f"{spec.hub}/{spec.subset}" if spec.subset else spec.hub
    for number, row in enumerate(_hub_set(spec), start=1):
        yield f"{name}:{spec.split}:{number}", row  # type: ignore[misc]


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
    rows: NamedRows, form: Format, section: DataSection, report: DataReport, place: str
) -> Iterator[Preference]:
    try:
        named_rows = _counted(rows, form, section, report)
        if form.gather is not None:
            named_rows = form.gather(named_rows)
        for where, row in named_rows:
            for number, outcome in enumerate(_parsed(form.parse, row, section, where), start=1):
                name = where if number == 1 else f"{where}/{number}"
                if isinstance(outcome, Dropped):
                    _check_allowed(outcome, section, name)
                    report.drop(outcome, name)
                else:
                    report.parsed += 1
                    yield outcome if outcome.id else dataclasses.replace(outcome, id=name)
    except ValueError as error:
        message = str(error)
        if not message.startswith(place):
            message = f"{place}: {message}"
        raise ValueError(message) from None


def _check_allowed(dropped: Dropped, section: DataSection, name: str) -> None:
    """Raise where data.empty or data.identical makes an error of an invalid pair."""
    for reason, option, action in (
        (EMPTY, "empty", section.empty),
        (IDENTICAL, "identical", section.identical),
    ):
        if dropped.reason == reason and action == "error":
            raise ValueError(f"{printable(name)}: {reason}. Repair it, or set data.{option}=drop")


def _counted(rows: NamedRows, form: Format, section: DataSection, report: DataReport) -> NamedRows:
    """The rows; counts them, and in how many each column has content that is not read."""
    for where, row in rows:
        report.rows_read += 1
        with contextlib.suppress(ValueError):  # the parser says what is wrong with the row
            for column in set(form.unread(row, section)):
                report.ignored_columns[column] = report.ignored_columns.get(column, 0) + 1
        yield where, row


def _parsed(
    parse: Parser, row: Row, section: DataSection, where: str
) -> Iterator[Preference | Dropped]:
    media = media_column(row)
    if media is not None:
        yield Dropped(f"column {printable(media)} holds media, and only text is read")
        return
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
