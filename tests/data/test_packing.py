import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.config.data_options import LENGTH_MULTIPLE
from jaxdpo.data.packing import (
    Batch,
    Packer,
    balance,
    choose_packed_lengths,
    pair_length,
)
from jaxdpo.data.pair_table import EncodedPair
from tests.tiny import pair, pairs

LENGTHS = st.tuples(*[st.integers(1, 30)] * 3)


def rows_of(batch: Batch) -> Iterator[Batch]:
    """The rows of all microbatches, as Batches without M and B."""
    for m, b in np.ndindex(*batch.tokens_MBT.shape[:2]):
        yield Batch(*(array[m, b] for array in batch))


def seen(row: Batch, slot: int) -> tuple[list[int], list[int]]:
    """Positions and ids of what a slot attends to, in order of position."""
    visible = slice(row.k_start_MBT[slot], row.k_end_MBT[slot])
    order = np.argsort(row.positions_MBT[visible], kind="stable")
    return row.positions_MBT[visible][order].tolist(), row.tokens_MBT[visible][order].tolist()


def check_row(row: Batch, some: list[EncodedPair], share_prefix: bool) -> list[int]:
    """Everything that the model relies on; returns which pairs of the step the row has."""
    scored = 0
    for place, index in enumerate(row.index_MBP):
        if index < 0:
            assert row.weights_MBP[place] == 0 and not row.lengths_MBP2[place].any()
            continue
        mine = some[index]
        assert row.weights_MBP[place] == np.float32(mine.weight) and row.margins_MBP[
            place
        ] == np.float32(mine.margin)
        assert row.lengths_MBP2[place].tolist() == [mask.sum() for _, mask in mine.answers]
        shorter = row.lengths_MBP2[place].min()
        for side, (answer, mask) in enumerate(mine.answers):
            places = np.flatnonzero(row.sides_MBS == 2 * place + side)
            assert row.targets_MBS[places].tolist() == answer[mask].tolist()
            assert row.common_MBS[places].tolist() == [int(i < shorter) for i in range(mask.sum())]
            whole = [*mine.prompt_ids.tolist(), *answer.tolist()]
            for i, slot in zip(np.flatnonzero(mask), row.slots_MBS[places], strict=True):
                before = len(mine.prompt_ids) + i
                assert row.positions_MBT[slot] == before - 1
                assert seen(row, slot) == (list(range(before)), whole[:before])
            scored += mask.sum()
    assert (row.sides_MBS[:scored] >= 0).all() and (row.sides_MBS[scored:] == -1).all()
    real = [int(i) for i in row.index_MBP if i >= 0]
    check_slots(row, sum(pair_length(some[i], share_prefix) for i in real))
    return real


def check_slots(row: Batch, filled: int) -> None:
    """Every token sees itself; a real one exactly the positions up to its own, padding no other."""
    for slot in range(len(row.tokens_MBT)):
        assert row.k_start_MBT[slot] <= slot < row.k_end_MBT[slot]
        if slot < filled:
            assert seen(row, slot)[0] == list(range(row.positions_MBT[slot] + 1))
        else:
            assert (row.k_start_MBT[slot], row.k_end_MBT[slot]) == (
                slot,
                slot + 1,
            ) and row.tokens_MBT[slot] == 0


