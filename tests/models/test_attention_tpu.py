"""Splash attention, interpreted on the CPU, equals `dense` in value and gradient."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models.attention import dense
from jaxdpo.models.attention_inputs import Inputs
from jaxdpo.models.attention_tpu import _tables, splash
from tests.models.test_attention import any_intervals, inputs, packed_intervals, value_and_grads

interpreted: Callable = functools.partial(splash, 8**-0.5, interpret=True)
wanted: Callable = functools.partial(dense, 8**-0.5)


def close(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=3e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize(
    ("T", "packed"),
    [
        pytest.param(320, True, id="packed"),
        pytest.param(300, False, id="any", marks=pytest.mark.slow),
    ],
)
def test_splash_equals_dense_in_value_and_gradient(T: int, packed: bool) -> None:
    bounds = packed_intervals(T) if packed else any_intervals(T)
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])
    for cap, sink in ((None, None), (5.0, sinks)):
        ours = value_and_grads(
            lambda *args, cap=cap, sink=sink: interpreted(cap, *args, sink), inputs(T), bounds
        )
        theirs = value_and_grads(
            lambda q, k, v, start, end, cap=cap, sink=sink: wanted(
                cap, Inputs(q, k, v, start, end, None, sink)
            ),
            inputs(T),
            bounds,
        )
        close(ours, theirs)


def test_queries_may_be_a_shard_of_the_sequence() -> None:
    q, k, v = inputs(256)
    start, end = any_intervals(256)
    part = slice(128, 256)
    close(
        [np.asarray(interpreted(None, q[:, part], k, v, start[:, part], end[:, part], None))],
        [np.asarray(wanted(None, Inputs(q, k, v, start, end, None, None)))[:, part]],
    )


def test_blocks_outside_all_intervals_are_skipped() -> None:
    start = jnp.asarray(np.repeat([0, 0, 256, 384], 128), jnp.int32)
    by_query, by_key = _tables(
        start, jnp.asarray(np.repeat([128, 256, 384, 512], 128), jnp.int32), 128, 4
    )
    visited = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for table, blocks in ((by_query, np.arange(4)[None, :]), (by_key, np.arange(4)[:, None])):
        np.testing.assert_array_equal(np.asarray(table.block_mask)[0], visited)
        loaded = np.asarray(table.data_next)[0]
        np.testing.assert_array_equal(
            loaded[visited > 0], np.broadcast_to(blocks, (4, 4))[visited > 0]
        )
        along = loaded if table is by_query else loaded.T
        seen = visited if table is by_query else visited.T
        for row, mask in zip(along, seen, strict=True):
            assert set(row) <= set(np.flatnonzero(mask))  # nothing is loaded that is not used


def test_sequences_too_long_for_packed_intervals_are_refused() -> None:
    q, k, v = inputs(1 << 15, B=1, N=1, K=1, H=1)
    with pytest.raises(
        ValueError,
        match=r"model.attention=splash: takes packed sequences of less than 32768 tokens",
    ):
        interpreted(None, q, k, v, *any_intervals(1 << 15, B=1), None)
