"""A survey of preference data as tables, the same for a terminal and for a page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdpo.data.inspect.near_duplicates import Matches
from jaxdpo.data.inspect.survey import Odd, Part, Survey, cuts
from jaxdpo.data.pair_table import LENGTHS
from jaxdpo.utils.html_report import Table
from jaxdpo.utils.text import printable

LIMITS = tuple(2**power for power in range(8, 21))
BAR = 16
"""Characters of the longest bar, where there is room."""
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


def tables(survey: Survey) -> list[Table]:
    """What became of the rows, how many pairs there are and how long, what would be cut, what is almost the same, what is odd."""
    found = [_rows(item) for item in survey.sets]
    if survey.parts:
        found += [_pairs(survey), _lengths(survey.parts, survey.unit)]
    if survey.parts and survey.limits is not None:
        found.append(_cuts(survey.parts[0], survey.limits))
    if survey.neighbours is not None:
        found.append(_neighbours(survey))
    return [*found, _odd(survey.odd, survey.unit)]


def bars(part: Part, unit: str, columns: int, blocks: bool = True) -> Table:
    """How long the texts of a part are, as a histogram for a terminal.

    Args:
        columns: width of the terminal.
        blocks: whether it can draw Unicode's eighths of a block.
    """
    edges = 2 ** np.arange(int(part.lengths.max()).bit_length() + 1)
    counts = np.stack(
        [np.histogram(column, np.concatenate([[0], edges]))[0] for column in part.lengths.T]
    )
    places = range(int(np.flatnonzero(counts.any(axis=0))[0]), counts.shape[1])
    spans = [(0 if place == 0 else edges[place - 1], edges[place] - 1) for place in places]
    names = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high in spans]
    digits = len(f"{counts.max():,}")
    frame = max(map(len, (unit, *names))) + 3 * (digits + 1) + 13  # all but the bars
    longest = max(4, min(BAR, (columns - frame) // 3))
    cells = (
        [f"{_bar(n / counts.max(), longest, blocks)} {n:{digits},}" for n in counts[:, place]]
        for place in places
    )
    return Table(
        f"How long the {part.name} texts are",
        [unit, *LENGTHS],
        [[name, *row] for name, row in zip(names, cells, strict=True)],
    )


def _bar(share: float, longest: int, blocks: bool) -> str:
    """A bar with blanks behind it, `longest` characters in all; what is not nothing is seen."""
    eighths = int(np.ceil(share * longest * 8))
    drawn = "█" * (eighths // 8) + _EIGHTHS[eighths % 8] if blocks else "#" * ((eighths + 7) // 8)
    return f"{drawn:{longest}}"


def _rows(item: Mapping[str, Any]) -> Table:
    """What became of the rows of a set."""
    rows = [["rows read", f"{item['rows_read']:,}", ""], ["pairs kept", f"{item['kept']:,}", ""]]
    for verb, reasons in (("dropped", item["dropped"]), ("filtered", item["filtered"])):
        rows += [
            [
                f"{verb}: {printable(reason)}",
                f"{found['count']:,}",
                _names(found["examples"], found["count"]),
            ]
            for reason, found in reasons.items()
        ]
    unused = printable(", ".join(item["ignored_columns"]))
    notes = [f"Columns that are not used: {unused}."] * bool(unused)
    return Table(
        f"Rows of {printable(item['name'])} (form {item['format']})",
        ["", "number", "first ids"],
        rows,
        notes,
    )


def _pairs(survey: Survey) -> Table:
    parts = survey.parts
    rows: list[list[str]] = [
        ["pairs"],
        ["prompts (oasst: trees)"],
        ["the chosen answer is the longer one"],
        ["both answers are of equal length"],
    ]
    for part in parts:
        cells = [
            f"{len(part.lengths):,}",
            f"{part.prompts:,}",
            f"{_longer(part):.1%}",
            f"{_equal(part):.1%}",
        ]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    if all(part.ended is not None for part in parts):
        rows.append(["answers that end in an end marker", *(f"{part.ended:.1%}" for part in parts)])
    part = parts[0]
    baseline = f"A judge that always prefers the longer answer is right in {_longer(part):.1%} of the {part.name} pairs: compare with that."
    return Table(
        "Pairs",
        ["", *(part.name for part in parts)],
        rows,
        [baseline, *(f"Warning: {printable(text)}." for text in survey.warnings)],
    )


def _longer(part: Part) -> float:
    return float((part.lengths[:, 1] > part.lengths[:, 2]).mean())


def _equal(part: Part) -> float:
    return float((part.lengths[:, 1] == part.lengths[:, 2]).mean())


def _lengths(parts: Sequence[Part], unit: str) -> Table:
    rows = []
    for part in parts:
        whole = part.lengths[:, 0] + part.lengths[:, 1:].max(axis=1)
        for name, column in (
            *zip(LENGTHS, part.lengths.T, strict=True),
            ("prompt + longer answer", whole),
        ):
            quantiles = np.percentile(column, (50, 95, 100), method="higher")
            rows.append([f"{part.name}, {name}", *(f"{int(value):,}" for value in quantiles)])
    return Table(f"Lengths in {unit}", ["", "median", "95% are below", "longest"], rows)


def _cuts(part: Part, limits: tuple[int, int]) -> Table:
    total, rows = part.lengths.sum(), []
    for limit, prompt_limit in _limits(limits):
        prompts, answers, left = cuts(part.lengths, limit, prompt_limit)
        any_cut = prompts | answers
        counts = [f"{int(mask.sum()):,}" for mask in (prompts, answers)]
        rows.append(
            [
                f"{limit:,}{' (now)' * (limit == limits[0])}",
                *counts,
                f"{any_cut.mean():.1%}",
                f"{left / total:.1%}",
            ]
        )
        if limit >= limits[0] and not any_cut.any():
            break
    header = [
        "data.max_length",
        "prompts cut",
        "pairs with an answer cut",
        "pairs cut in some way",
        "tokens left",
    ]
    notes = [
        f"Now: data.max_length={limits[0]}, data.max_prompt_length={limits[1]}; in the other rows a prompt may take half. "
        "A prompt loses its beginning, an answer its end and its end marker."
    ]
    return Table(f"What data.max_length would cut of the {part.name} pairs", header, rows, notes)


def _limits(limits: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Pairs of data.max_length and data.max_prompt_length to look at: powers of 2, and as they are set."""
    for limit in sorted({*LIMITS, limits[0]}):
        yield limits if limit == limits[0] else (limit, limit // 2)


def _neighbours(survey: Survey) -> Table:
    found = survey.neighbours
    assert found is not None
    rows = [
        [
            "train pairs that are copies of an earlier one",
            f"{found.pairs.same:,}",
            f"{found.pairs.total:,}",
            "",
        ]
    ]
    rows.append(["train pairs that are almost an earlier one", *_matches(found.pairs)])
    rows.append(["train prompts that are almost an earlier one", *_matches(found.prompts)])
    if found.leaks.total:
        rows.append(
            [
                "eval prompts that are train prompts too",
                f"{found.leaks.same:,}",
                f"{found.leaks.total:,}",
                "",
            ]
        )
        rows.append(["eval prompts that are almost train prompts", *_matches(found.leaks)])
    notes = [
        f"Almost: of the runs of three words that either has, {found.threshold:.0%} or more are in both, by an estimate good to a few "
        "percent. Letter case, signs and system prompts do not count. A long preamble that all prompts share makes them alike."
    ]
    return Table("Almost the same", ["", "number", "of", "such as"], rows, notes)


def _matches(found: Matches) -> list[str]:
    examples = "\n".join(
        f"{printable(match.id)} and {printable(match.other)} ({match.alike:.0%})"
        for match in found.examples[:3]
    )
    return [f"{found.count:,}", f"{found.total:,}", examples]


def _odd(odd: Sequence[Odd], unit: str) -> Table:
    rows = []
    for item in odd:
        if item.sizes:
            named = (
                f"{printable(name)} ({size:,})"
                for name, size in zip(item.ids, item.sizes, strict=True)
            )
            rows.append([f"{item.kind} ({unit})", "", ", ".join(named)])
        else:
            rows.append([item.kind, f"{item.count:,}", _names(item.ids, item.count)])
    return Table("Odd pairs", ["", "pairs", "ids"], rows)


def _names(ids: Sequence[str], count: int) -> str:
    return ", ".join(map(printable, ids)) + ", ..." * (count > len(ids))