@pytest.mark.parametrize("share_prefix", [True, False])
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=7),
    num_rows=st.integers(1, 3),
    spare=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_packing_predicts_every_loss_token_from_exactly_what_comes_before_it(
    share_prefix: bool, lengths: list[tuple[int, int, int]], num_rows: int, spare: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    some = [
        pair(*sizes, rng=rng, weight=float(rng.random() + 0.5), margin=float(rng.random()))
        for sizes in lengths
    ]
    masked = [
        dataclasses.replace(item, rejected_mask=rng.random(len(item.rejected_ids)) < 0.6)
        for item in some
    ]
    some = [item if seed % 2 else other for item, other in zip(some, masked, strict=True)]
    packer = Packer(
        share_prefix=share_prefix,
        num_rows=num_rows,
        packed_lengths=(64, 120),
        max_pairs=len(some) + spare,
    )
    batch = packer(some)
    assert batch.tokens_MBT.shape[1] == num_rows and batch.tokens_MBT.shape[2] in (64, 120)
    floats = ("weights_MBP", "margins_MBP")
    assert all(
        array.dtype == (np.float32 if name in floats else np.int32)
        for name, array in batch._asdict().items()
    )
    found = [index for row in rows_of(batch) for index in check_row(row, some, share_prefix)]
    assert sorted(found) == list(range(len(some)))


def test_prefix_sharing_written_out() -> None:
    prompt, chosen, rejected = (
        np.array(part, np.int32) for part in ([11, 12, 13], [21, 22], [31, 32, 33])
    )
    (row,) = rows_of(
        Packer(share_prefix=True, num_rows=1, packed_lengths=(10,), max_pairs=1)(
            [EncodedPair(prompt, chosen, rejected)]
        )
    )
    assert row.tokens_MBT.tolist() == [22, 21, 11, 12, 13, 31, 32, 33, 0, 0]
    assert row.positions_MBT.tolist() == [4, 3, 0, 1, 2, 3, 4, 5, 0, 0]
    assert row.k_start_MBT.tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 8, 9]
    assert row.k_end_MBT.tolist() == [5, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert row.slots_MBS[:5].tolist() == [4, 1, 4, 5, 6]
    assert row.sides_MBS.tolist() == [0, 0, 1, 1, 1, *[-1] * 5]
    assert row.common_MBS[:5].tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_packing_reads_only_the_pairs_of_a_process_own_sequences(share_prefix: bool) -> None:
    packer = Packer(share_prefix=share_prefix, num_rows=4, packed_lengths=(64, 160), max_pairs=24)
    some = pairs(24)
    whole, taken = packer(some), []
    for own in ({0, 1}, {2}, {3}):
        watched = [Watched(item.prompt_ids) for item in some]
        reads = [
            dataclasses.replace(item, prompt_ids=prompt)
            for item, prompt in zip(some, watched, strict=True)
        ]
        part = packer(reads, own)
        for name, array in part._asdict().items():
            others = array[:, [row for row in range(4) if row not in own]]
            np.testing.assert_array_equal(
                array[:, sorted(own)], getattr(whole, name)[:, sorted(own)], err_msg=name
            )
            assert (
                name in ("index_MBP", "k_start_MBT", "k_end_MBT", "sides_MBS") or not others.any()
            )
        np.testing.assert_array_equal(part.index_MBP, whole.index_MBP)
        taken.append({i for i, prompt in enumerate(watched) if prompt.read})
    assert sorted(itertools.chain(*taken)) == list(range(24)), "each pair is read by one process"


class Watched:
    """Token ids that tell whether they were read."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.read = ids, False

    def __len__(self) -> int:
        return len(self.ids)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        self.read = True
        return self.ids


@pytest.mark.parametrize(("share_prefix", "slots"), [(True, 5 + 7 + 9), (False, 2 * 5 + 7 + 9)])
def test_a_pair_longer_than_a_packed_sequence_is_an_error(share_prefix: bool, slots: int) -> None:
    exact = Packer(share_prefix=share_prefix, num_rows=1, packed_lengths=(slots,), max_pairs=1)
    assert exact([pair(5, 7, 9)]).tokens_MBT.shape == (1, 1, slots)
    short = Packer(share_prefix=share_prefix, num_rows=1, packed_lengths=(slots - 1,), max_pairs=1)
    with pytest.raises(
        ValueError, match=rf"data.packed_length={slots - 1}: a pair needs {slots} token positions"
    ):
        short([pair(5, 7, 9)])


def test_the_packed_length_is_the_shortest_that_holds_the_fullest_sequence() -> None:
    packer = Packer(share_prefix=True, num_rows=1, packed_lengths=(64, 128, 256), max_pairs=8)
    assert [packer([pair(10, size, 10)]).tokens_MBT.shape for size in (44, 45, 109)] == [
        (1, 1, 64),
        (1, 1, 128),
        (1, 1, 256),
    ]


def test_more_tokens_than_a_microbatch_holds_take_gradient_accumulation() -> None:
    some = pairs(9, low=18, high=21)
    shapes = [
        Packer(share_prefix=True, num_rows=n, packed_lengths=(128,), max_pairs=9)(
            some
        ).tokens_MBT.shape
        for n in (1, 2, 4)
    ]
    assert shapes == [(5, 1, 128), (3, 2, 128), (2, 4, 128)]


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    num_rows=st.integers(1, 5),
    max_slots=st.integers(50, 120),
)
def test_balance_keeps_every_item_and_every_limit(
    sizes: list[int], num_rows: int, max_slots: int
) -> None:
    rows = balance(sizes, num_rows, max_slots)
    loads = [sum(sizes[i] for i in row) for row in rows]
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    assert len(rows) % num_rows == 0 and max(loads) <= max_slots
    assert max(loads) - min(loads) <= max(
        sizes
    )  # longest first: no row is ahead by more than one item
    assert rows == balance(sizes, num_rows, max_slots)
    fewer = len(rows) - num_rows
    if fewer:  # one microbatch less would not have held them, laid out in this way or in any
        assert sum(sizes) > fewer * max_slots or fewer * max_slots - sum(sizes) < fewer * max(sizes)


def test_balance_of_items_that_divide_evenly() -> None:
    rows = balance([5, 4, 3, 3, 2, 1], 2, 100)
    assert [sum((5, 4, 3, 3, 2, 1)[i] for i in row) for row in rows] == [9, 9]
    with pytest.raises(ValueError, match="a pair needs 5 token positions"):
        balance([1, 5], 1, 4)


def slots_taken(loads: list[int], sizes: tuple[int, ...]) -> int:
    return sum(min(size for size in sizes if size >= load) for load in loads)


@given(
    loads=st.lists(st.integers(1, 500), min_size=1, max_size=12),
    count=st.integers(1, 4),
    longest=st.sampled_from([500, 512, 700]),
)
@settings(deadline=None)
def test_no_other_packed_lengths_waste_less_padding(
    loads: list[int], count: int, longest: int
) -> None:
    sizes = choose_packed_lengths(loads, count, longest)
    assert sizes[-1] == longest and len(sizes) <= count and list(sizes) == sorted(set(sizes))
    below = range(LENGTH_MULTIPLE, longest, LENGTH_MULTIPLE)
    assert set(sizes[:-1]) <= set(below)
    others = (combination for n in range(count) for combination in itertools.combinations(below, n))
    assert slots_taken(loads, sizes) == min(
        slots_taken(loads, (*other, longest)) for other in others
    )
