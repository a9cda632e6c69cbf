"""Answers of several turns: which of their tokens are loss tokens (completion mask)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.detokenize import answer_pieces, describe_pair
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.formats.trl import parse_preference
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.tokenize import Encoder
from jaxdpo.data.tokenizer_json import Tokenizer, load_tokenizer

USER, ASSISTANT = (lambda text, role=role: Message(role, text) for role in ("user", "assistant"))
PROMPT = (USER("Which colour is the sky?"),)
LONG = (ASSISTANT("Blue."), USER("And in the evening?"), ASSISTANT("Red, I think."))
SHORT = (ASSISTANT("No."),)


def encoder(
    tokenizer: Tokenizer, turns: str = "all", template: str | None = None, **options: Any
) -> Encoder:
    section = DataSection(
        **{
            "max_length": 200,
            "max_prompt_length": 100,
            "loss_turns": turns,
            "chat_template": template,
            **options,
        }
    )
    return Encoder.create(tokenizer, section)


def encode(
    encoder: Encoder, chosen: tuple[Message, ...] = LONG, rejected: tuple[Message, ...] = SHORT
) -> EncodedPair | Dropped:
    return encoder.encode([Preference(PROMPT, chosen, rejected)])[0]


def loss_texts(encoder: Encoder, pair: EncodedPair | Dropped) -> list[list[str]]:
    """The loss tokens of the chosen and of the rejected answer."""
    assert isinstance(pair, EncodedPair), pair
    sides = [
        answer_pieces(encoder.tokenizer, pair.prompt_ids, ids, mask) for ids, mask in pair.answers
    ]
    return [[text for text, counts in pieces if counts] for pieces in sides]


@pytest.mark.parametrize(
    ("turns", "chosen"),
    [("all", [" Blue.", " Red, I think.<|end|>"]), ("last", [" Red, I think.<|end|>"])],
    ids=["all", "last"],
)
def test_completion_mask_of_plain_turns(
    byte_tokenizer: PreTrainedTokenizerFast, turns: str, chosen: list[str]
) -> None:
    ours = encoder(byte_tokenizer, turns)
    pair = encode(ours)
    assert loss_texts(ours, pair) == [chosen, [" No.<|end|>"]]
    assert isinstance(pair, EncodedPair)
    whole = str(byte_tokenizer.decode([*pair.prompt_ids, *pair.chosen_ids]))
    assert whole.endswith("\n\nHuman: And in the evening?\n\nAssistant: Red, I think.<|end|>")


@pytest.mark.parametrize("turns", ["all", "last"])
def test_completion_mask_of_template_turns_with_their_eos(
    chat_tokenizer: PreTrainedTokenizerFast, turns: str
) -> None:
    ours = encoder(chat_tokenizer, turns)
    chosen = ["Blue.<|im_end|>\n", "Red, I think.<|im_end|>\n"]
    assert loss_texts(ours, encode(ours)) == [
        chosen if turns == "all" else chosen[1:],
        ["No.<|im_end|>\n"],
    ]


def test_completion_mask_leaves_out_turns_of_tools(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    ours = encoder(chat_tokenizer)
    called = (ASSISTANT("look it up"), Message("tool", "blue"), ASSISTANT("It is blue."))
    assert loss_texts(ours, encode(ours, called))[0] == [
        "look it up<|im_end|>\n",
        "It is blue.<|im_end|>\n",
    ]
    assert loss_texts(ours, encode(ours, SHORT, called))[1] == [
        "look it up<|im_end|>\n",
        "It is blue.<|im_end|>\n",
    ]


def test_completion_mask_of_turns_that_the_template_rewrites(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    thinks = tmp_path / "thinks.jinja"  # as Qwen3's: the last turn alone gets a think block
    thinks.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ours = encoder(chat_tokenizer, template=str(thinks))
    assert loss_texts(ours, encode(ours))[0] == ["Blue.<|im_end|>\n", "Red, I think.<|im_end|>\n"]
    loud = tmp_path / "loud.jinja"
    loud.write_text(
        "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>\n{% endfor %}"
    )
    found = encode(encoder(chat_tokenizer, template=str(loud)))
    assert found == Dropped("the chat template rewrites a turn, so its tokens cannot be found")


def test_truncation_that_leaves_no_loss_token_drops_the_pair(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    whole = encode(encoder(byte_tokenizer))
    assert isinstance(whole, EncodedPair) and whole.chosen_mask is not None
    last = len(whole.prompt_ids) + int(np.flatnonzero(~whole.chosen_mask)[-1]) + 1
    few: dict[str, Any] = {"max_prompt_length": len(whole.prompt_ids)}
    assert encode(encoder(byte_tokenizer, "last", max_length=last, **few)) == Dropped(
        "no room for an answer"
    )
    found = encode(encoder(byte_tokenizer, "last", max_length=last + 1, **few))
    assert (
        isinstance(found, EncodedPair) and found.truncated_chosen and found.answers[0][1].sum() == 1
    )


def test_rows_whose_dialogues_part_early() -> None:
    shared = [{"role": "user", "content": "q"}]
    sides = [
        [*shared, *({"role": turn.role, "content": turn.content} for turn in answer)]
        for answer in (LONG, SHORT)
    ]
    (record,) = parse_preference({"chosen": sides[0], "rejected": sides[1]}, DataSection())
    assert isinstance(record, Preference) and (record.chosen, record.rejected) == (LONG, SHORT)


def test_loss_tokens_are_marked(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    pair = encode(encoder(byte_tokenizer))
    assert isinstance(pair, EncodedPair)
    shown = describe_pair(pair, byte_tokenizer)
    assert (
        "<< Blue.>>" in shown
        and "<< Red, I think.<|end|>>>" in shown
        and "    Human: And in the evening?" in shown
    )


def test_completion_mask_of_qwen3(real_data: Path) -> None:
    ours = encoder(load_tokenizer(str(real_data / "tokenizers" / "qwen3")))
    assert loss_texts(ours, encode(ours)) == [
        ["Blue.<|im_end|>\n", "Red, I think.<|im_end|>\n"],
        ["No.<|im_end|>\n"],
    ]
