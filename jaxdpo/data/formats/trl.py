"""Rows of {prompt, chosen, rejected}, or of answers that contain their prompt, as strings or as messages."""

import re
from collections.abc import Iterator

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import (
    PROMPTS,
    Outcome,
    Row,
    checked,
    read_prompt,
    require,
    said,
    with_system,
)
from jaxdpo.data.formats.preference import Dropped, Text, Turns, read_text, shared_length

COLUMNS = (*PROMPTS, "chosen", "rejected")


def parse_preference(row: Row, section: DataSection) -> Iterator[Outcome]:
    """TRL's preference rows: prompt, chosen, rejected as strings or message lists; without a prompt, both answers contain it.

    Raises:
        ValueError: a column is missing or has the wrong type.
    """
    require(row, "chosen", "rejected")
    yield pair(row, row["chosen"], row["rejected"], "chosen", "rejected")


def pair(row: Row, better: object, worse: object, *columns: str) -> Outcome:
    """The record of two answers to the row's prompt, which came from these columns.

    Raises:
        ValueError: an answer or a column has the wrong type.
    """
    if better is None or worse is None:
        return Dropped("an answer is null")
    chosen, rejected = (
        read_text(value, column) for value, column in zip((better, worse), columns, strict=True)
    )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"columns {' and '.join(map(repr, columns))} differ in type: both must be strings or both lists of messages"
        )
    prompt = read_prompt(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _from_strings(row, prompt, chosen, rejected)
    return _from_messages(row, prompt, tuple(chosen), tuple(rejected))  # type: ignore[arg-type]


def _from_strings(row: Row, prompt: Text | None, chosen: str, rejected: str) -> Outcome:
    if isinstance(prompt, tuple):
        return checked(row, prompt, said("assistant", chosen), said("assistant", rejected))
    if prompt is not None:
        return checked(row, prompt, chosen, rejected)
    shared = chosen[: shared_length(chosen, rejected)]
    word = re.search(
        r"\s+\S*\Z", shared
    )  # the word in which they part belongs to the answers whole, with the space before it
    if word is None or not word.start():
        return Dropped("no shared prompt")
    return checked(row, shared[: word.start()], chosen[word.start() :], rejected[word.start() :])


def _from_messages(row: Row, prompt: Text | None, chosen: Turns, rejected: Turns) -> Outcome:
    shared = shared_length(
        chosen[:-1], rejected[:-1]
    )  # the last turn of each is its answer, even if they are the same
    if prompt is None or (
        isinstance(prompt, str) and shared
    ):  # a string beside whole dialogues is a copy of some of it
        return checked(row, with_system(row, chosen[:shared]), chosen[shared:], rejected[shared:])
    turns = said("user", prompt) if isinstance(prompt, str) else prompt
    if (
        chosen[: len(turns)] == turns == rejected[: len(turns)]
    ):  # the answers repeat the prompt column
        chosen, rejected = chosen[len(turns) :], rejected[len(turns) :]
    return checked(row, turns, chosen, rejected)
