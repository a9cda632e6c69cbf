import dataclasses
import itertools

import numpy as np
import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.loader import Loader
from jaxdpo.data.packing import balance
from tests.tiny import pair, pairs
from tests.tiny import table as make_table


def loader(
    count: int = 10, *, batch_size: int = 4, num_rows: int = 1, seed: int = 0, **options: object
) -> Loader:
    section = DataSection(**{"max_length": 100, "packed_length": 256, **options})  # type: ignore[arg-type]
    table = make_table(pairs(count))
    return Loader.create(table, section, batch_size=batch_size, num_rows=num_rows, seed=seed)


def seen(some: Loader, steps: range) -> list[int]:
    return [int(i) for step in steps for i in some.pairs_of(step)]


def test_an_epoch_visits_every_pair_once_and_its_last_step_holds_the_rest() -> None:
    some = loader()
    assert some.steps_per_epoch == 3
    assert [len(some.pairs_of(step)) for step in range(1, 7)] == [4, 4, 2, 4, 4, 2]
    first, second = seen(some, range(1, 4)), seen(some, range(4, 7))
    assert (
        sorted(first) == sorted(second) == list(range(10))
        and first != second != list(range(10)) != first
    )


def test_the_order_follows_from_the_seed_alone() -> None:
    assert seen(loader(), range(1, 9)) == seen(loader(num_rows=2, share_prefix=False), range(1, 9))
    assert seen(loader(), range(1, 4)) != seen(loader(seed=1), range(1, 4))
    assert seen(loader(shuffle=False), range(1, 7)) == [*range(10), *range(10)]


def test_steps_per_epoch_at_the_edges() -> None:
    assert [loader(count).steps_per_epoch for count in (1, 4, 5)] == [1, 1, 2]


def test_epoch_counts_pairs() -> None:
    assert [loader().epoch(step) for step in (0, 1, 2, 3, 4)] == [0, 0.4, 0.8, 1, 1.4]


def test_a_stream_from_any_step_gives_that_steps_batches() -> None:
    some = loader()
    for first in (1, 3, 5):
        got = list(some.stream(first, 7))
        assert len(got) == 8 - first
        for step, batch in zip(range(first, 8), got, strict=True):
            for ours, theirs in zip(batch, some.batch(step), strict=True):
                np.testing.assert_array_equal(ours, theirs)
                assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_batch_holds_exactly_the_pairs_of_its_step(share_prefix: bool, num_rows: int) -> None:
    some = loader(share_prefix=share_prefix, num_rows=num_rows)
    for step in range(1, 5):
        batch, chosen = some.batch(step), some.pairs_of(step)
        index = batch.index_MBP[batch.index_MBP >= 0]
        assert sorted(index) == list(range(len(chosen)))
        lengths = batch.lengths_MBP2[batch.index_MBP >= 0][np.argsort(index)]
        assert lengths.tolist() == some.table.lengths[chosen, 1:].tolist()
        assert (
            batch.index_MBP.shape[2] == 4
        )  # indices do not follow the step's pairs: one program for the short last step too
        assert some.num_tokens(step) == np.sum(
            batch.tokens_MBT != 0
        )  # the ids of these pairs are never 0
        assert batch.tokens_MBT.shape[2] in some.packer.packed_lengths


def test_packed_lengths_suit_the_pairs() -> None:
    some = loader(40, batch_size=1, num_packed_lengths=3)
    sizes = some.packer.packed_lengths
    assert sizes == (64, 128, 256)  # no pair of these has more than 117 tokens
    assert loader(40, num_packed_lengths=1).packer.packed_lengths == (256,)
    taken = [some.batch(step).tokens_MBT.shape[2] for step in range(1, 41)]
    assert set(taken) == set(sizes[:-1])  # the longest is only there for pairs yet to come


def test_every_step_fits_the_packed_lengths_although_only_some_were_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jaxdpo.data.loader.SAMPLED_STEPS", 2)
    some = loader(30, batch_size=3, num_packed_lengths=2)
    for step in range(1, 21):
        loads = balance(some._sizes[some.pairs_of(step)].tolist(), 1, 256)
        assert some.batch(step).tokens_MBT.shape[0] == len(loads)


def test_pairs_too_long_for_packing_are_refused_at_once() -> None:
    table = make_table([pair(60, 60, 60), pair(100, 100, 100)])
    section = DataSection(max_length=100, packed_length=256)
    with pytest.raises(
        ValueError, match=r"data.packed_length=256: a pair needs 300 token positions"
    ):
        Loader.create(table, section, batch_size=1, num_rows=1, seed=0)


def test_weights_and_ids_reach_the_batch() -> None:
    weighted = [
        dataclasses.replace(one, weight=weight)
        for one, weight in zip(pairs(3), (0.5, 2.0, 1.0), strict=True)
    ]
    section = DataSection(max_length=100, packed_length=256, shuffle=False)
    some = Loader.create(make_table(weighted), section, batch_size=3, num_rows=1, seed=0)
    batch = some.batch(1)
    by_place = dict(
        zip(batch.index_MBP.ravel().tolist(), batch.weights_MBP.ravel().tolist(), strict=True)
    )
    assert [by_place[i] for i in range(3)] == [0.5, 2.0, 1.0]


