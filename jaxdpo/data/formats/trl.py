"""TRL's preference rows: a prompt and two answers, as strings or as messages.

    {"prompt": "Why is the sky blue?", "chosen": "Because ...", "rejected": "It is not."}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}

The answers' columns have other names in the rows of other trainers and services (ANSWERS). Without
a prompt (TRL's implicit prompt), both answers begin with it; two strings only if the row has no
other text. Dropped, beyond what make_preference drops: a null answer, a column for the prompt that
is empty or holds what the dialogues do not, and an implicit prompt of no complete word. Nothing is
filtered.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import (
    EMPTY_PROMPT,
    PROMPTS,
    Outcome,
    Row,
    make_preference,
    one_turn,
    shown_columns,
    unread,
    with_system,
)
from jaxdpo.data.formats.labels import refuse_labels
from jaxdpo.data.formats.listed_text import read_list
from jaxdpo.data.formats.other_forms import remedy
from jaxdpo.data.formats.preference import Dropped, Text, Turns, read_text, shared_length
from jaxdpo.data.formats.prompt import (
    contains,
    prompt_columns,
    read_prompt,
    refuse_other_texts,
    unfold,
    unfolded,
)
from jaxdpo.utils.text import has_content

ANSWERS = (
    ("chosen", "rejected"),  # TRL, axolotl, LLaMA-Factory
    ("preferred_output", "non_preferred_output"),  # OpenAI, Fireworks
    ("chosen_response", "rejected_response"),  # argilla, NeMo
    ("chosen_messages", "rejected_messages"),  # LLaMA-Factory v1
    ("response", "rejected_response"),  # ms-swift, with query
    ("messages", "rejected_messages"),  # ms-swift: two complete dialogues
    ("messages", "rejected_response"),  # ms-swift: the last turn is the chosen answer
)
"""Columns of the chosen and the rejected answer; the first that a row has are read."""
LAST_WORD = re.compile(r"\s+\S*\Z")
"""The last, perhaps incomplete, word of a text, with the white space before it."""


class Answers(NamedTuple):
    """The two answers of a row."""

    chosen: Any
    rejected: Any
    columns: tuple[str, str]
    row: Row
    """The row whose other columns hold the prompt."""


def parse_preference(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Parse a row of {prompt, chosen, rejected} or {chosen, rejected}.

    Raises:
        ValueError: a column is missing or has the wrong type; names the form of the row if it is
            known.
    """
    row = unfold(row)
    columns = answer_columns(row)
    if columns is None:
        missing = [repr(name) for name in ANSWERS[0] if name not in row]
        raise ValueError(
            f"column {' and '.join(missing)} is missing; columns found: {shown_columns(row)}. "
            f"{remedy(row)}"
        )
    answers = _answers(row, columns)
    refuse_labels(answers.row, answers.chosen, answers.rejected)
    yield pair(answers.row, answers.chosen, answers.rejected, *columns)


def unread_preference(row: Row, section: DataSection) -> Iterator[str]:
    """Columns of a row that are not read."""
    row, more = unfold(row), unfolded(row)
    columns = answer_columns(row)
    if columns is not None:
        prompt = prompt_columns(_answers(row, columns).row)
        yield from unread(row, (*columns, *prompt))
        yield from more


def answer_columns(row: Row) -> tuple[str, str] | None:
    """The columns of the chosen and the rejected answer, if the row has both."""
    return next((names for names in ANSWERS if row.keys() >= set(names)), None)


def has_answers(row: Row) -> bool:
    """Whether a row says itself which of two answers is chosen."""
    if row.get("chosen") is not None:
        return True
    columns = answer_columns(row)
    return columns is not None and has_content(row[columns[0]])


def _answers(row: Row, columns: tuple[str, str]) -> Answers:
    """The answers in two columns, and the row without those that belong to them."""
    chosen, rejected = row[columns[0]], row[columns[1]]
    if columns[0] != "messages":
        return Answers(chosen, rejected, columns, row)
    before = {name: value for name, value in row.items() if name != "messages"}
    if columns[1] == "rejected_response":
        turns = read_list(chosen)
        if not turns:
            raise ValueError(
                "column 'messages' must be a list of messages that ends in the chosen answer"
            )
        before["messages"], chosen = turns[:-1], turns[-1]
        if isinstance(rejected, str):
            rejected = {"role": "assistant", "content": rejected}
    return Answers(chosen, rejected, columns, before)


