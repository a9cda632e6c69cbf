"""Published token ids, tokenizers and templates, and real pairs.

No text of the pairs is quoted: it is offensive.
"""

import functools
import shutil
from pathlib import Path

import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.detokenize import decode_answer
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.sources import read_set
from jaxdpo.data.tokenize import Encoder
from jaxdpo.data.tokenizer_json import Tokenizer, load_tokenizer
from jaxdpo.data.word_cache import WordCache


def encoder(tokenizer: Tokenizer, chat_template: str | None = None) -> Encoder:
    """An encoder that cuts nothing."""
    options = {
        "max_length": 10**6,
        "max_prompt_length": 10**5,
        "packed_length": 2 * 10**6,
        "chat_template": chat_template,
    }
    return Encoder.create(tokenizer, DataSection(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "block"), [("gpt2", "gpt-2"), ("qwen3", "qwen2")])
def test_published_ids(real_data: Path, name: str, block: str) -> None:
    folder = real_data / "tokenizers" / "_reference_ids"
    texts = (
        (folder / f"ggml-{block}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    )
    expected = [
        [int(number) for number in line.split()]
        for line in (folder / f"ggml-{block}.out").read_text().splitlines()
    ]
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / name))
    found = encoder(tokenizer).token_ids(texts, templated=False)
    assert len(found) == 47 and found == [
        *expected,
        [],
    ]  # the last block of the file is the empty text
    words = WordCache.of(tokenizer)
    assert words is not None and words.encode(texts, special=False) == found


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_real_texts_word_by_word(real_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / name))
    words, texts = (
        WordCache.of(tokenizer),
        [text for record in hh_records(real_data)[::5] for text in record.texts],
    )
    assert (
        words is not None
        and words.encode(texts, special=True)
        == tokenizer(texts, add_special_tokens=False)["input_ids"]
    )


@functools.cache
def hh_records(folder: Path) -> list[Preference]:
    return list(
        read_set(
            str(folder / "hh-rlhf" / "harmless-base-test.jsonl.gz"), DataSection(), "data.train"
        )[1]
    )


@pytest.mark.parametrize("name", ["models/stories260K", "tokenizers/gpt2"])
def test_plain_spans_of_real_pairs_decode_to_the_answers(real_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(real_data / name))
    records = hh_records(real_data)[::20]
    pairs = encoder(tokenizer).encode(records)
    for record, pair in zip(records, pairs, strict=True):
        assert (
            isinstance(pair, EncodedPair)
            and isinstance(record.chosen[0], Message)
            and isinstance(record.rejected[0], Message)
        )
        expected = [
            f" {answer.content}{tokenizer.eos_token}"
            for answer in (record.chosen[0], record.rejected[0])
        ]
        assert [
            decode_answer(tokenizer, pair.prompt_ids, ids)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ] == expected
        assert [
            pair.prompt_ids[0] == tokenizer.bos_token_id,
            *(pair.prompt_ids[1:] == tokenizer.bos_token_id),
        ].count(True) == ("260K" in name)


def test_qwen3_spans_of_real_pairs_decode_to_the_answers(real_data: Path) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / "qwen3"))
    records = hh_records(real_data)[::20]
    pairs = encoder(tokenizer).encode(records)
    for record, pair in zip(records, pairs, strict=True):
        assert (
            isinstance(pair, EncodedPair)
            and isinstance(record.chosen[0], Message)
            and isinstance(record.rejected[0], Message)
        )
        expected = [
            f"{answer.content}<|im_end|>\n" for answer in (record.chosen[0], record.rejected[0])
        ]
        assert [
            decode_answer(tokenizer, pair.prompt_ids, ids)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ] == expected


def test_published_templates_score_exactly_the_answer(real_data: Path) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / "qwen3"))
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    turns = (Message("user", "2 + 2?"), Message("assistant", "4"), Message("user", "And 3 + 3?"))
    record = Preference(
        turns, (Message("assistant", "It is 6."),), (Message("assistant", "six, I think"),)
    )
    refused = set()
    for path in sorted((real_data / "chat_templates").glob("*.jinja")):
        (pair,) = encoder(tokenizer, chat_template=str(path)).encode([record])
        if isinstance(pair, Dropped):
            refused.add(path.name)
            continue
        spans = [
            decode_answer(tokenizer, pair.prompt_ids, ids)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        ends = [
            span.removeprefix(text)
            for span, text in zip(spans, ("It is 6.", "six, I think"), strict=True)
        ]
        assert ends[0] == ends[1] and ends[0].startswith("<") and len(ends[0]) < 25, (
            path.name,
            spans,
        )
    assert not refused


def test_a_tokenizer_folder_needs_no_network(real_data: Path, tmp_path: Path) -> None:
    for path in (real_data / "models" / "stories260K").glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == 512
