"""Rows that hold no pair, and forms that are not read: what they are, and what to do."""

import re

from jaxdpo.data.formats.common import Row
from jaxdpo.utils.text import has_content

_FORMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("contents", "completions"),
        "Gemini's rows: write contents as messages {role, content} in a column prompt, and the "
        "two completions as chosen and rejected",
    ),
    (
        ("context", "completions"),
        "NeMo-RL's rows: rename context to prompt",
    ),
    (
        ("overall_preference",),
        "HelpSteer's rows: make a column label with 1 or 2, or the columns chosen and rejected, "
        "from the sign of overall_preference",
    ),
    (
        ("winner_model_a", "winner_model_b"),
        "Chatbot Arena's rows with one column for each verdict: make a column winner with model_a, "
        "model_b or tie of them",
    ),
    (
        ("completion", "label"),
        "unpaired rows (KTO): a pair needs two answers to one prompt. Join a good and a bad answer "
        "to the same prompt as chosen and rejected",
    ),
    (
        ("messages", "label"),
        "unpaired rows (KTO): a pair needs two answers to one prompt. Join a good and a bad answer "
        "to the same prompt as chosen and rejected",
    ),
)
"""Columns of a form, and what it is. The first whose columns a row has is named."""
_PAIRS = (
    ("y_w", "y_l"), ("win", "lose"), ("winner", "loser"), ("good", "bad"), ("better", "worse"),
    ("positive", "negative"), ("pos", "neg"), ("preferred", "rejected"), ("accepted", "rejected"),
    ("preferred", "dispreferred"), ("preferred_response", "rejected_response"),
    ("preferred_completion", "rejected_completion"), ("chosen_answer", "rejected_answer"),
    ("chosen_conversations", "rejected_conversations"), ("chosen_text", "rejected_text"),
    ("answer_chosen", "answer_rejected"), ("response_chosen", "response_rejected"),
)  # fmt: skip
"""Names of two answers whose meaning is clear to a person; they are not guessed."""
_NEXT = {"a": "b", "A": "B", "0": "1", "1": "2"}
"""Endings of the names of two answers."""
_ONE_ANSWER = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
    ("instruction", "response"), ("question", "answer"), ("query", "response"), ("messages",),
    ("conversations",), ("conversation",), ("text",),
)  # fmt: skip


def remedy(row: Row) -> str:
    """What a row without two answers is, and how to turn it into one that is read."""
    names = {name for name in row if has_content(row[name])}
    for better, worse in _PAIRS:
        if {better, worse} <= names:
            return f"Rename {better} to chosen and {worse} to rejected"
    for columns, text in _FORMS:
        if set(columns) <= names:
            return f"These look like {text}"
    texts = [name for name in row if isinstance(row[name], str | list) and name in names]
    for name in texts:
        found = re.fullmatch(r"(.*?_?)(a|A|0|1)", str(name))
        if found and f"{found[1]}{_NEXT[found[2]]}" in texts:
            return (
                f"The answers {name} and {found[1]}{_NEXT[found[2]]} need a column label that says "
                f"which is better: {found[2]}, {_NEXT[found[2]]} or tie"
            )
    for name in ("chosen", "rejected"):
        if name in row:
            return "A pair needs both answers, chosen and rejected, to one prompt"
    for columns in _ONE_ANSWER:
        if set(columns) <= names:
            return (
                f"These look like rows for fine-tuning, with one answer to a prompt "
                f"({', '.join(columns)}): a pair needs two, chosen and rejected"
            )
    return "Rename the columns to prompt, chosen and rejected (other forms: docs/data.md)"
