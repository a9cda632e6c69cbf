"""Counts of what was read, kept, dropped and filtered of each data set (data_report.json)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdpo.data.formats.preference import Dropped
from jaxdpo.utils.text import printable

MAX_EXAMPLES = 5
"""Ids that the report names for each reason: enough to look at, few enough to print."""


@dataclasses.dataclass
class DataReport:
    """Counts of one data set, from the first row read to the pairs that are trained on."""

    name: str
    format: str = ""
    rows_read: int = 0
    parsed: int = 0
    """Pairs that the parser made of the rows."""
    kept: int = 0
    """Pairs that were left after encoding and truncation too."""
    special_text: int = 0
    """Pairs whose text spells one of the tokenizer's special tokens."""
    special_strings: int = 0
    """Pairs of plain strings that spell special tokens, as the output of a chat template does."""
    special_examples: list[str] = dataclasses.field(default_factory=list)
    """Ids of the first of them."""
    verbatim: int = 0
    """Pairs of plain strings, to which no chat template applies."""
    repeats_prompt: int = 0
    """Pairs whose two answers begin with the prompt."""
    thinking: int = 0
    """Pairs whose answers begin with thoughts, right behind the template's generation prompt,
    although the template writes something else before an answer without any."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """What the chat template left out of pairs that are kept, and of how many of them."""
    ignored_columns: dict[str, int] = dataclasses.field(default_factory=dict)
    """Columns that are not read, and in how many rows each has content."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of invalid pairs per reason."""
    filtered: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of valid pairs that an option or the set's own rule excludes, per reason."""
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Ids of the first pairs dropped or filtered for each reason."""

    def drop(self, dropped: Dropped, pair_id: str) -> None:
        """Count one pair that is not used."""
        counts = self.filtered if dropped.filtered else self.dropped
        counts[dropped.reason] = counts.get(dropped.reason, 0) + 1
        examples = self.examples.setdefault(dropped.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(pair_id)

    def count_special_strings(self, ids: Sequence[str]) -> None:
        """Count pairs of strings that spell special tokens."""
        self.special_strings += len(ids)
        self.special_examples += ids[: MAX_EXAMPLES - len(self.special_examples)]

    @property
    def dropped_fraction(self) -> float:
        """Share of invalid pairs, 0 to 1; filtered pairs do not count."""
        dropped = sum(self.dropped.values())
        return dropped / max(self.kept + dropped, 1)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "name": self.name,
            "format": self.format,
            "rows_read": self.rows_read,
            "parsed": self.parsed,
            "kept": self.kept,
            "special_text": self.special_text,
            "verbatim": self.verbatim,
            "repeats_prompt": self.repeats_prompt,
            "thinking": self.thinking,
            "dropped": self._reasons(self.dropped),
            "filtered": self._reasons(self.filtered),
            "left_out": dict(sorted(self.left_out.items())),
            "ignored_columns": dict(sorted(self.ignored_columns.items())),
        }

    def _reasons(self, counts: Mapping[str, int]) -> dict[str, Any]:
        reasons = {}
        for reason, count in sorted(counts.items()):
            reasons[reason] = {"count": count, "examples": self.examples[reason]}
        return reasons


def describe_counts(report: Mapping[str, Any]) -> str:
    """DataReport.to_json() as one line for the console."""
    text = (
        f"{printable(report['name'])} [{report['format']}]: {report['rows_read']} rows read, "
        f"{report['parsed']} parsed, {report['kept']} kept"
    )
    text += _describe_reasons("dropped", report["dropped"])
    text += _describe_reasons("filtered", report["filtered"])
    if report["left_out"]:
        each = ", ".join(f"{printable(what)} ({n:,})" for what, n in report["left_out"].items())
        text += f"; left out by the chat template: {each}"
    if report["ignored_columns"]:
        text += f"; columns not used: {describe_ignored(report['ignored_columns'])}"
    return text


def describe_ignored(columns: Mapping[str, int]) -> str:
    """Columns that are not read, with the number of rows in which each has content."""
    parts = []
    for name, count in columns.items():
        parts.append(f"{printable(name)} ({count:,} {'row' if count == 1 else 'rows'})")
    return ", ".join(parts)


def _describe_reasons(verb: str, reasons: Mapping[str, Any]) -> str:
    if not reasons:
        return ""
    total = sum(item["count"] for item in reasons.values())
    each = ", ".join(f"{item['count']} {printable(reason)}" for reason, item in reasons.items())
    return f"; {verb} {total} ({each})"
