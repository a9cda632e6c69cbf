"""Exact duplicates, pairs that contradict each other, and validation prompts that are trained on.

Near-duplicates are found, not removed, by data/inspect/near_duplicates.py.
"""

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
    keys ^= np.uint64(1)  # what the contradiction of each pair would have
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


def deduplicate(
    table: PairTable, section: DataSection, option: str, reports: Sequence[DataReport]
) -> tuple[PairTable, dict[str, int]]:
    """The pairs without those that data.contradictions and data.duplicates drop.

    Returns:
        The table, and the number of contradictions and of duplicates found (also where they stay).

    Raises:
        ValueError: there are some, and the option says error.
    """
    counts = {}
    for name, find, action in (
        ("contradictions", find_contradictions, section.contradictions),
        ("duplicates", find_duplicates, section.duplicates),
    ):
        mask = find(table)
        counts[name] = int(mask.sum())
        reason = name.removesuffix("s")
        table = _apply(action, f"data.{name}", table, mask, reason, option, reports)
    return table, counts


def remove_overlap(
    held_out: PairTable, train: PairTable, section: DataSection, reports: Sequence[DataReport]
) -> PairTable:
    """The validation pairs without those whose prompt or group is trained on, as data.overlap says.

    Raises:
        ValueError: there are some, and the option says error.
    """
    mask = np.isin(held_out.prompt_keys, train.prompt_keys)
    mask |= np.isin(held_out.group_keys, train.group_keys)
    reason = "prompt is in the training sets"
    return _apply(section.overlap, "data.overlap", held_out, mask, reason, "data.eval", reports)


def _apply(
    action: str,
    setting: str,
    table: PairTable,
    mask: np.ndarray,
    reason: str,
    option: str,
    reports: Sequence[DataReport],
) -> PairTable:
    """Do with the pairs of the mask as an option says: keep, drop (and count them) or error."""
    if action == "keep" or not mask.any():
        return table
    found = np.flatnonzero(mask)
    if action == "error":
        first = ", ".join(printable(table.ids[index]) for index in found[:3])
        raise ValueError(
            f"{option}: {len(found)} pairs: {reason} (the first: {first}). "
            f"Fix the sets, or set {setting}=drop or keep"
        )
    for index, source in zip(found.tolist(), table.sources[mask], strict=True):
        report = reports[source]
        report.drop(Dropped(reason, filtered=True), table.ids[index])
        report.kept -= 1
    return table.take(~mask)
