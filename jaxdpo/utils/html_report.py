"""Reports: tables, pictures and coloured text as one HTML page without script, network or other
files.

It has a dark mode, fits a phone, and reads well to a screen reader. Every text it is given is
escaped; the page is html_report.html, a Jinja template.
"""

import dataclasses
import importlib.resources
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

SIGN = "<!doctype html><!-- a page of jaxdpo -->"
"""How every page begins: a file that begins so may be overwritten."""

# Matplotlib draws in fixed colours. These stand in for the page's, which are light or dark.
INK = "#010101"
_STYLES = {"prompt": ("#020202", "-"), "chosen": ("#030303", "-"), "rejected": ("#040404", "--")}
"""Stand-in colour and stroke of each line; the strokes differ for those who do not see the
colours."""

_NUMBER = re.compile(r"-?[0-9][0-9.,]*%?")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a header. The first cell of each row is its name."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    """Sentences below the table."""

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds only numbers."""
        columns = range(len(self.header))
        return [
            all(_NUMBER.fullmatch(row[column]) for row in self.rows if row[column])
            for column in columns
        ]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing, and what it shows in words."""

    title: str
    svg: str
    description: str


@dataclasses.dataclass(frozen=True)
class Passage:
    """A named text, parts of which are marked."""

    name: str
    note: str
    spans: Sequence[tuple[str, bool]]
    """Text, and whether it is marked."""


@dataclasses.dataclass(frozen=True)
class Example:
    """Texts that belong together, such as a pair."""

    title: str
    note: str
    passages: Sequence[Passage]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples under a heading."""

    title: str
    note: str
    items: Sequence[Example]


Section = Table | Picture | Examples


def _template() -> str:
    return (importlib.resources.files("jaxdpo.utils") / "html_report.html").read_text("utf-8")


_PAGE = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string(_template())


def html_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as text."""
    kinds = {Table: "table", Picture: "picture", Examples: "examples"}
    parts = [(kinds[type(section)], section) for section in sections]
    return SIGN + "\n" + _PAGE.render(title=title, subtitle=subtitle, sections=parts)


def may_write(path: Path) -> bool:
    """Whether there is no such file, or it is a page that jaxdpo wrote."""
    if not path.exists():
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(SIGN)) == SIGN.encode()
    except OSError:
        return False


def histogram(lengths: Mapping[str, np.ndarray], unit: str, name: str) -> str:
    """An SVG of how long texts are: prompts above, both answers below; lengths on a logarithmic
    axis.

    Args:
        lengths: int [N] for each of prompt, chosen and rejected.
        unit: what is counted.
        name: a word that no other picture on the page has.
    """
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "jaxdpo", "font.size": 12}
    for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        style[key] = INK
    edges = _bin_edges(lengths)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained", facecolor="none")
        above, below = figure.subplots(2, sharex=True)
        for part, values in lengths.items():
            shares = np.histogram(np.maximum(values, 1), edges)[0] / len(values)
            _line(above if part == "prompt" else below, part, edges, shares)
        for axes in (above, below):
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            axes.set_ylim(0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_facecolor("none")
            axes.legend(
                frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0
            )
        below.set_xscale("log", base=2)
        below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        below.set_xlabel(unit)
        figure.supylabel("share of pairs", fontsize="medium", color=INK)
        return _inline(figure, name)


def _bin_edges(lengths: Mapping[str, np.ndarray]) -> np.ndarray:
    """Edges between whole numbers, two bins each time lengths double."""
    low = min(int(values.min()) for values in lengths.values())
    high = max(int(values.max()) for values in lengths.values())
    halves = np.arange(np.floor(2 * np.log2(max(low, 1))), np.ceil(2 * np.log2(high + 1)) + 1)
    # 1e-9: a power of two that came out a little too large must not be rounded up.
    return np.unique(np.ceil(2 ** (halves / 2) - 1e-9)) - 0.5


def _line(axes: Axes, part: str, edges: np.ndarray, shares: np.ndarray) -> None:
    colour, stroke = _STYLES[part]
    middles = np.sqrt(edges[1:] * edges[:-1])
    axes.plot(middles, shares, color=colour, linestyle=stroke, linewidth=2, label=part)
    axes.fill_between(middles, shares, color=colour, alpha=0.15, linewidth=0)


def _inline(figure: Figure, name: str) -> str:
    """The figure as an <svg> element in the page's own colours, without metadata, namespaces and
    size."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)
    svg = svg.replace("xlink:href=", "href=")
    # Ids are global in a page: those of two pictures must differ.
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for part, (colour, _) in _STYLES.items():
        svg = svg.replace(colour, f"var(--{part})")
    return svg.replace(INK, "currentColor")
