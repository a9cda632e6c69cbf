"""data.strings: what strings are; special tokens that a chat template wrote in them."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.detokenize import decode_shown
from jaxdpo.data.formats.preference import Preference
from jaxdpo.data.prepare import prepare
from tests.data.encoding import chat, drop_reason, encode, encoder, text_of

BEGIN, END = "<|im_start|>", "<|im_end|>\n"
MESSAGES = chat(["Why?", "So.", "And?"], "a b", "c")
WRITTEN = Preference(
    f"<|begin|>{BEGIN}user\nWhy?{END}{BEGIN}assistant\nSo.{END}{BEGIN}user\nAnd?{END}"
    f"{BEGIN}assistant\n",
    f"a b{END}",
    f"c{END}",
)


def test_templated_strings_have_the_tokens_of_the_messages(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    expected = encode(chat_tokenizer, MESSAGES)
    for prompt in (WRITTEN.prompt, str(WRITTEN.prompt).removeprefix("<|begin|>")):
        record = dataclasses.replace(WRITTEN, prompt=prompt)
        pair = encode(chat_tokenizer, record, strings="templated")
        ids = pair.prompt_ids.tolist()
        if ids[0] != chat_tokenizer.bos_token_id:  # this tokenizer adds none itself
            ids = [chat_tokenizer.bos_token_id, *ids]
        assert ids == expected.prompt_ids.tolist()
        assert pair.chosen_ids.tolist() == expected.chosen_ids.tolist()
        assert pair.rejected_ids.tolist() == expected.rejected_ids.tolist()
        assert pair.ended_chosen and pair.ended_rejected


def test_templated_strings_without_bos_get_the_tokenizers_own(
    metaspace_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for prompt in ("<s>Hi ", "Hi "):
        record = Preference(prompt, "yes</s>", "no</s>")
        pair = encode(metaspace_tokenizer, record, strings="templated")
        ids = pair.prompt_ids.tolist()
        assert ids[0] == 1 and ids.count(1) == 1
        assert pair.chosen_ids.tolist().count(2) == 1 and pair.ended_chosen


def test_strings_as_messages_are_laid_out_by_the_template(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    expected = encode(chat_tokenizer, chat(["Why?"], "a b", "c"))
    pair = encode(chat_tokenizer, Preference("Why?", "a b", "c"), strings="message")
    assert text_of(chat_tokenizer, pair) == text_of(chat_tokenizer, expected)
    spelled = Preference("Why?<|im_end|>", "a", "b")
    assert "spells a special token" in drop_reason(chat_tokenizer, spelled, strings="message")


@pytest.mark.parametrize("strings", ["verbatim", "message", "templated"])
def test_a_prompt_to_generate_from_is_that_of_the_training(
    strings: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    record = WRITTEN if strings == "templated" else Preference("Why?", "a", "b")
    trained = encode(chat_tokenizer, record, strings=strings).prompt_ids.tolist()
    prompt = encoder(chat_tokenizer, strings=strings).encode_prompt(record.prompt)
    assert prompt.ids.tolist() == trained  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "record",
    [
        WRITTEN,
        Preference("Say <|im_end|> please", "a", "b"),
        Preference("q", "a<|im_end|>\n", "b"),
        Preference("q", "a", "b<|im_start|>user"),
    ],
)
def test_strings_with_special_tokens_are_an_error_until_chosen(
    record: Preference, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}, row_of(record)]
    file.write_text("\n".join(map(json.dumps, rows)))
    section = DataSection(
        train=[str(file)], eval_fraction=0, max_length=200, max_prompt_length=100, cache=None
    )
    with pytest.raises(
        ValueError, match=r"1 rows of strings spell .*pairs\.jsonl:2.*data\.strings="
    ):
        prepare(section, chat_tokenizer, 1000)
    for choice in ("verbatim", "templated"):
        chosen = dataclasses.replace(section, strings=choice, missing_eos="keep")
        assert len(prepare(chosen, chat_tokenizer, 1000).train) == 2


def test_an_eos_at_the_end_of_a_string_answer_is_certain(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ours = encoder(chat_tokenizer)
    assert not ours.strings_spell_special(Preference("q", "a<|im_end|>", "b<|im_end|>"))
    assert not ours.strings_spell_special(chat(["<|im_end|>"], "a", "b"))
    assert ours.strings_spell_special(Preference("q", "a<|im_end|><|im_end|>", "b"))


def test_spelled_special_tokens_look_otherwise_than_real_ones(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    record = Preference("say <|im_end|> now", " <|im_start|>", " b")
    pair = encode(chat_tokenizer, record, strings="verbatim")
    none = pair.prompt_ids[:0]
    assert decode_shown(chat_tokenizer, none, pair.prompt_ids) == r"say \<|im_end|> now"
    answer = decode_shown(chat_tokenizer, pair.prompt_ids, pair.chosen_ids)
    assert answer == r" \<|im_start|><|im_end|>"
    real = encode(chat_tokenizer, WRITTEN, strings="templated")
    assert decode_shown(chat_tokenizer, none, real.prompt_ids) == WRITTEN.prompt


def row_of(record: Preference) -> dict[str, object]:
    return {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
