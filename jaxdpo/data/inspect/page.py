"""A survey and its examples, printed in a terminal or as an HTML page."""

from collections.abc import Sequence

import numpy as np

from jaxdpo.data.inspect.examples import show
from jaxdpo.data.inspect.options import DataConfig
from jaxdpo.data.inspect.survey import Survey
from jaxdpo.data.inspect.tables import LENGTHS_TITLE, bars, tables
from jaxdpo.data.pair_table import LENGTHS
from jaxdpo.utils.console import Console, say, show_table
from jaxdpo.utils.html_report import Example, Examples, Picture, Section, histogram, html_page
from jaxdpo.utils.text import printable


def print_report(survey: Survey, examples: Sequence[Example], console: Console) -> None:
    """Print examples, tables and a histogram of lengths."""
    for example in examples:
        show(example, console)
        say(console, "")
    for table in tables(survey):
        show_table(table.title, table.header, table.rows, console)
        for note in table.notes:
            say(console, note)
        say(console, "")
        if table.title.startswith(LENGTHS_TITLE):
            blocks = _can_print(console, "█▏")
            drawn = bars(survey.parts[0], survey.unit, console.width, blocks)
            show_table(drawn.title, drawn.header, drawn.rows, console)
            say(console, "")


def report_page(config: DataConfig, survey: Survey, examples: Sequence[Example]) -> str:
    """The same as an HTML page."""
    sections: list[Section] = []
    for table in tables(survey):
        sections.append(table)
        if table.title.startswith(LENGTHS_TITLE):
            sections += _histograms(survey)
    if examples:
        note = (
            "Underlined on a coloured ground: loss tokens, from which the model learns. "
            "The rest is context."
        )
        sections.append(Examples("Some of the pairs", note, examples))
    names = ", ".join(map(printable, (*config.data.train, *config.data.eval)))
    if config.model.path is None:
        unit = "characters; no tokenizer was given"
    else:
        unit = f"tokens of {printable(config.model.path)}"
    subtitle = f"What {names} would teach a model. Lengths are in {unit}."
    return html_page("Preference data", subtitle, sections)


def _histograms(survey: Survey) -> list[Picture]:
    pictures = []
    for part in survey.parts:
        lengths: dict[str, np.ndarray] = dict(zip(LENGTHS, part.lengths.T, strict=True))
        drawing = histogram(lengths, survey.unit, part.name)
        caption = (
            f"Shares of the {len(part.lengths):,} pairs by {survey.unit}, on a scale that doubles."
        )
        pictures.append(Picture(f"How long the {part.name} texts are", drawing, caption))
    return pictures


def _can_print(console: Console, text: str) -> bool:
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return False
    return True
