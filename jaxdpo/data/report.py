"""Counts of what was read, kept and dropped of each data set."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdpo.data.formats.preference import Dropped
from jaxdpo.utils.text import printable

MAX_EXAMPLES = 5


@dataclasses.dataclass
class DataReport:
    """Counts of one data set, from the first row read to the pairs that are trained on."""

    name: str
    format: str = ""
    rows_read: int = 0
    parsed: int = 0
    """Rows that the parser turned into a preference."""
    kept: int = 0
    """Pairs that were left after encoding and truncation too."""
    special_text: int = 0
    """Rows whose text spells one of the tokenizer's special tokens."""
    verbatim: int = 0
    """Rows of plain strings, which no chat template touches."""
    ignored_columns: tuple[str, ...] = ()
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of unusable pairs per reason."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of pairs that a rule leaves out, per reason."""
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Ids of the first pairs dropped or left out for each reason."""

    def drop(self, dropped: Dropped, pair_id: str) -> None:
        """Count one pair that is not used."""
        counts = self.left_out if dropped.filtered else self.dropped
        counts[dropped.reason] = counts.get(dropped.reason, 0) + 1
        examples = self.examples.setdefault(dropped.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(pair_id)

    @property
    def dropped_fraction(self) -> float:
        """Share of the pairs that no rule leaves out which are unusable, 0 to 1."""
        dropped = sum(self.dropped.values())
        return dropped / max(self.kept + dropped, 1)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        counts = {
            name: getattr(self, name)
            for name in ("rows_read", "parsed", "kept", "special_text", "verbatim")
        }
        lost = {"dropped": self._reasons(self.dropped), "left_out": self._reasons(self.left_out)}
        return {
            "name": self.name,
            "format": self.format,
            **counts,
            **lost,
            "ignored_columns": list(self.ignored_columns),
        }

    def _reasons(self, counts: Mapping[str, int]) -> dict[str, Any]:
        return {
            reason: {"count": count, "examples": self.examples[reason]}
            for reason, count in sorted(counts.items())
        }


def describe_counts(report: Mapping[str, Any]) -> str:
    """DataReport.to_json() as one line for the console."""
    lost = _describe_reasons("dropped", report["dropped"]) + _describe_reasons(
        "left out", report["left_out"]
    )
    ignored = (
        f"; columns not used: {printable(', '.join(report['ignored_columns']))}"
        if report["ignored_columns"]
        else ""
    )
    counts = f"{report['rows_read']} rows read, {report['parsed']} parsed, {report['kept']} kept"
    return f"{printable(report['name'])} [{report['format']}]: {counts}{lost}{ignored}"


def _describe_reasons(verb: str, reasons: Mapping[str, Any]) -> str:
    each = ", ".join(f"{item['count']} {printable(reason)}" for reason, item in reasons.items())
    return f"; {verb} {sum(item['count'] for item in reasons.values())} ({each})" if reasons else ""
