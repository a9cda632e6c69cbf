import random
from collections.abc import Callable

import numpy as np
import pytest

from jaxdpo.data.formats.preference import Message, Preference
from jaxdpo.data.inspect.near_duplicates import (
    NearDuplicates,
    SignatureIndex,
    estimate_jaccard,
    jaccard,
    minhash,
    shingles,
)

WORDS = [
    first + second
    for first in "bcdfghklmnprstvw"
    for second in ("a", "ena", "ilo", "oru", "ume", "ist")
]


def text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def pair(prompt: str, chosen: str, rejected: str, **more: object) -> Preference:
    return Preference(prompt, chosen, rejected, **more)  # type: ignore[arg-type]


def search(
    records: list[Preference],
    held_out: Callable[[int], bool] = lambda _: False,
    threshold: float = 0.8,
) -> NearDuplicates:
    book = SignatureIndex()
    for record in records:
        book.add(record, *(shingles(str(answer)) for answer in (record.chosen, record.rejected)))
    keys = [record.pair_key for record in records]
    copies = np.array([key in keys[:place] for place, key in enumerate(keys)])
    return book.search(
        [f"r{i}" for i in range(len(records))],
        copies,
        np.array([held_out(i) for i in range(len(records))]),
        threshold,
    )


def others(count: int = 200) -> list[Preference]:
    """Pairs with nothing in common but their words."""
    return [pair(text(3 * i), text(3 * i + 1), text(3 * i + 2)) for i in range(count)]


def changed(words: str) -> str:
    """With one word of sixty exchanged, and other signs and letters."""
    first, _, rest = words.partition(" ")
    return f"{first.upper()}, " + rest.replace(rest.split()[30], "quite", 1) + "!"


def test_texts_with_nothing_in_common_are_no_near_duplicates() -> None:
    found = search(others(), held_out=lambda i: i % 5 == 0)
    assert (found.pairs.count, found.prompts.count, found.leaks.count) == (0, 0, 0)
    assert (found.pairs.total, found.prompts.total, found.leaks.total) == (160, 160, 40)
    assert not (*found.pairs.examples, *found.prompts.examples, *found.leaks.examples)


def test_planted_near_duplicates_are_found_and_named() -> None:
    rows = others(50)
    prompt, chosen, rejected = (
        str(part) for part in (rows[7].prompt, rows[7].chosen, rows[7].rejected)
    )
    rows += [
        pair(changed(prompt), changed(chosen), changed(rejected)),  # 50: almost pair 7
        pair(changed(prompt), text(901), text(902)),  # 51: the same prompt as 50, other answers
        pair(prompt, rejected, chosen),  # 52: pair 7 the other way round
        rows[7],  # 53: a copy
        pair(text(903), chosen, rejected),  # 54: the answers alone
    ]
    found = search(rows)
    (match,) = found.pairs.examples
    assert (match.id, match.other, found.pairs.count, found.pairs.same, found.pairs.total) == (
        "r50",
        "r7",
        1,
        1,
        55,
    )
    assert 0.8 <= match.similarity < 1
    assert [(match.id, match.other) for match in found.prompts.examples] == [
        ("r50", "r7")
    ] and found.prompts.total == 52


def test_validation_prompts_that_are_trained_on_are_leaks() -> None:
    rows = others(50)
    rows += [
        pair(changed(str(rows[3].prompt)), "a", "b"),
        pair(str(rows[4].prompt), "a", "b"),
        pair(text(904), "a", "b"),
    ]
    rows += [pair(changed(str(rows[3].prompt)), "c", "d")]  # a prompt counts once
    leaks = search(rows, held_out=lambda i: i >= 50).leaks
    assert (leaks.count, leaks.same, leaks.total) == (1, 1, 3)
    assert [(match.id, match.other) for match in leaks.examples] == [("r50", "r3")]


def test_a_validation_prompt_is_not_a_leak_for_being_like_another_one() -> None:
    prompt = text(1)
    rows = [*others(5), pair(prompt, "a", "b"), pair(changed(prompt), "a", "b")]
    assert search(rows, held_out=lambda i: i >= 5).leaks.count == 0
    assert search(rows).prompts.count == 1


def test_many_rows_of_one_template_are_all_found() -> None:
    rows = [pair(f"{text(5)} {number} {text(6)}", text(7), text(8)) for number in range(300)]
    found = search(rows)
    assert found.pairs.count == found.prompts.count == 299


def test_system_prompts_do_not_make_prompts_alike() -> None:
    system = Message("system", text(1, 300))
    rows = [Preference((system, Message("user", text(i, 12))), "a", "b") for i in range(10, 15)]
    assert search(rows).prompts.count == 0


@pytest.mark.parametrize(
    ("a", "b", "alike"),
    [
        ("One two, three!", "one two three", 1.0),
        ("one two three four", "one two three five", 1 / 3),
        ("yes", "no", 0.0),
        ("", "", 1.0),
        ("?!", "...", 0.0),
        ("今天天气很好吗", "今天天气很好", 4 / 5),
        ("3 + 4 =", "3 - 4 =", 1.0),  # signs do not count
        ("\ud83d x", "\ud83d x", 1.0),
    ],
)
def test_jaccard_index_of_two_texts(a: str, b: str, alike: float) -> None:
    assert jaccard(shingles(a), shingles(b)) == pytest.approx(alike)


def test_minhash_estimates_the_jaccard_index() -> None:
    """Texts with 0, 1, ... common sentences of 20.

    The estimate is within five standard deviations, and right on average.
    """
    errors = []
    for seed in range(200):
        kept = seed % 21
        words = [text(seed * 100 + place, 15) for place in range(20)]
        changes = [text(seed * 100 + place + 50, 15) for place in range(20)]
        a, b = (shingles(" ".join(part)) for part in (words, words[:kept] + changes[kept:]))
        share = jaccard(a, b)
        error = (
            float(
                estimate_jaccard(np.stack([minhash(a), minhash(b)]), np.array([0]), np.array([1]))[
                    0
                ]
            )
            - share
        )
        assert abs(error) <= 5 * np.sqrt(share * (1 - share) / 120) + 1e-9
        errors.append(error)
    assert abs(np.mean(errors)) < 0.01


def test_the_signature_of_a_long_text_is_that_of_its_parts() -> None:
    runs = shingles(text(1, 40_000))
    assert len(runs) > 1 << 14
    np.testing.assert_array_equal(
        minhash(runs), np.minimum(minhash(runs[:100]), minhash(runs[100:]))
    )
