import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxdpo.data.chat import load_tokenizer
from jaxdpo.data.tokens import PATTERNS, can_be_cut, encode_pairs

TEXT = st.text(st.sampled_from("aAz \n\r\t'.:1é́中🙂<|end|>sH"), max_size=12)
PIECE = st.one_of(TEXT, st.sampled_from(["\n\nHuman: ", "\n\nAssistant:", "<|end|>", "<|im_start|>user\n", "\n", " \n \n", "'s", "\n's"]))


def with_pattern(tokenizer: PreTrainedTokenizerFast, pattern: str, **options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    split = pre_tokenizers.Split(Regex(pattern), "isolated", **options)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def check(tokenizer: Any, pieces: list[str], chosen: str, rejected: str, special: bool) -> None:
    prompt = "".join(pieces)
    texts = (prompt, prompt + chosen, prompt + rejected)
    ((*found,),) = encode_pairs(tokenizer, [texts], special)
    whole = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=not special)["input_ids"]
    assert found == whole


@pytest.mark.parametrize("pattern", ["", *PATTERNS], ids=["gpt2", "llama3", "qwen"])
def test_two_parts_are_encoded_as_one(byte_tokenizer: PreTrainedTokenizerFast, pattern: str) -> None:
    tokenizer = with_pattern(byte_tokenizer, pattern) if pattern else byte_tokenizer
    assert can_be_cut(tokenizer)

    @given(st.lists(PIECE, max_size=6), TEXT, TEXT, st.booleans())
    @settings(max_examples=300)
    def run(pieces: list[str], chosen: str, rejected: str, special: bool) -> None:
        check(tokenizer, pieces, chosen, rejected, special)

    run()


def test_texts_that_do_not_begin_alike(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ("a\nb\nc", "a\nb d", "x\ny")
    assert list(encode_pairs(byte_tokenizer, [texts], False)[0]) == byte_tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def test_the_beginning_is_encoded_once(byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Backend:
        def __getattr__(self, name: str) -> Any:
            found = getattr(byte_tokenizer.backend_tokenizer, name)
            if not name.startswith("encode_batch"):
                return found
            return lambda texts, **options: (seen.extend(texts), found(texts, **options))[1]

    class Spy:
        backend_tokenizer = Backend()

    prompt = "\n\nHuman: a long question\n\nAssistant:"
    encode_pairs(Spy(), [(prompt, prompt + " yes", prompt + " no")], False)
    assert seen == [prompt + " yes", "Assistant:", "Assistant: no"]


def test_other_kinds_of_tokenizers_are_not_cut(
    byte_tokenizer: PreTrainedTokenizerFast, metaspace_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert not can_be_cut(metaspace_tokenizer) and not can_be_cut(object())
    assert not can_be_cut(with_pattern(byte_tokenizer, r"\w+|\W+"))
    assert not can_be_cut(with_pattern(byte_tokenizer, PATTERNS[0], invert=True))
    changes: list[dict[str, Any]] = [
        {"normalizer": json.loads(normalizers.Lowercase().__getstate__())},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},
    ]
    for change in changes:
        backend = Tokenizer.from_str(json.dumps(json.loads(byte_tokenizer.backend_tokenizer.to_str()) | change))
        assert not can_be_cut(PreTrainedTokenizerFast(tokenizer_object=backend)), change
    spec = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"][0]["rstrip"] = True
    assert not can_be_cut(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec))))


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_real_tokenizers_are_cut(real_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / name))
    assert can_be_cut(tokenizer)

    @given(st.lists(PIECE, max_size=6), TEXT, TEXT, st.booleans())
    @settings(max_examples=100)
    def run(pieces: list[str], chosen: str, rejected: str, special: bool) -> None:
        check(tokenizer, pieces, chosen, rejected, special)

    run()
