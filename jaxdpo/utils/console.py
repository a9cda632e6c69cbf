"""What is printed to a terminal: lines, tables, a progress bar. Text from outside cannot drive it
or disguise itself."""

import io
import os
import re
import sys
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

from jaxdpo.utils.text import clean, is_unicode

_NUMBER = re.compile(r"-?[0-9.,]+%?")
_WIDTH = 120
"""Columns of a table where output is not a terminal; rich would take 80."""


def restart_in_utf8(argv: Sequence[str]) -> None:
    """Start the process again in Python's UTF-8 mode, where a locale such as C spoils an argument.

    Without UTF-8 Python reads the bytes of `ü` in a path as two broken characters, which no file
    of a checkpoint can be named after, and the mode can be chosen only at the start.
    """
    if sys.getfilesystemencoding() == "utf-8" or all(map(is_unicode, argv)):
        return
    environment = os.environ | {"PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def escape_unprintable() -> None:
    """Have standard output escape what a terminal that is not UTF-8 cannot show, rather than
    raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def stdout() -> Console:
    """Standard output, without wrapping of lines."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def is_coloured(console: Console) -> bool:
    """Whether the console shows colours: a terminal that has them, and no NO_COLOR."""
    return console.color_system is not None and not console.no_color


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line without control characters; rich's markup in it is not interpreted."""
    console.print(Text(clean(text), style=style))


def say_parts(console: Console, parts: Sequence[tuple[str, str]]) -> None:
    """Print a line in several styles: (text, style) after each other."""
    console.print(Text.assemble(*((clean(text), style) for text, style in parts)))


def show_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """Print a table; columns of numbers are aligned right, others left."""
    table = Table(title=Text(clean(title)), title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        numeric = all(_NUMBER.fullmatch(row[index]) for row in rows if row[index])
        table.add_column(Text(clean(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    (console or stdout()).print(table)


def progress_bar(console: Console, total_steps: int, done: int) -> Progress:
    """A started bar of one task that counts steps and shows its field `summary`."""
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
