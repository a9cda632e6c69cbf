"""FLOPs of a step, counted by hand."""

import dataclasses

import numpy as np
import pytest

from jaxdpo.models.flops import step_flops
from tests.families import tiny
from tests.tiny import model

LENGTHS = np.array([[3, 2, 1]])


def test_a_small_step_counted_by_hand() -> None:
    """D 32, N 4, K 2, H 8, F 48, V 64, two layers; 6 tokens, 3 of them loss tokens."""
    layer = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48
    body, head = 2 * layer * 6, 64 * 32 * 3
    keys = (9 + 4 + 1) / 2 + 3 * 3
    scores = 2 * 2 * 4 * 8 * keys
    for full, live, factor in (
        (True, True, 8),
        (True, False, 6),
        (False, True, 6),
        (False, False, 4),
    ):
        wanted = (
            factor * (body + head) + (8 if live else 6) * scores
        )  # attention has no weights of its own
        assert step_flops(model(), LENGTHS, full=full, live_reference=live) == pytest.approx(wanted)


def test_only_the_experts_of_a_token_count() -> None:
    moe = tiny("mixtral")
    more = dataclasses.replace(moe, num_experts=8)
    router = 8 * 4 * moe.num_layers * moe.hidden_size * LENGTHS.sum()
    one, other = (
        step_flops(config, LENGTHS, full=True, live_reference=True) for config in (moe, more)
    )
    assert other - one == pytest.approx(router)
    gpt2 = tiny("gpt2")
    assert step_flops(gpt2, LENGTHS, full=True, live_reference=True) < step_flops(
        dataclasses.replace(gpt2, gated=True), LENGTHS, full=True, live_reference=True
    )
