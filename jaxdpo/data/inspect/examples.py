"""Pairs to look at: prompt, chosen and rejected answer with what is scored marked, for a terminal and for a page."""

import itertools
from collections.abc import Sequence

from jaxdpo.data.detokenize import answer_pieces, decode_answer
from jaxdpo.data.formats.preference import Preference, Text, strings
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.tokenize import Tokenizer
from jaxdpo.utils.console import Console, is_coloured, say_parts
from jaxdpo.utils.html_report import Example, Passage
from jaxdpo.utils.text import printable

Spans = list[tuple[str, bool]]
"""Text, and whether it is scored."""

SHOWN = 1200
"""Most characters of one text that a terminal is shown."""
_STYLES = {"chosen": "green", "rejected": "red"}


def example_of_record(record: Preference, why: str = "", all_turns: bool = True) -> Example:
    """A pair as it was read, before any template; of answers of several turns all that the assistant says is scored, or the last."""
    texts = (("prompt", record.prompt), ("chosen", record.chosen), ("rejected", record.rejected))
    passages = []
    for name, text in texts:
        scored_from = None if name == "prompt" else 0 if all_turns else len(text) - 1
        passages.append(
            Passage(
                name, _count(sum(map(len, strings(text))), "character"), _turns(text, scored_from)
            )
        )
    return _example(record, why, passages)


def example_of_tokens(pair: EncodedPair, tokenizer: Tokenizer, why: str = "") -> Example:
    """A pair as the model sees it; its tokens as text."""
    prompt = [(decode_answer(tokenizer, pair.prompt_ids[:0], pair.prompt_ids), False)]
    passages = [Passage("prompt", _count(len(pair.prompt_ids), "token"), _printable(prompt))]
    ends = (pair.ended_chosen, pair.ended_rejected)
    for name, (ids, scored), ended in zip(("chosen", "rejected"), pair.answers, ends, strict=True):
        part = "" if scored.all() else f"{int(scored.sum()):,} of "
        note = f"{part}{_count(len(ids), 'token')} scored" + ("" if ended else ", no end marker")
        passages.append(
            Passage(name, note, _printable(answer_pieces(tokenizer, pair.prompt_ids, ids, scored)))
        )
    return _example(pair, why, passages)


def show(example: Example, console: Console) -> None:
    """Print an example: what is scored in colour, or <<like this>> where there are no colours. Long texts lose their middle."""
    coloured = is_coloured(console)
    say_parts(
        console,
        [(f"pair {example.title}", "bold"), (f", {example.note}" if example.note else "", "")],
    )
    for passage in example.passages:
        say_parts(console, [(f"  {passage.name}, {passage.note}", "bold" if coloured else "")])
        spans = _shortened(passage.spans)
        if coloured:
            parts = [
                (text, _STYLES.get(passage.name, "") if scored else "") for text, scored in spans
            ]
        else:
            parts = [(f"<<{text}>>" if scored else text, "") for text, scored in spans]
        say_parts(
            console,
            [("    ", ""), *((text.replace("\n", "\n    "), style) for text, style in parts)],
        )


def _example(pair: Preference | EncodedPair, why: str, passages: list[Passage]) -> Example:
    notes = (
        [why] * bool(why)
        + [f"weight {pair.weight:g}"] * (pair.weight != 1)
        + [f"margin {pair.margin:g}"] * (pair.margin != 0)
    )
    return Example(printable(pair.id), ", ".join(notes), passages)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _turns(text: Text, scored_from: int | None) -> Spans:
    """A text with the names of the speakers; what the assistant says is scored from this turn on, in a prompt (None) nothing is."""
    if isinstance(text, str):
        return _printable([(text, scored_from is not None)])
    spans: Spans = []
    for number, turn in enumerate(text):
        name = "" if scored_from is not None and len(text) == 1 else f"{turn.role}: "
        scored = scored_from is not None and number >= scored_from and turn.role == "assistant"
        spans += [("\n" * bool(spans) + name, False), (turn.content, scored)]
    return _printable(spans)


def _printable(spans: Spans) -> Spans:
    return [(printable(text), scored) for text, scored in spans if text]


def _shortened(spans: Sequence[tuple[str, bool]]) -> Spans:
    """The spans with the middle of their text left out, if there is more than SHOWN of it."""
    total, half = sum(len(text) for text, _ in spans), SHOWN // 2
    if total <= SHOWN + SHOWN // 4:  # to leave out a few words helps nobody
        return list(spans)
    places = itertools.accumulate((len(text) for text, _ in spans[:-1]), initial=0)
    placed = [(place, text, scored) for place, (text, scored) in zip(places, spans, strict=True)]
    heads = [(text[: max(half - place, 0)], scored) for place, text, scored in placed]
    tails = [(text[max(total - half - place, 0) :], scored) for place, text, scored in placed]
    gap = (f"\n[... {total - 2 * half:,} characters more ...]\n", False)
    return [(text, scored) for text, scored in (*heads, gap, *tails) if text]
