r"""Anthropic/hh-rlhf: two complete dialogues, each in one string.

    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}

The prompt is what both dialogues share, up to the last Assistant marker in it. Dropped, beyond
what make_preference drops: dialogues without a shared prompt, answers that go on with another
turn, and prompts whose turns do not alternate between Human and Assistant. Nothing is filtered.
"""

import re
from collections.abc import Iterator

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import (
    Outcome,
    Row,
    make_preference,
    one_turn,
    require,
    string,
    unread,
    with_system,
)
from jaxdpo.data.formats.preference import Dropped, Message, Turns, shared_length

TURN = re.compile(r"\n\n(Human|Assistant):")
ANSWER = "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}
COLUMNS = ("chosen", "rejected")


def parse_hh(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Parse a row of hh-rlhf.

    Raises:
        ValueError: a column is missing or not a string.
    """
    require(row, *COLUMNS)
    yield _pair(row, string(row, "chosen"), string(row, "rejected"))


def unread_hh(row: Row, section: DataSection) -> Iterator[str]:
    """Columns of a row that are not read."""
    return unread(row, COLUMNS)


def is_hh(row: Row) -> bool:
    """Whether a row looks like hh-rlhf: no prompt, and both dialogues begin with a Human turn."""
    if row.get("prompt") is not None:
        return False
    texts = [row.get(column) for column in COLUMNS]
    return all(isinstance(text, str) and text.startswith("\n\nHuman:") for text in texts)


def _pair(row: Row, chosen: str, rejected: str) -> Outcome:
    # Not cut at the end of the shared text itself: that would move the words with which both
    # answers begin into the prompt.
    cut = chosen.rfind(ANSWER, 0, shared_length(chosen, rejected))
    if cut < 0:
        return Dropped("no shared prompt")
    answers = [text[cut + len(ANSWER) :] for text in (chosen, rejected)]
    if any(TURN.search(answer) for answer in answers):
        return Dropped("turn marker inside an answer")
    prompt = _read_turns(chosen[:cut])
    if prompt is None:
        return Dropped("roles do not alternate")
    # Only the space that the markers are followed by: other white space is part of the text.
    best, worst = (one_turn("assistant", answer.removeprefix(" ")) for answer in answers)
    return make_preference(row, with_system(row, prompt), best, worst)


def _read_turns(dialogue: str) -> Turns | None:
    """The turns of a prompt, user and assistant alternating, the user first and last; else None."""
    before, *parts = TURN.split(dialogue)  # text before the first marker, then marker, text, ...
    if before or len(parts) // 2 % 2 == 0:
        return None
    turns = []
    for marker, text in zip(parts[0::2], parts[1::2], strict=True):
        expected = "assistant" if len(turns) % 2 else "user"
        if ROLES[marker] != expected:
            return None
        turns.append(Message(expected, text.removeprefix(" ")))
    return tuple(turns)
