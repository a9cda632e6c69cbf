"""A pair as text, before it becomes tokens: what chat_template.py makes and tokenize.py reads."""

import dataclasses

Spans = tuple[tuple[int, int], ...]
"""Begin and end of pieces of a text, in characters."""


@dataclasses.dataclass(frozen=True)
class AnswerText:
    """A prompt and one answer to it, as text."""

    text: str
    loss_spans: Spans | None = None
    """The parts of the text that have loss. None: all after the prompt."""


@dataclasses.dataclass(frozen=True)
class PairText:
    """One pair as text: the prompt alone, and with each answer."""

    prompt: str
    chosen: AnswerText
    rejected: AnswerText
    templated: bool
    """Written by a chat template: the text spells eos and the other special tokens."""
    writes_bos: bool
    """The text spells bos too, if there is to be one."""
    left_out: frozenset[str] = frozenset()
    """What the chat template leaves out of the record, named for the report."""
    is_open: bool = False
    """The answers begin right behind the generation prompt, with thoughts of their own, although
    the template writes something else before an answer without any."""
