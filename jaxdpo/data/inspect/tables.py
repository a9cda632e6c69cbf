"""A survey of preference data as tables, the same for a terminal and for a page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdpo.data.inspect.near_duplicates import Matches, NearDuplicates
from jaxdpo.data.inspect.survey import Odd, Part, Survey, cuts
from jaxdpo.data.pair_table import LENGTHS
from jaxdpo.data.report import describe_ignored
from jaxdpo.utils.html_report import Table
from jaxdpo.utils.text import printable

MAX_LENGTHS = tuple(2**power for power in range(8, 21))
"""data.max_length of the rows of the truncation table: 256 to a million tokens."""
LENGTHS_TITLE = "Lengths in"
"""How the title of the table of lengths begins, below which a histogram of them is shown."""
BAR_WIDTH = 16
"""Characters of the longest bar of a histogram, where there is room."""
MIN_BAR_WIDTH = 4
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


def tables(survey: Survey) -> list[Table]:
    """Rows, pairs, lengths, truncation, near-duplicates and odd pairs, in this order."""
    found = [_rows(item) for item in survey.sets]
    if survey.parts:
        found += [_pairs(survey), _lengths(survey.parts, survey.unit)]
    if survey.parts and survey.limits is not None:
        found.append(_truncation(survey.parts[0], survey.limits))
    if survey.near_duplicates is not None:
        found.append(_near_duplicates(survey.near_duplicates))
    return [*found, _odd(survey.odd, survey.unit)]


# --- histograms ---


def bars(part: Part, unit: str, columns: int, blocks: bool = True) -> Table:
    """The lengths of a part as a histogram for a terminal, on a scale that doubles.

    Args:
        part: the training or validation pairs.
        unit: tokens or characters.
        columns: width of the terminal, characters.
        blocks: whether it can draw Unicode's eighths of a block.
    """
    edges = 2 ** np.arange(int(part.lengths.max()).bit_length() + 1)
    bins = np.concatenate([[0], edges])
    counts = np.stack([np.histogram(column, bins)[0] for column in part.lengths.T])
    first = int(np.flatnonzero(counts.any(axis=0))[0])
    names = []
    for place in range(first, counts.shape[1]):
        low, high = bins[place], bins[place + 1] - 1
        names.append(f"{low:,}" if low == high else f"{low:,}-{high:,}")
    digits = len(f"{counts.max():,}")
    # The width of a row without its bars: the names, three counts, and 13 for borders and padding.
    frame = max(map(len, (unit, *names))) + 3 * (digits + 1) + 13
    width = max(MIN_BAR_WIDTH, min(BAR_WIDTH, (columns - frame) // 3))
    rows = []
    for name, numbers in zip(names, counts[:, first:].T, strict=True):
        cells = [f"{_bar(n / counts.max(), width, blocks)} {n:{digits},}" for n in numbers]
        rows.append([name, *cells])
    return Table(f"How long the {part.name} texts are", [unit, *LENGTHS], rows)


def _bar(share: float, width: int, blocks: bool) -> str:
    """A bar, padded to `width` characters; any share above 0 is visible."""
    eighths = int(np.ceil(share * width * 8))
    if blocks:
        drawn = "█" * (eighths // 8) + _EIGHTHS[eighths % 8]
    else:
        drawn = "#" * ((eighths + 7) // 8)
    return f"{drawn:{width}}"


# --- tables ---


def _rows(item: Mapping[str, Any]) -> Table:
    """What became of the rows of a set."""
    rows = [["rows read", f"{item['rows_read']:,}", ""], ["pairs kept", f"{item['kept']:,}", ""]]
    for verb, reasons in (("dropped", item["dropped"]), ("filtered", item["filtered"])):
        for reason, found in reasons.items():
            count = found["count"]
            names = _names(found["examples"], count)
            rows.append([f"{verb}: {printable(reason)}", f"{count:,}", names])
    notes = []
    if item["left_out"]:
        each = ", ".join(f"{what} ({n:,})" for what, n in item["left_out"].items())
        notes.append(f"Left out by the chat template: {printable(each)}.")
    if item["ignored_columns"]:
        unused = describe_ignored(item["ignored_columns"])
        notes.append(f"Columns that are not used: {unused}.")
    title = f"Rows of {printable(item['name'])} (format {item['format']})"
    return Table(title, ["", "number", "first ids"], rows, notes)


def _pairs(survey: Survey) -> Table:
    parts = survey.parts
    rows = [
        ["pairs", *(f"{len(part.lengths):,}" for part in parts)],
        ["prompts", *(f"{part.prompts:,}" for part in parts)],
        ["the chosen answer is the longer one", *(f"{_longer(part):.1%}" for part in parts)],
        ["both answers are of equal length", *(f"{_equal(part):.1%}" for part in parts)],
    ]
    if all(part.ended is not None for part in parts):
        rows.append(["answers that end with eos", *(f"{part.ended:.1%}" for part in parts)])
    first = parts[0]
    notes = [
        f"A judge that always prefers the longer answer is right in {_longer(first):.1%} "
        f"of the {first.name} pairs: compare with that."
    ]
    notes += [f"Warning: {printable(text)}." for text in survey.warnings]
    return Table("Pairs", ["", *(part.name for part in parts)], rows, notes)


def _longer(part: Part) -> float:
    return float((part.lengths[:, 1] > part.lengths[:, 2]).mean())


def _equal(part: Part) -> float:
    return float((part.lengths[:, 1] == part.lengths[:, 2]).mean())


def _lengths(parts: Sequence[Part], unit: str) -> Table:
    rows = []
    for part in parts:
        columns: dict[str, np.ndarray] = {}
        for name, column in zip(LENGTHS, part.lengths.T, strict=True):
            columns[name] = column
        columns["prompt + longer answer"] = part.lengths[:, 0] + part.lengths[:, 1:].max(axis=1)
        for name, column in columns.items():
            quantiles = np.percentile(column, (50, 95, 100), method="higher")
            rows.append([f"{part.name}, {name}", *(f"{int(value):,}" for value in quantiles)])
    return Table(f"{LENGTHS_TITLE} {unit}", ["", "median", "95% are below", "longest"], rows)


def _truncation(part: Part, limits: tuple[int, int]) -> Table:
    total = part.lengths.sum()
    rows = []
    for limit, prompt_limit in _limits(limits):
        prompts, answers, left = cuts(part.lengths, limit, prompt_limit)
        truncated = prompts | answers
        name = f"{limit:,} (now)" if limit == limits[0] else f"{limit:,}"
        counts = [f"{int(mask.sum()):,}" for mask in (prompts, answers)]
        rows.append([name, *counts, f"{truncated.mean():.1%}", f"{left / total:.1%}"])
        if limit >= limits[0] and not truncated.any():
            break
    header = [
        "data.max_length",
        "prompts truncated",
        "pairs with an answer truncated",
        "pairs truncated",
        "tokens left",
    ]
    note = (
        f"Now: data.max_length={limits[0]}, data.max_prompt_length={limits[1]}. A prompt loses its "
        "beginning, an answer its end and its eos. With data.max_prompt_length=0, as in the other "
        "rows, a prompt keeps what the longer answer leaves, at least half."
    )
    title = f"What data.max_length would truncate of the {part.name} pairs"
    return Table(title, header, rows, [note])


def _limits(limits: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """data.max_length and data.max_prompt_length of each row: powers of 2, and the options'."""
    for limit in sorted({*MAX_LENGTHS, limits[0]}):
        yield limits if limit == limits[0] else (limit, 0)


