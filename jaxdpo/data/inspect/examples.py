"""Pairs to look at, with their loss tokens marked, for a terminal and for a page."""

from collections.abc import Sequence

from jaxdpo.data.detokenize import answer_pieces, decode_shown
from jaxdpo.data.formats.preference import Preference, Text, strings
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.tokenizer_json import Tokenizer
from jaxdpo.utils.console import Console, is_coloured, say_parts
from jaxdpo.utils.html_report import Example, Passage
from jaxdpo.utils.text import printable

Spans = list[tuple[str, bool]]
"""Text, and whether the loss counts it (the completion mask)."""

MAX_SHOWN = 1200
"""Most characters of one text that a terminal is shown: about 15 lines."""
_STYLES = {"chosen": "green", "rejected": "red"}


def example_of_record(record: Preference, why: str = "", all_turns: bool = True) -> Example:
    """A pair as it was read, before any chat template.

    Args:
        record: the pair.
        why: why it is shown, for its heading.
        all_turns: whether the loss counts every assistant turn of an answer, or the last alone
            (data.loss_turns).
    """
    passages = []
    for name, text in (
        ("prompt", record.prompt),
        ("chosen", record.chosen),
        ("rejected", record.rejected),
    ):
        first_turn = None
        if name != "prompt":
            first_turn = 0 if all_turns else len(text) - 1
        characters = sum(map(len, strings(text)))
        passages.append(Passage(name, _count(characters, "character"), _turns(text, first_turn)))
    return _example(record, why, passages)


def example_of_tokens(pair: EncodedPair, tokenizer: Tokenizer, why: str = "") -> Example:
    """A pair as the model sees it, its tokens decoded.

    Args:
        pair: the pair.
        tokenizer: decodes its tokens.
        why: why it is shown, for its heading.
    """
    prompt = [(decode_shown(tokenizer, pair.prompt_ids[:0], pair.prompt_ids), False)]
    passages = [Passage("prompt", _count(len(pair.prompt_ids), "token"), _printable(prompt))]
    ends = (pair.ended_chosen, pair.ended_rejected)
    for name, (ids, mask), ended in zip(("chosen", "rejected"), pair.answers, ends, strict=True):
        note = _count(len(ids), "loss token")
        if not mask.all():
            note = f"{_count(len(ids), 'token')}, {int(mask.sum()):,} of them loss tokens"
        if not ended:
            note += ", no eos"
        spans = answer_pieces(tokenizer, pair.prompt_ids, ids, mask)
        passages.append(Passage(name, note, _printable(spans)))
    return _example(pair, why, passages)


def show(example: Example, console: Console) -> None:
    """Print an example; long texts lose their middle.

    Loss tokens are in colour, or <<like this>> where there are no colours.
    """
    coloured = is_coloured(console)
    note = f", {example.note}" if example.note else ""
    say_parts(console, [(f"pair {example.title}", "bold"), (note, "")])
    for passage in example.passages:
        say_parts(console, [(f"  {passage.name}, {passage.note}", "bold" if coloured else "")])
        parts = [("    ", "")]
        for text, counted in _shortened(passage.spans):
            style = ""
            if counted and coloured:
                style = _STYLES.get(passage.name, "")
            elif counted:
                text = f"<<{text}>>"
            parts.append((text.replace("\n", "\n    "), style))
        say_parts(console, parts)


def _example(pair: Preference | EncodedPair, why: str, passages: list[Passage]) -> Example:
    notes = []
    if why:
        notes.append(why)
    if pair.weight != 1:
        notes.append(f"weight {pair.weight:g}")
    if pair.margin != 0:
        notes.append(f"margin {pair.margin:g}")
    return Example(printable(pair.id), ", ".join(notes), passages)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _turns(text: Text, first_turn: int | None) -> Spans:
    """A text with the roles of its turns.

    Args:
        text: a string or turns.
        first_turn: the first turn whose text the loss counts, if it is the assistant's; None: no
            turn (a prompt).
    """
    if isinstance(text, str):
        return _printable([(text, first_turn is not None)])
    spans: Spans = []
    for number, turn in enumerate(text):
        if spans:
            spans.append(("\n", False))
        if first_turn is None or len(text) > 1:  # the usual answer needs no role
            spans.append((f"{turn.role}: ", False))
        counted = first_turn is not None and number >= first_turn and turn.role == "assistant"
        spans.append((" ".join(filter(None, strings((turn,)))), counted))
    return _printable(spans)


def _printable(spans: Spans) -> Spans:
    return [(printable(text), counted) for text, counted in spans if text]


def _shortened(spans: Sequence[tuple[str, bool]]) -> Spans:
    """The spans without the middle of their text, if there is more than MAX_SHOWN of it."""
    total, half = sum(len(text) for text, _ in spans), MAX_SHOWN // 2
    if total <= MAX_SHOWN + MAX_SHOWN // 4:  # a cut of a few words would help nobody
        return list(spans)
    head, tail, start = [], [], 0
    for text, counted in spans:
        head.append((text[: max(half - start, 0)], counted))
        tail.append((text[max(total - half - start, 0) :], counted))
        start += len(text)
    gap = (f"\n[... {total - 2 * half:,} characters more ...]\n", False)
    return [(text, counted) for text, counted in (*head, gap, *tail) if text]
