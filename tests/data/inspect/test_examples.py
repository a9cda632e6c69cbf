import io

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from jaxdpo.data.formats.preference import Message, Preference
from jaxdpo.data.inspect.examples import MAX_SHOWN, example_of_record, example_of_tokens, show
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.utils.html_report import Example, Passage


def shown(example: Example, colours: bool) -> str:
    file = io.StringIO()
    show(
        example,
        Console(
            file=file,
            force_terminal=colours,
            color_system="standard" if colours else None,
            soft_wrap=True,
        ),
    )
    return file.getvalue()


def test_colours_on_a_terminal_and_marks_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    example = example_of_record(Preference("q", "good\nday", "bad"))
    coloured = shown(example, colours=True)
    assert (
        "    \x1b[32mgood\x1b[0m\n\x1b[32m    day\x1b[0m\n" in coloured
        and "\x1b[31mbad\x1b[0m" in coloured
        and "<<" not in coloured
    )
    assert shown(example, colours=False) == (
        "pair \n  prompt, 1 character\n    q\n  chosen, 8 characters\n    <<good\n    day>>\n"
        "  rejected, 3 characters\n    <<bad>>\n"
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert "<<bad>>" in shown(example, colours=True) and "\x1b[31m" not in shown(
        example, colours=True
    )


def test_text_cannot_drive_the_terminal() -> None:
    for colours in (False, True):
        text = shown(
            example_of_record(
                Preference(
                    "\x1b]0;t\x07 \u202ex", "[red]a[/red] :smile:", "\x9b2Jb\r", id="\x1b[2J"
                )
            ),
            colours,
        )
        assert (
            "[red]a[/red] :smile:" in text
            and "\\x1b]0;t\\x07 \\u202ex" in text
            and "\\x9b2Jb\\r" in text
        )
        assert not any(
            sign in text for sign in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\r", "\u202e")
        )


def test_only_assistant_turns_have_loss_tokens() -> None:
    answer = (Message("assistant", "a"), Message("user", "more?"), Message("assistant", "b"))
    example = example_of_record(
        Preference((Message("user", "q"),), answer, (Message("assistant", "c"),)), why="odd"
    )
    assert (example.passages[0].name, example.passages[0].note) == ("prompt", "1 character")
    assert (
        "".join(text for text, _ in example.passages[1].spans)
        == "assistant: a\nuser: more?\nassistant: b"
    )
    assert [text for text, scored in example.passages[1].spans if scored] == ["a", "b"]
    assert list(example.passages[2].spans) == [("c", True)] and example.note == "odd"
    last = example_of_record(Preference((Message("user", "q"),), answer, "d"), all_turns=False)
    assert [[text for text, scored in passage.spans if scored] for passage in last.passages] == [
        [],
        ["b"],
        ["d"],
    ]


def test_tokens_outside_the_completion_mask_are_not_marked(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = ["The sky", " is blue", " on a day", ", I think"]
    prompt, *parts = (np.array(byte_tokenizer(text)["input_ids"], np.int32) for text in texts)
    chosen = np.concatenate(parts)
    scored = np.concatenate([np.full(len(part), place != 1) for place, part in enumerate(parts)])
    pair = EncodedPair(
        prompt, chosen, parts[0], chosen_mask=scored, id="p", weight=2.0, ended_rejected=True
    )
    example = example_of_tokens(pair, byte_tokenizer)
    assert list(example.passages[0].spans) == [(texts[0], False)]
    assert list(example.passages[1].spans) == [
        (texts[1], True),
        (texts[2], False),
        (texts[3], True),
    ]
    assert (
        example.passages[1].note
        == f"{len(chosen)} tokens, {scored.sum()} of them loss tokens, no eos"
    )
    assert example.passages[2].note == f"{len(parts[0])} loss tokens" and example.note == "weight 2"


@pytest.mark.parametrize("spans", [["x" * 5000], ["a" * 500, "b" * 500, "c" * 3000, "d" * 1000]])
def test_long_texts_lose_their_middle(spans: list[str]) -> None:
    whole = "".join(spans)
    text = shown(
        Example("", "", [Passage("prompt", "", [(span, False) for span in spans])]), colours=False
    )
    head, _, rest = text.partition("\n    [... ")
    number, _, tail = rest.partition(" characters more ...]\n    ")
    assert head.endswith(whole[: MAX_SHOWN // 2]) and tail.strip() == whole[-MAX_SHOWN // 2 :]
    assert int(number.replace(",", "")) == len(whole) - MAX_SHOWN


def test_a_text_that_is_hardly_too_long_is_shown_completely() -> None:
    assert "characters more" not in shown(
        Example("", "", [Passage("prompt", "", [("x" * (MAX_SHOWN + 9), False)])]), colours=False
    )
