"""TRL's preference rows: a prompt and two answers, as strings or as messages.

    {"prompt": "Why is the sky blue?", "chosen": "Because ...", "rejected": "It is not."}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}

Without a prompt (TRL's implicit prompt), both answers begin with it. Dropped, beyond what
make_preference drops: a null answer, and an implicit prompt of no complete word. Nothing is
filtered.
"""

import re
from collections.abc import Iterator

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import (
    PROMPTS,
    Outcome,
    Row,
    make_preference,
    one_turn,
    read_prompt,
    require,
    with_system,
)
from jaxdpo.data.formats.preference import Dropped, Text, Turns, read_text, shared_length

COLUMNS = (*PROMPTS, "chosen", "rejected")
LAST_WORD = re.compile(r"\s+\S*\Z")
"""The last, perhaps incomplete, word of a text, with the white space before it."""


def parse_preference(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Parse a row of {prompt, chosen, rejected} or {chosen, rejected}.

    Raises:
        ValueError: a column is missing or has the wrong type.
    """
    require(row, "chosen", "rejected")
    yield pair(row, row["chosen"], row["rejected"], "chosen", "rejected")


def pair(row: Row, chosen: object, rejected: object, *columns: str) -> Outcome:
    """The record of two answers to the row's prompt.

    Args:
        columns: the two columns that the answers are from, for messages.

    Raises:
        ValueError: an answer or a column has the wrong type.
    """
    if chosen is None or rejected is None:
        return Dropped("an answer is null")
    better, worse = read_text(chosen, columns[0]), read_text(rejected, columns[1])
    if isinstance(better, str) and isinstance(worse, str):
        return _from_strings(row, read_prompt(row), better, worse)
    if isinstance(better, str) or isinstance(worse, str):
        raise ValueError(
            f"columns {' and '.join(map(repr, columns))} differ in type: "
            "both must be strings or both lists of messages"
        )
    return _from_messages(row, read_prompt(row), better, worse)


def _from_strings(row: Row, prompt: Text | None, chosen: str, rejected: str) -> Outcome:
    if isinstance(prompt, tuple):
        answers = one_turn("assistant", chosen), one_turn("assistant", rejected)
        return make_preference(row, prompt, *answers)
    if prompt is not None:
        return make_preference(row, prompt, chosen, rejected)
    shared = chosen[: shared_length(chosen, rejected)]
    # The word in which the answers part belongs to them completely, with the space before it.
    word = LAST_WORD.search(shared)
    if word is None or word.start() == 0:
        return Dropped("no shared prompt")
    cut = word.start()
    return make_preference(row, shared[:cut], chosen[cut:], rejected[cut:])


def _from_messages(row: Row, prompt: Text | None, chosen: Turns, rejected: Turns) -> Outcome:
    # The last turn of each is its answer, even if both are the same.
    shared = shared_length(chosen[:-1], rejected[:-1])
    # A string named prompt beside complete dialogues repeats some of them (UltraFeedback does so).
    if prompt is None or (isinstance(prompt, str) and shared):
        prompt = with_system(row, chosen[:shared])
        return make_preference(row, prompt, chosen[shared:], rejected[shared:])
    turns = one_turn("user", prompt) if isinstance(prompt, str) else prompt
    size = len(turns)
    if chosen[:size] == turns == rejected[:size]:  # the answers repeat the prompt column
        chosen, rejected = chosen[size:], rejected[size:]
    return make_preference(row, turns, chosen, rejected)
