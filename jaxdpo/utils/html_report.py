"""Reports: tables, pictures and coloured text as one HTML page that needs nothing else: no network, no script, no other file.

It reads well in the dark, on a phone and to a screen reader. Whatever text it is given is escaped.
"""

import dataclasses
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
"""How every page begins: a file that begins so may be written over."""

INK = "#010101"
_STYLES = {"prompt": ("#020202", "-"), "chosen": ("#030303", "-"), "rejected": ("#040404", "--")}
"""Colours that stand for those of the page, light or dark, and strokes that tell lines apart without colour."""
_NUMBER = re.compile(r"-?[0-9][0-9.,]*%?")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a header. The first cell of each row is its name."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    """Sentences below it."""

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds nothing but numbers."""
        return [
            all(_NUMBER.fullmatch(row[index]) for row in self.rows if row[index])
            for index in range(len(self.header))
        ]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing with what it shows in words."""

    title: str
    svg: str
    description: str


@dataclasses.dataclass(frozen=True)
class Passage:
    """A named text, some of which is marked."""

    name: str
    note: str
    spans: Sequence[tuple[str, bool]]
    """Text, and whether it is marked."""


@dataclasses.dataclass(frozen=True)
class Example:
    """Texts that belong together."""

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


def html_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as text."""
    kinds = {Table: "table", Picture: "picture", Examples: "examples"}
    parts = [(kinds[type(section)], section) for section in sections]
    return SIGN + _PAGE.render(title=title, subtitle=subtitle, sections=parts)


def may_write(path: Path) -> bool:
    """Whether there is no such file, or it is a page that was written before."""
    if not path.exists():
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(SIGN)) == SIGN.encode()
    except OSError:
        return False


def histogram(lengths: Mapping[str, np.ndarray], unit: str, name: str) -> str:
    """An SVG of how long texts are: prompts above, both answers below; lengths on a scale that doubles.

    Args:
        lengths: int [N] for each of prompt, chosen and rejected.
        unit: what is counted.
        name: a word that no other picture on the page has.
    """
    low, high = (fold(int(fold(values)) for values in lengths.values()) for fold in (min, max))
    halves = np.arange(np.floor(2 * np.log2(max(low, 1))), np.ceil(2 * np.log2(high + 1)) + 1)
    edges = (
        np.unique(np.ceil(2 ** (halves / 2) - 1e-9)) - 0.5
    )  # whole numbers lie between them: two bins each time lengths double
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "jaxdpo", "font.size": 12}
    style |= {
        key: INK
        for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    }
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


def _line(axes: Axes, part: str, edges: np.ndarray, shares: np.ndarray) -> None:
    colour, stroke = _STYLES[part]
    middles = np.sqrt(edges[1:] * edges[:-1])
    axes.plot(middles, shares, color=colour, linestyle=stroke, linewidth=2, label=part)
    axes.fill_between(middles, shares, color=colour, alpha=0.15, linewidth=0)


def _inline(figure: Figure, name: str) -> str:
    """The figure as an <svg> element in the page's own colours, without what a page has no use for."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for part, (colour, _) in _STYLES.items():
        svg = svg.replace(colour, f"var(--{part})")
    return svg.replace(INK, "currentColor")


_PAGE = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string("""
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root {
  --ground: #fff; --ink: #1c2128; --faint: #57606a; --line: #d0d7de; --band: #f6f8fa;
  --prompt: #57606a; --chosen: #116329; --rejected: #a0111f; --chosen-ground: #dcf5e3; --rejected-ground: #fde4e1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181d; --ink: #e3e8ee; --faint: #a3adb8; --line: #3a424c; --band: #1d2229;
    --prompt: #a3adb8; --chosen: #7ee2a0; --rejected: #ffa8a0; --chosen-ground: #123d22; --rejected-ground: #511b1b;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2, h3 { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .4rem 0; max-width: 46rem; }
.faint { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { color: var(--faint); font-weight: 500; }
tbody th { font-weight: 500; min-width: 10rem; }
td { min-width: 15rem; white-space: pre-line; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; min-width: 3.5rem; }
thead .number { white-space: normal; }
figure { margin: 0; }
svg { display: block; width: 100%; max-width: 42rem; height: auto; }
svg text { font-family: inherit !important; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem 1rem; margin: 1rem 0; }
article h4 { font-size: .85rem; font-weight: 600; margin: .8rem 0 .2rem; }
article h4 span { font-weight: 400; color: var(--faint); }
pre { margin: 0; padding: .6rem .8rem; background: var(--band); border-radius: .3rem; white-space: pre-wrap;
  font: .85rem/1.5 ui-monospace, monospace; max-height: 22rem; overflow-y: auto; }
mark { color: inherit; background: none; text-decoration: underline; text-decoration-thickness: 1px; text-underline-offset: .3em; }
.chosen h4 { color: var(--chosen); }
.rejected h4 { color: var(--rejected); }
.chosen mark { background: var(--chosen-ground); text-decoration-color: var(--chosen); }
.rejected mark { background: var(--rejected-ground); text-decoration-color: var(--rejected); text-decoration-style: dashed; }
:focus-visible { outline: 2px solid var(--chosen); }
@media print { pre { max-height: none; } article { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="faint">{{ subtitle }}</p>
</header>
<main>
{% for kind, section in sections %}
<section aria-labelledby="section-{{ loop.index }}">
<h2 id="section-{{ loop.index }}">{{ section.title }}</h2>
{% if kind == "table" %}
<div class="scroll" role="region" aria-labelledby="section-{{ loop.index }}" tabindex="0">
<table>
<thead><tr>
{%- for name in section.header %}<th scope="col"{% if section.numeric[loop.index0] %} class="number"{% endif %}>{{ name }}</th>{% endfor -%}
</tr></thead>
<tbody>
{% for row in section.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td{% if section.numeric[loop.index] %} class="number"{% endif %}>{{ cell }}</td>{% endfor -%}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% for note in section.notes %}
<p class="faint">{{ note }}</p>
{% endfor %}
{% elif kind == "picture" %}
<figure>
<div role="img" aria-labelledby="caption-{{ loop.index }}">{{ section.svg|safe }}</div>
<figcaption id="caption-{{ loop.index }}" class="faint">{{ section.description }}</figcaption>
</figure>
{% else %}
<p class="faint">{{ section.note }}</p>
{% for example in section.items %}
<article>
<h3>{{ example.title }}</h3>
<p class="faint">{{ example.note }}</p>
{% for passage in example.passages %}
<div class="{{ passage.name }}">
<h4>{{ passage.name }} <span>{{ passage.note }}</span></h4>
<pre tabindex="0">
{% for text, marked in passage.spans %}{% if marked %}<mark>{{ text }}</mark>{% else %}{{ text }}{% endif %}{% endfor %}</pre>
</div>
{% endfor %}
</article>
{% endfor %}
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
""")
