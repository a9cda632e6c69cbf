"""Tiny tokenizers of the kinds that differ at boundaries, built here."""

import json

import pytest
import tokenizers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Which colour has the sky on a clear day? It is blue, and in the evening it is often red.",
    "Human: Assistant: the answer to the question is the number 42, I think. Thank you very much!",
    "A list:\n- apples\n- pears\n\n  and 3.14 or 1,000; über größe naïve 你好 🙂",
]
CHATML = (
    "{{ bos_token }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _train(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # type: ignore[call-arg]
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return _train(tokenizer, special, pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: no beginning-of-text token, no template."""
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(["<|end|>"]), eos_token="<|end|>")


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE as Llama's: a space before the text, bytes for the unknown, bos."""
    special = ["<unk>", "<s>", "</s>"]
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pieces.normalizer = space  # type: ignore[assignment]
    _train(pieces, special + [f"<0x{byte:02X}>" for byte in range(256)], [])
    spec = json.loads(pieces.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template that writes its own beginning-of-text token."""
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special), bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer
