"""What a compiled step must never hold in memory."""

import re
from typing import Any

import numpy as np
import pytest

from tests.tiny import Setup, Stepper, model, pack, pairs

T, V, CHUNK = 640, 1009, 64


def shapes_of(text: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([0-9,]+)\]", text)}


def too_large(shapes: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Logits of more tokens than a chunk, and arrays of slots by slots."""
    logits = {dims for dims in shapes if V in dims and np.prod(dims, dtype=int) // V > CHUNK}
    return logits | {dims for dims in shapes if sum(dim >= T for dim in dims if dim != V) > 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "fine"),
    [({}, True), ({"remat": "full"}, True), ({"chunk": T}, False), ({"attention": "dense"}, False)],
    ids=str,
)
def test_neither_all_logits_nor_an_attention_mask_exist(change: dict[str, Any], fine: bool) -> None:
    run = Stepper(Setup(config=model(vocab_size=V), size=T, **{"chunk": CHUNK, **change}))
    batch = run.put(pack(pairs(8, low=30, high=31), size=T))
    assert batch.tokens_MBT.shape == (2, 1, T)
    arguments = (run.state, run.frozen, batch, np.asarray(True))
    traced = shapes_of(str(run.train_step.trace(*arguments).jaxpr))
    assert (1, CHUNK, V) in traced or not fine
    assert (not too_large(traced)) is fine, too_large(traced)
    if change == {}:
        assert not too_large(shapes_of(run.train_step.lower(*arguments).compile().as_text()))
