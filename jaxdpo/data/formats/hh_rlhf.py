"""Anthropic/hh-rlhf: {chosen, rejected}, each a whole dialogue in one string."""

import re
from collections.abc import Iterator

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import Outcome, Row, checked, require, said, string, with_system
from jaxdpo.data.formats.preference import Dropped, Message, shared_length

TURN = re.compile(r"\n\n(Human|Assistant):")
ANSWER = "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}
COLUMNS = ("chosen", "rejected")


def parse_hh(row: Row, section: DataSection) -> Iterator[Outcome]:
    """The prompt ends with the last Assistant marker inside what both dialogues share.

    Cutting at the end of the shared text itself would move the words with which both answers begin into the prompt.

    Raises:
        ValueError: a column is missing or not a string.
    """
    require(row, *COLUMNS)
    yield _pair(row, *(string(row, column) for column in COLUMNS))


def is_hh(row: Row) -> bool:
    """Whether a row looks like hh-rlhf: no prompt, and both dialogues open with a Human turn."""
    texts = [row.get(column) for column in COLUMNS]
    return row.get("prompt") is None and all(
        isinstance(text, str) and text.startswith("\n\nHuman:") for text in texts
    )


def _pair(row: Row, chosen: str, rejected: str) -> Outcome:
    cut = chosen.rfind(ANSWER, 0, shared_length(chosen, rejected))
    if cut < 0:
        return Dropped("no shared prompt")
    answers = [text[cut + len(ANSWER) :] for text in (chosen, rejected)]
    if any(TURN.search(answer) for answer in answers):
        return Dropped("turn marker inside an answer")
    before, *parts = TURN.split(chosen[:cut])
    roles = [ROLES[name] for name in parts[0::2]]
    if (
        before
        or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]
        or len(roles) % 2 == 0
    ):
        return Dropped("roles do not alternate")
    prompt = tuple(
        Message(role, text.removeprefix(" ")) for role, text in zip(roles, parts[1::2], strict=True)
    )
    return checked(
        row,
        with_system(row, prompt),
        *(said("assistant", answer.removeprefix(" ")) for answer in answers),
    )
