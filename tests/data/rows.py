"""Rows as the sets have them, and parsers run on one row."""

from collections.abc import Callable
from typing import Any

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import Parser
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.report import DataReport
from jaxdpo.data.sources import read_set

Write = Callable[..., str]
Q, A, B = (Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def hh(
    *answers: str, prompt: str = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?"
) -> dict[str, str]:
    return {
        name: f"{prompt}\n\nAssistant:{answer}"
        for name, answer in zip(("chosen", "rejected"), answers, strict=True)
    }


def outcomes(parse: Parser, row: dict[str, Any], **options: Any) -> list[Preference | Dropped]:
    return list(parse(row, DataSection(**options)))


def one(parse: Parser, row: dict[str, Any], **options: Any) -> Preference | Dropped:
    (found,) = outcomes(parse, row, **options)
    return found


def pairs(found: list[Preference | Dropped]) -> list[tuple[str, str]]:
    """The texts of the answers of every pair."""
    return [
        tuple(a if isinstance(a, str) else a[0].content for a in (p.chosen, p.rejected))
        for p in found
        if isinstance(p, Preference)
    ]  # type: ignore[misc]


def collect(
    text: str, option: str = "data.train", **options: Any
) -> tuple[DataReport, list[Preference]]:
    report, records = read_set(text, DataSection(**options), option)
    return report, list(records)
