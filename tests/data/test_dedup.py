from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.prepare import Prepared, prepare
from tests.data.rows import Write


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


FIRST = [
    row("q", "a", "b"),
    row("q", "a", "b"),
    row("q", "a", "c"),
    row("r", "a", "b"),
    row("s", "x", "y"),
]
SECOND = [row("q", "a", "b"), row("r", "b", "a"), row("r", "a", "b"), row("t", "x", "y")]


def read(write: Write, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Prepared:
    paths = [write("first.jsonl", FIRST), write("second.jsonl", SECOND)]
    more = {
        "train": paths,
        "eval_fraction": 0.0,
        "max_length": 64,
        "max_prompt_length": 32,
        **options,
    }
    return prepare(DataSection(**more), tokenizer, 1000)


def test_repeats_are_filtered_and_counted_per_set(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    done = read(write, byte_tokenizer)
    assert list(done.train.ids) == [
        "first.jsonl:1",
        "first.jsonl:3",
        "first.jsonl:5",
        "second.jsonl:4",
    ]
    first, second = done.report["sets"]["train"]
    assert first["filtered"] == {
        "contradiction": {"count": 1, "examples": ["first.jsonl:4"]},
        "duplicate": {"count": 1, "examples": ["first.jsonl:2"]},
    }
    assert {reason: item["count"] for reason, item in second["filtered"].items()} == {
        "contradiction": 2,
        "duplicate": 1,
    }
    assert (first["kept"], second["kept"]) == (3, 1) and first["dropped"] == {}
    assert done.report["repeats"]["train"] == {"contradictions": 3, "duplicates": 2}
    assert done.train.sources.tolist() == [0, 0, 0, 1]


def test_repeats_can_be_kept(write: Write, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    done = read(write, byte_tokenizer, duplicates="keep", contradictions="keep")
    assert len(done.train) == 9 and done.report["repeats"]["train"] == {
        "contradictions": 3,
        "duplicates": 3,
    }
    assert len(read(write, byte_tokenizer, duplicates="keep").train) == 6
    assert len(read(write, byte_tokenizer, contradictions="keep").train) == 6


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "contradictions",
            r"data\.train: 3 pairs: contradiction \(the first: first\.jsonl:4, "
            r"second\.jsonl:2, .*data\.contradictions=drop",
        ),
        (
            "duplicates",
            r"data\.train: 2 pairs: duplicate \(the first: first\.jsonl:2, second\.jsonl:1\)",
        ),
    ],
)
def test_repeats_can_be_errors(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast, option: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(write, byte_tokenizer, **{option: "error"})


def test_validation_prompts_that_are_trained_on(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    held_out = [write("held.jsonl", [row("s", "1", "2"), row("u", "1", "2"), row("v", "1", "2")])]
    with pytest.raises(
        ValueError,
        match=r"data\.eval: 1 pairs: prompt is in the training sets \(the first: "
        r"held\.jsonl:1\).*data\.overlap=drop",
    ):
        read(write, byte_tokenizer, eval=held_out)
    done = read(write, byte_tokenizer, eval=held_out, overlap="drop")
    assert (
        list(done.eval.ids) == ["held.jsonl:2", "held.jsonl:3"]
        and done.report["shared_prompts"] == 0
    )
    assert (
        done.report["sets"]["eval"][0]["filtered"]["prompt is in the training sets"]["count"] == 1
    )
    kept = read(write, byte_tokenizer, eval=held_out, overlap="keep")
    assert (
        len(kept.eval) == 3
        and kept.report["shared_prompts"] == 1
        and "1 validation prompts are in the training" in kept.report["warnings"][0]
    )
    only = [write("only.jsonl", [row("s", "1", "2")])]
    with pytest.raises(ValueError, match=r"data\.eval=.*only\.jsonl: no valid pair is left"):
        read(write, byte_tokenizer, eval=only, overlap="drop")


def test_the_keys_travel_with_the_pairs(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    table = read(write, byte_tokenizer, duplicates="keep", contradictions="keep").train
    there, back = table[3], table[6]
    assert (
        there.pair_key[0] == back.pair_key[0]
        and there.pair_key[1] != back.pair_key[1]
        and (there.source, back.source) == (0, 1)
    )
    assert table.take(np.array([6]))[0].pair_key == back.pair_key
