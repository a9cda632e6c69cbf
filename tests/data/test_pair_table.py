import dataclasses

import numpy as np
import pytest

from jaxdpo.data.pair_table import EncodedPair
from tests.tiny import table as make_table


def pair(
    prompt: list[int], chosen: list[int], rejected: list[int], **options: object
) -> EncodedPair:
    return EncodedPair(*(np.array(ids, np.int32) for ids in (prompt, chosen, rejected)), **options)  # type: ignore[arg-type]


PAIRS = [
    pair(
        [1, 2],
        [3],
        [4, 5],
        id="a",
        weight=0.5,
        truncated_prompt=True,
        ended_rejected=True,
        prompt_key=2**64 - 1,
    ),
    pair([6], [7, 8, 9], [10], id="b", truncated_rejected=True, prompt_key=7),
    pair([11, 12, 13], [14], [15], id="c", ended_chosen=True, ended_rejected=True, prompt_key=7),
]


def test_pairs_come_back_as_they_went_in() -> None:
    table = make_table(iter(PAIRS))
    assert len(table) == 3
    for index, pair in enumerate(PAIRS):
        found, expected = (
            table[index],
            dataclasses.replace(
                pair, chosen_mask=pair.answers[0][1], rejected_mask=pair.answers[1][1]
            ),
        )
        assert {name: str(value) for name, value in vars(found).items()} == {
            name: str(value) for name, value in vars(expected).items()
        }
        assert found.prompt_ids.dtype == np.int32 and np.shares_memory(
            found.prompt_ids, table.columns["tokens"]
        )
    assert table.lengths.tolist() == [[2, 1, 2], [1, 3, 1], [3, 1, 1]]
    assert [len(table[i]) for i in range(3)] == [5, 5, 5]
    with pytest.raises(IndexError):
        table[3]


def test_taking_pairs_shares_the_tokens() -> None:
    table = make_table(PAIRS)
    for index in (np.array([2, 0]), np.array([True, False, True])):
        taken = table.take(index)
        assert sorted(taken.ids) == ["a", "c"] and taken.columns is table.columns
    assert table.take(np.array([2, 0]))[0].chosen_ids.tolist() == [14]


def test_the_fingerprint_sees_tokens_order_boundaries_and_weights() -> None:
    table = make_table(PAIRS)
    others = [
        PAIRS[::-1],
        [pair([1], [2, 3], [4, 5], weight=0.5), *PAIRS[1:]],
        [pair([1, 2], [3], [4, 5], weight=1.0), *PAIRS[1:]],
        [pair([1, 2], [3], [4, 6], weight=0.5), *PAIRS[1:]],
        PAIRS[:2],
    ]
    prints = {make_table(pairs).fingerprint() for pairs in others}
    assert len(prints | {table.fingerprint()}) == 6
    assert table.take(np.array([0, 1])).fingerprint() == make_table(PAIRS[:2]).fingerprint()


def test_statistics() -> None:
    found = make_table(PAIRS).statistics()
    assert (found["pairs"], found["prompts"], found["tokens"]) == (3, 2, 15)
    assert found["truncated"] == {"prompt": 1, "chosen": 0, "rejected": 1}
    assert found["length"]["prompt"] == {"p50": 2, "p95": 3, "max": 3}
    assert (found["chosen_longer"], found["equal_length"], found["ended"]) == (0.3333, 0.3333, 0.5)


def test_an_empty_table() -> None:
    table = make_table([])
    assert len(table) == 0 and table.lengths.shape == (0, 3)
    found = table.take(np.zeros(0, bool)).statistics()
    assert (
        found["pairs"] == 0
        and found["chosen_longer"] is None
        and found["length"]["chosen"]["max"] == 0
    )
