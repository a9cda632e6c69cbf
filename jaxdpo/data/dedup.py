"""Pairs that stand twice in the data, pairs that contradict each other, and validation prompts that are trained on."""

from collections.abc import Sequence

import numpy as np

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Dropped
from jaxdpo.data.pair_table import PairTable
from jaxdpo.data.report import DataReport
from jaxdpo.utils.text import printable


def find_contradictions(table: PairTable) -> np.ndarray:
    """Pairs whose two answers another pair prefers the other way round: bool [N]."""
    keys = _keys(table)
    known = np.unique(keys)
    keys ^= np.uint64(1)
    return known.take(known.searchsorted(keys), mode="clip") == keys


def find_duplicates(table: PairTable) -> np.ndarray:
    """Pairs that are equal to one before them: bool [N]."""
    _, first = np.unique(_keys(table), return_index=True)
    found = np.ones(len(table), bool)
    found[first] = False
    return found


def _keys(table: PairTable) -> np.ndarray:
    """uint64 [N]: equal for equal pairs; those of contradictions differ in the last bit alone."""
    return table.pair_keys & ~np.uint64(1) | table.orders


def settle_repeats(
    table: PairTable, section: DataSection, option: str, reports: Sequence[DataReport]
) -> tuple[PairTable, dict[str, int]]:
    """The pairs without those that data.contradictions and data.duplicates drop, and how many there were of each.

    Raises:
        ValueError: there are some, and the option says error.
    """
    counts = {}
    for name, find, how in (
        ("contradictions", find_contradictions, section.contradictions),
        ("duplicates", find_duplicates, section.duplicates),
    ):
        mask = find(table)
        counts[name] = int(mask.sum())
        table = _settle(table, mask, how, option, reports, name.removesuffix("s"), f"data.{name}")
    return table, counts


def settle_overlap(
    held_out: PairTable, train: PairTable, section: DataSection, reports: Sequence[DataReport]
) -> PairTable:
    """The validation pairs without those whose prompt is trained on, as data.overlap says.

    Raises:
        ValueError: there are some, and the option says error.
    """
    mask = np.isin(held_out.prompt_keys, train.prompt_keys)
    return _settle(
        held_out,
        mask,
        section.overlap,
        "data.eval",
        reports,
        "prompt is in the training sets",
        "data.overlap",
    )


def _settle(
    table: PairTable,
    mask: np.ndarray,
    how: str,
    option: str,
    reports: Sequence[DataReport],
    reason: str,
    setting: str,
) -> PairTable:
    """The table without the pairs of the mask, which are counted, if they are to be dropped."""
    if how == "keep" or not mask.any():
        return table
    if how == "error":
        first = ", ".join(printable(table.ids[place]) for place in np.flatnonzero(mask)[:3])
        raise ValueError(
            f"{option}: {mask.sum()} pairs: {reason} (the first: {first}). Mend the sets, or set {setting}=drop or keep"
        )
    for place, source in zip(np.flatnonzero(mask).tolist(), table.sources[mask], strict=True):
        report = reports[source]
        report.drop(Dropped(reason, filtered=True), table.ids[place])
        report.kept -= 1
    return table.take(~mask)
