import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxdpo.data import word_cache
from jaxdpo.data.tokenizer_json import load_tokenizer
from jaxdpo.data.word_cache import PATTERNS, UNCOMMON, WordCache

TEXT = st.text(st.sampled_from("aAz \n\r\t'.:1é́中🙂<|end|>sH’ªØßž½²…—÷§ſ\x1c\x85\xa0"), max_size=12)
PIECE = st.one_of(
    TEXT,
    st.sampled_from(
        [
            "\n\nHuman: ",
            "\n\nAssistant:",
            "<|end|>",
            "<|im_start|>user\n",
            "\n",
            " \n \n",
            "'s",
            "\n's",
        ]
    ),
)


def with_pattern(
    tokenizer: PreTrainedTokenizerFast, pattern: str, **options: Any
) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    split = pre_tokenizers.Split(Regex(pattern), "isolated", **options)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def words_of(tokenizer: Any) -> WordCache:
    words = WordCache.of(tokenizer)
    assert words is not None
    return words


def is_other(tokenizer: Any) -> bool:
    return WordCache.of(tokenizer) is None


def check(
    tokenizer: Any, words: WordCache, pieces: list[str], chosen: str, rejected: str, special: bool
) -> None:
    prompt = "".join(pieces)
    texts = (prompt, prompt + chosen, prompt + rejected)
    ((*found,),) = words.encode_pairs([texts], special)
    whole = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=not special)[
        "input_ids"
    ]
    assert found == whole


@pytest.mark.parametrize("pattern", ["", *PATTERNS], ids=["gpt2", "llama3", "qwen"])
def test_two_parts_are_encoded_as_one(
    byte_tokenizer: PreTrainedTokenizerFast, pattern: str
) -> None:
    tokenizer = with_pattern(byte_tokenizer, pattern) if pattern else byte_tokenizer
    words = words_of(tokenizer)

    @given(st.lists(PIECE, max_size=6), TEXT, TEXT, st.booleans())
    @settings(max_examples=300)
    def run(pieces: list[str], chosen: str, rejected: str, special: bool) -> None:
        check(tokenizer, words, pieces, chosen, rejected, special)

    run()


def test_texts_that_do_not_begin_alike(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ("a\nb\nc", "a\nb d", "x\ny")
    assert (
        list(words_of(byte_tokenizer).encode_pairs([texts], False)[0])
        == byte_tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    )


def test_every_word_is_encoded_once(
    byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    known = word_cache._IdsOfWord.__missing__
    monkeypatch.setattr(
        word_cache._IdsOfWord,
        "__missing__",
        lambda self, word: (seen.append(word), known(self, word))[1],
    )
    words, prompt = words_of(byte_tokenizer), "\n\nHuman: why, <|end|> oh why?\n\nAssistant:"
    pairs = [(prompt, prompt + " yes", prompt + " no"), (prompt, prompt + " yes", prompt + " why")]
    first = words.encode_pairs(pairs, True)
    assert sorted(seen) == sorted(
        ["\n", "Human", ":", " why", ",", " ", " oh", "?", "A", "Assistant", " yes", " no"]
    )
    monkeypatch.setattr(word_cache, "MAX_WORDS", 5)
    assert words.encode_pairs(pairs, True) == first and len(seen) == 24


def test_common_characters_are_of_their_class() -> None:
    common = [chr(code) for code in range(0x2100) if not UNCOMMON.match(chr(code))]
    assert len(common) > 350
    for name, members in (("L", word_cache._LETTERS), ("N", word_cache._NUMBERS)):
        assert all(
            (unicodedata.category(char)[0] == name) == bool(re.match(f"[{members}]", char))
            for char in common
        )
    assert all(
        char.isspace() == (char in " \t\n\r") and unicodedata.is_normalized("NFC", char)
        for char in common
    )
    assert not any(unicodedata.combining(char) for char in common)


def test_truncation_and_padding_of_the_tokenizer_are_off(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = ["one and two and three", "中 one", "a 中 or two of them and more"]
    expected = byte_tokenizer(texts, add_special_tokens=False)["input_ids"]
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    assert (
        words_of(PreTrainedTokenizerFast(tokenizer_object=backend)).encode(texts, special=True)
        == expected
    )


def test_other_kinds_of_tokenizers_are_not_cut(
    byte_tokenizer: PreTrainedTokenizerFast, metaspace_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert is_other(metaspace_tokenizer) and is_other(object())
    assert is_other(with_pattern(byte_tokenizer, r"\w+|\W+"))
    assert is_other(with_pattern(byte_tokenizer, PATTERNS[0], invert=True))
    changes: list[dict[str, Any]] = [
        {"normalizer": json.loads(normalizers.Lowercase().__getstate__())},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {"pre_tokenizer": None},
    ]
    for change in changes:
        backend = Tokenizer.from_str(
            json.dumps(json.loads(byte_tokenizer.backend_tokenizer.to_str()) | change)
        )
        assert is_other(PreTrainedTokenizerFast(tokenizer_object=backend)), change
    spec = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"][0]["rstrip"] = True
    assert is_other(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec))))


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_real_tokenizers_are_cut(real_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / name))
    words = words_of(tokenizer)

    @given(st.lists(PIECE, max_size=6), TEXT, TEXT, st.booleans())
    @settings(max_examples=100)
    def run(pieces: list[str], chosen: str, rejected: str, special: bool) -> None:
        check(tokenizer, words, pieces, chosen, rejected, special)

    run()
