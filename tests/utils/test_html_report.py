import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxdpo.utils.files import atomic_write
from jaxdpo.utils.html_report import (
    Example,
    Examples,
    Passage,
    Picture,
    Section,
    Table,
    histogram,
    html_page,
    may_write,
)

NASTY = "<script>alert('x')</script>\"&"


class Outline(HTMLParser):
    """The elements of a page; fails where one is closed that is not open."""

    VOID = ("meta", "br", "path", "use")

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page() -> str:
    lengths = {
        name: np.random.default_rng(seed).integers(1, 900, 50)
        for seed, name in enumerate(("prompt", "chosen", "rejected"))
    }
    sections: list[Section] = [
        Table(
            "Counts",
            ["", "number", NASTY],
            [["rows", "1,234", NASTY], ["share", "5.0%", ""]],
            [NASTY],
        ),
        Picture("First", histogram(lengths, "tokens", "train"), NASTY),
        Picture("Second", histogram(lengths, "tokens", "eval"), "the same again"),
        Examples(
            "Pairs",
            NASTY,
            [
                Example(
                    NASTY, NASTY, [Passage("chosen", NASTY, [("\nbefore ", False), (NASTY, True)])]
                )
            ],
        ),
    ]
    return html_page(NASTY, NASTY, sections)


def test_a_page_is_whole_and_says_what_it_is_given() -> None:
    text = page()
    found = Outline(text)
    assert (
        found.all("html") == [{"lang": "en"}]
        and len(found.all("title")) == len(found.all("h1")) == 1
    )
    assert found.text.count(NASTY) == 12 and not found.all("script")
    assert [item.get("class") for item in found.all("th") if item["scope"] == "col"] == [
        None,
        "number",
        None,
    ]
    assert {item["scope"] for item in found.all("th")} == {"col", "row"}
    assert "\n\nbefore <mark>" in text  # the first line break after <pre> is no part of its text


def test_a_page_needs_nothing_else() -> None:
    """No address, no script, nothing that is fetched; the one policy in it forbids to."""
    found = Outline(page())
    policies = [
        item["content"]
        for item in found.all("meta")
        if item.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not re.search(r"https?:|//[a-z]|@import", page().replace(NASTY, ""))
    links = [
        value
        for _, attributes in found.found
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert links and all(link is not None and link.startswith("#") for link in links)


def test_ids_are_unique_and_what_is_referred_to_is_there() -> None:
    found = Outline(page())
    ids = [str(attributes["id"]) for _, attributes in found.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [
        attributes.get("aria-labelledby") or str(attributes.get("href", "#"))[1:]
        for _, attributes in found.found
    ]
    assert {name for name in named if name} <= set(ids)


def test_colours_follow_the_page() -> None:
    svg = histogram(
        {name: np.arange(1, 9) for name in ("prompt", "chosen", "rejected")}, "tokens", "train"
    )
    assert {"var(--prompt)", "var(--chosen)", "var(--rejected)", "currentColor"} <= set(
        re.findall(r"var\(--\w+\)|currentColor", svg)
    )
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]|#ffffff", svg)


def contrast(page: str) -> dict[str, float]:
    """WCAG contrast of text on its ground, for light and for dark pages."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    found = {}
    for number, block in enumerate(re.findall(r":root \{(.*?)\}", page, re.DOTALL)):
        colours = {
            name: luminance(value) for name, value in re.findall(r"--([\w-]+): #(\w+)", block)
        }
        pairs = [
            ("ink", "ground"),
            ("faint", "ground"),
            ("ink", "band"),
            ("ink", "chosen-ground"),
            ("ink", "rejected-ground"),
        ]
        for text, ground in [
            *pairs,
            ("chosen", "ground"),
            ("rejected", "ground"),
            ("prompt", "ground"),
        ]:
            high, low = sorted((colours[text], colours[ground]), reverse=True)
            found[f"{text} on {ground}, {('light', 'dark')[number]}"] = (high + 0.05) / (low + 0.05)
    return found


def test_text_can_be_read_in_light_and_dark() -> None:
    ratios = contrast(page())
    assert (
        len(ratios) == 16 and {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
    )


@pytest.mark.parametrize("values", [[1], [1, 1, 1], [0, 5], [7] * 9, [1, 2**22]])
def test_any_lengths_can_be_drawn(values: list[int]) -> None:
    lengths = {name: np.array(values) for name in ("prompt", "chosen", "rejected")}
    svg = histogram(lengths, "tokens", "train")
    xml.etree.ElementTree.fromstring(svg)
    assert svg == histogram(lengths, "tokens", "train")  # nothing in it is random or dated
    assert (
        all(f">{word}<" in svg for word in ("prompt", "chosen", "rejected", "tokens"))
        and "nan" not in svg
    )


def test_a_page_goes_over_a_page_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert may_write(path) and not may_write(tmp_path)
    with atomic_write(path) as file:
        file.write(html_page("t", "s", []))
    assert may_write(path) and [item.name for item in tmp_path.iterdir()] == ["page.html"]
    path.write_text("<!doctype html><p>mine")
    assert not may_write(path)
