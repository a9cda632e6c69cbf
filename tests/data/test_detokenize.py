from transformers import PreTrainedTokenizerFast

from jaxdpo.data.detokenize import describe_pair
from tests.data.encoding import chat, encode


def test_a_pair_is_shown_safely_with_its_loss_tokens_marked(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    pair = encode(
        byte_tokenizer,
        chat(["see\x1b[2J\u202e this"], "yes", "no way", id="f\x07:1", weight=0.5),
        max_length=25,
        max_prompt_length=20,
    )
    shown = describe_pair(pair, byte_tokenizer)
    assert "<< yes<|end|>>>" in shown and "rejected, 5 loss tokens, truncated" in shown
    assert "prompt, 20 tokens, truncated" in shown and "pair f\\x07:1, weight 0.5" in shown
    assert shown.replace("\n", "").isprintable()
