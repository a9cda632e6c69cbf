from transformers import PreTrainedTokenizerFast

from jaxdpo.data.special_tokens import SpecialTokens


def test_bos_is_what_the_tokenizer_really_adds(
    byte_tokenizer: PreTrainedTokenizerFast,
    metaspace_tokenizer: PreTrainedTokenizerFast,
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert SpecialTokens.of(metaspace_tokenizer).bos == [metaspace_tokenizer.bos_token_id]
    assert SpecialTokens.of(byte_tokenizer).bos == []
    assert chat_tokenizer.bos_token == "<|begin|>"
    assert SpecialTokens.of(chat_tokenizer).bos == [], "its chat template writes it"


def test_an_answer_ends_in_eos_or_in_a_special_token_and_a_line_break(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    special = SpecialTokens.of(chat_tokenizer)
    (eos,) = special.eos
    assert special.by_spelling["<|im_end|>"] == eos == chat_tokenizer.eos_token_id
    assert special.end([300, eos]) and special.end([300, eos, 301])
    assert not special.end([eos, 301, 302]) and not special.end([])
