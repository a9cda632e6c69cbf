"""What goes to a terminal: tables, colours, a progress bar. Text from outside cannot drive it or disguise itself."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from jaxdpo.utils.text import clean

_NUMBER = re.compile(r"-?[0-9.,]+%?")


def stdout() -> Console:
    """Standard output; text is not wrapped, and 120 columns are assumed where it is no terminal."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    return console


def is_coloured(console: Console) -> bool:
    """Whether colours can be seen: a terminal that has them, and no NO_COLOR."""
    return console.color_system is not None and not console.no_color


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line, as it is but for control characters."""
    console.print(Text(clean(text), style=style))


def say_parts(console: Console, parts: Sequence[tuple[str, str]]) -> None:
    """Print text in several styles: (text, style) after each other."""
    console.print(Text.assemble(*((clean(text), style) for text, style in parts)))


def show_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """Show a table on the console; columns of numbers are aligned right, others left."""
    table = Table(title=Text(clean(title)), title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        numeric = all(_NUMBER.fullmatch(row[index]) for row in rows if row[index])
        table.add_column(Text(clean(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    (console or stdout()).print(table)


def progress_bar(console: Console, total_steps: int, done: int) -> Progress:
    """A bar of one task that counts steps and tells its field `summary`; it is running."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[summary]}", markup=False),
    )
    progress = Progress(*columns, console=console)
    progress.add_task("train", total=total_steps, completed=done, summary="")
    progress.start()
    return progress