def _near_duplicates(found: NearDuplicates) -> Table:
    pairs, leaks = found.pairs, found.leaks
    rows = [
        ["train pairs that copy an earlier one", f"{pairs.same:,}", f"{pairs.total:,}", ""],
        ["train pairs that nearly duplicate an earlier one", *_matches(pairs)],
        ["train prompts that nearly duplicate an earlier one", *_matches(found.prompts)],
    ]
    if leaks.total:
        rows += [
            ["eval prompts that are train prompts too", f"{leaks.same:,}", f"{leaks.total:,}", ""],
            ["eval prompts that nearly duplicate train prompts", *_matches(leaks)],
        ]
    note = (
        f"Near-duplicates: of the runs of three words in either text, {found.threshold:.0%} or "
        "more are in both, by a MinHash estimate good to a few percent. Letter case, punctuation "
        "and system prompts do not count. A long preamble shared by all prompts makes them alike."
    )
    return Table("Near-duplicates", ["", "number", "of", "such as"], rows, [note])


def _matches(found: Matches) -> list[str]:
    examples = []
    for match in found.examples[:3]:
        names = f"{printable(match.id)} and {printable(match.other)}"
        examples.append(f"{names} ({match.similarity:.0%})")
    return [f"{found.count:,}", f"{found.total:,}", "\n".join(examples)]


def _odd(odd: Sequence[Odd], unit: str) -> Table:
    rows = []
    for item in odd:
        if not item.sizes:
            rows.append([item.kind, f"{item.count:,}", _names(item.ids, item.count)])
            continue
        named = []
        for name, size in zip(item.ids, item.sizes, strict=True):
            named.append(f"{printable(name)} ({size:,})")
        rows.append([f"{item.kind} ({unit})", "", ", ".join(named)])
    return Table("Odd pairs", ["", "pairs", "ids"], rows)


def _names(ids: Sequence[str], count: int) -> str:
    """Ids with a comma between them; with dots if there are more than these."""
    more = ["..."] if count > len(ids) else []
    return ", ".join([*map(printable, ids), *more])