def pair(row: Row, chosen: object, rejected: object, *columns: str) -> Outcome:
    """The record of two answers to the row's prompt.

    Args:
        columns: the two columns that the answers are from, for messages.

    Raises:
        ValueError: an answer or a column has the wrong type, or it is not certain which column is
            the prompt.
    """
    if chosen is None or rejected is None:
        return Dropped("an answer is null")
    row = unfold(row)
    _refuse_lists_of_turns(row, chosen, rejected)
    better, worse = read_text(chosen, columns[0]), read_text(rejected, columns[1])
    prompt = read_prompt(row, chosen, rejected)
    if isinstance(better, str) and isinstance(worse, str):
        return _from_strings(row, prompt, better, worse, columns)
    if isinstance(better, str) or isinstance(worse, str):
        raise ValueError(
            f"columns {' and '.join(map(repr, columns))} differ in type: "
            "both must be strings or both lists of messages"
        )
    return _from_messages(row, prompt, better, worse, columns)


def _refuse_lists_of_turns(row: Row, chosen: object, rejected: object) -> None:
    """Raise where prompt and both answers are text that is a list of texts, one for each turn.

    Chatbot Arena's rows are: {"prompt": '["Hi"]', "response_a": '["Hello"]', ...}. An answer alone
    may be such a list: the prompt may have asked for it.
    """
    columns = prompt_columns(row)[:1]
    for value in (*(row[name] for name in columns), chosen, rejected):
        items = read_list(value) if isinstance(value, str) else None
        if not items or not all(item is None or isinstance(item, str) for item in items):
            return
    if columns:
        raise ValueError(
            f"column {columns[0]!r} and both answers are text that is a list of texts, as of a "
            "conversation's turns. Write them as messages, or as the plain texts if there is one "
            "turn"
        )


def _from_strings(
    row: Row, prompt: Text | None, chosen: str, rejected: str, columns: tuple[str, ...]
) -> Outcome:
    if isinstance(prompt, tuple):
        better, worse = one_turn("assistant", chosen), one_turn("assistant", rejected)
        return make_preference(row, _without_answer(prompt, better, worse), better, worse)
    if prompt is not None:
        return make_preference(row, prompt, chosen, rejected)
    if any(name in row for name in PROMPTS):
        return Dropped(EMPTY_PROMPT)
    refuse_other_texts(row, *columns)
    shared = chosen[: shared_length(chosen, rejected)]
    # The word in which the answers part belongs to them completely, with the space before it.
    word = LAST_WORD.search(shared)
    if word is None or word.start() == 0:
        return Dropped("no shared prompt")
    cut = word.start()
    return make_preference(row, shared[:cut], chosen[cut:], rejected[cut:])


def _from_messages(
    row: Row, prompt: Text | None, chosen: Turns, rejected: Turns, columns: tuple[str, ...]
) -> Outcome:
    # The last turn of each is its answer, even if both are the same.
    shared = shared_length(chosen[:-1], rejected[:-1])
    are_dialogues = shared > 0 and chosen[0].role != "assistant"
    if prompt is None and not shared and not _begin_with_user(chosen, rejected):
        if any(name in row for name in PROMPTS):
            return Dropped(EMPTY_PROMPT)
        refuse_other_texts(row, *columns)
    # A string named prompt beside complete dialogues repeats some of them (UltraFeedback does so).
    if prompt is None or (isinstance(prompt, str) and are_dialogues):
        if prompt is not None and not contains(prompt, chosen[:shared]):
            return Dropped("the prompt column is not in the dialogues")
        prompt = with_system(row, chosen[:shared])
        return make_preference(row, prompt, chosen[shared:], rejected[shared:])
    turns = one_turn("user", prompt) if isinstance(prompt, str) else prompt
    turns = _without_answer(turns, chosen, rejected)
    without_system = turns
    if [turn.role for turn in turns[:1]] == ["system"]:
        without_system = turns[1:]
    for repeated in (turns, without_system):  # the answers may repeat the prompt
        size = len(repeated)
        if chosen[:size] == repeated == rejected[:size]:
            return make_preference(row, turns, chosen[size:], rejected[size:])
    return make_preference(row, turns, chosen, rejected)


def _without_answer(prompt: Turns, chosen: Turns, rejected: Turns) -> Turns:
    """The prompt without the answer at its end: a column messages may be the chosen dialogue."""
    for answer in (chosen, rejected):
        if prompt[-1].role == "assistant" and prompt[-1:] == answer[-1:]:
            return prompt[:-1]
    return prompt


def _begin_with_user(chosen: Turns, rejected: Turns) -> bool:
    """Whether both are dialogues from their beginning, although different ones."""
    return any(turns[:1] and turns[0].role != "assistant" for turns in (chosen, rejected))