def test_a_thousand_epochs_use_a_thousand_orders() -> None:
    some = loader(5, batch_size=5)
    orders = {tuple(some.pairs_of(step).tolist()) for step in range(1, 1001)}
    assert orders == set(itertools.permutations(range(5)))


def mixed(weights: list[float], **options: object) -> Loader:
    """A loader of a set of 30 pairs (indices 0 to 29) and one of 10."""
    section = DataSection(
        **{
            "max_length": 100,
            "packed_length": 256,
            "train": ["a", "b"],
            "weights": weights,
            **options,
        }
    )  # type: ignore[arg-type]
    both = [dataclasses.replace(some, source=int(i >= 30)) for i, some in enumerate(pairs(40))]
    return Loader.create(make_table(both), section, batch_size=8, num_rows=1, seed=0)


@pytest.mark.parametrize(
    ("weights", "visits"),
    [([1, 1], (20, 20)), ([3, 1], (30, 10)), ([9, 1], (36, 4)), ([0.5, 1], (13, 27))],
)
def test_a_mix_gives_each_set_its_share_of_every_epoch(
    weights: list[float], visits: tuple[int, int]
) -> None:
    some = mixed(weights)
    assert some.steps_per_epoch == 5
    for epoch in range(3):
        indices = np.array(seen(some, range(5 * epoch + 1, 5 * epoch + 6)))
        assert ((indices < 30).sum(), (indices >= 30).sum()) == visits


def test_a_mixed_set_goes_on_where_the_last_epoch_stopped() -> None:
    indices = np.array(seen(mixed([1, 1]), range(1, 16)))
    first, second = indices[indices < 30], indices[indices >= 30]
    assert np.bincount(first).tolist() == [2] * 30, "three epochs of 20 are two passes over 30"
    assert np.bincount(second)[30:].tolist() == [6] * 10
    assert len(set(first[:20])) == 20 and set(first[:40]) == set(range(30)), (
        "the second epoch sees first what the first one did not"
    )
    assert (
        seen(mixed([1, 1]), range(1, 16)) == indices.tolist() != seen(mixed([3, 1]), range(1, 16))
    )


def test_a_mix_without_shuffling_spreads_each_set_evenly() -> None:
    indices = seen(mixed([1, 1], shuffle=False), range(1, 3))
    assert [place >= 30 for place in indices] == [False, True] * 8 and indices[::2] == list(
        range(8)
    )


def test_a_mix_of_a_set_without_pairs_is_refused() -> None:
    section = DataSection(max_length=100, packed_length=256, train=["a", "b"], weights=[1, 2])
    with pytest.raises(
        ValueError, match=r"data\.weights=\[1, 2\]: set 2 of data\.train has no training pair"
    ):
        Loader.create(make_table(pairs(4)), section, batch_size=4, num_rows=1, seed=0)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_processes_read_disjoint_parts_of_the_steps_pairs_in_every_epoch(hosts: int) -> None:
    table = make_table(pairs(30))
    section = DataSection(max_length=128, packed_length=256, num_packed_lengths=2)

    def feeding(mine: frozenset[int] | None) -> Loader:
        return Loader.create(table, section, batch_size=7, num_rows=4, seed=3, mine=mine)

    whole, share = feeding(None), 4 // hosts
    parts = [feeding(frozenset(range(host * share, (host + 1) * share))) for host in range(hosts)]
    for step in (
        1,
        5,
        whole.steps_per_epoch + 3,
    ):  # the last is in epoch 2: a loader that starts there needs nothing from before
        batch, fed = whole.batch(step), [part.batch(step) for part in parts]
        for name, array in batch._asdict().items():
            together = np.concatenate(
                [
                    getattr(one, name)[:, sorted(part.mine or ())]
                    for one, part in zip(fed, parts, strict=True)
                ],
                axis=1,
            )
            np.testing.assert_array_equal(together, array, err_msg=name)
        indices = [one.index_MBP[one.lengths_MBP2[..., 0] > 0].tolist() for one in fed]
        assert sorted(itertools.chain(*indices)) == list(range(len(whole.pairs_of(step)))), (
            "disjoint, and all of them"
        )


@pytest.mark.parametrize("weights", [[1, 1], [1, 9], [0.1, 1]])
@pytest.mark.parametrize("shuffle", [True, False])
def test_visited_groups_hold_each_pair_of_any_epoch_once(
    weights: list[float], shuffle: bool
) -> None:
    some = mixed(weights, shuffle=shuffle)
    for last in (1, 5, 15):
        groups = some.visited(last)
        of_groups = [int(i) for group in groups for i in group]
        assert len(of_groups) == len(set(of_groups))
        assert set(of_groups) == set(seen(some, range(1, last + 1)))
        assert max(len(group) for group in groups) <= some.batch_size
    first_epoch = set(seen(some, range(1, 6)))
    assert set(of_groups) > first_epoch  # the later epochs visit others


def test_visited_groups_of_a_plain_run_are_the_steps_of_its_first_epoch() -> None:
    some = loader()
    for group, step in zip(some.visited(99), range(1, 4), strict=True):
        assert group.tolist() == some.pairs_of(step).tolist()
    assert len(some.visited(2)) == 2
