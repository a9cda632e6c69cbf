"""Logits and router load of every family equal transformers' (torch, float32).

For plain and for packed sequences.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.data.packing import Batch
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward, forward_moe, logits
from jaxdpo.models.hf.families import FAMILIES
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.moe import balance_loss
from jaxdpo.models.params import Params
from jaxdpo.training.completion_logps import token_mask
from tests.families import TINY
from tests.theirs import CASES, Both, logits_of, make, padded, raw_of, read
from tests.tiny import pack, pairs

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4
VOCAB, SLOTS = 96, 384
PAIRS = pairs(6, low=3, high=24, vocab=VOCAB)
ANSWERED = [
    np.concatenate([pair.prompt_ids, answer])
    for pair in PAIRS
    for answer in (pair.chosen_ids, pair.rejected_ids)
]
LONG = np.random.default_rng(1).integers(1, VOCAB, 100).astype(np.int32)
Slots = tuple[Any, Any, Any, Any]
"""Tokens, positions and intervals [B, T], as `forward` takes them."""


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return make(tmp_path_factory.mktemp("model"), request.param)


@functools.partial(jax.jit, static_argnames=("config", "attention"))
def compute(params: Params, slots: Slots, config: ModelConfig, attention: str) -> jax.Array:
    options = ForwardOptions(attention=attention)
    return logits(params, config, forward(params, config, *slots, options), options)


def our_logits(model: Both, slots: Slots, attention: str = "dense") -> np.ndarray:
    """Logits [T, V] of the first sequence."""
    return np.asarray(
        compute(model.params, tuple(map(jnp.asarray, slots)), model.config, attention)
    )[0]


def plain(row: np.ndarray) -> Slots:
    """One causal sequence, then padding that sees itself."""
    slots = np.arange(SLOTS, dtype=np.int32)[None]
    inside = slots < len(row)
    tokens = np.zeros_like(slots)
    tokens[0, : len(row)] = row
    return tokens, np.where(inside, slots, 0), np.where(inside, 0, slots), slots + 1


def close(ours: np.ndarray, theirs: np.ndarray, what: str = "") -> None:
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0, err_msg=what)


def packed(share_prefix: bool) -> tuple[Batch, Slots]:
    """PAIRS in one packed sequence."""
    batch = pack(PAIRS, share_prefix=share_prefix, size=SLOTS)
    assert batch.tokens_MBT.shape == (1, 1, SLOTS)
    return batch, tuple(
        x[0] for x in (batch.tokens_MBT, batch.positions_MBT, batch.k_start_MBT, batch.k_end_MBT)
    )


def answer_slots(batch: Batch) -> list[np.ndarray]:
    """Indices of the tokens that predict each completion, in the order of ANSWERED."""
    sides = batch.sides_MBS[0, 0]
    places = {int(index): place for place, index in enumerate(batch.index_MBP[0, 0])}
    return [
        batch.slots_MBS[0, 0][sides == 2 * places[number // 2] + number % 2]
        for number in range(len(ANSWERED))
    ]


@pytest.mark.parametrize("attention", ["dense", "blocks"])
def test_logits_equal_transformers_in_plain_and_packed_sequences(
    both: Both, attention: str
) -> None:
    *answered, long = both.logits([*ANSWERED, LONG])
    assert np.abs(long).max() > 2
    close(our_logits(both, plain(LONG), attention)[: len(LONG)], long)
    if both.config.sliding_window is not None:
        longest = (
            max(len(pair.prompt_ids) for pair in PAIRS),
            max(len(pair.chosen_ids) for pair in PAIRS),
        )
        assert min(longest) > 2 * both.config.sliding_window, (
            "the window cuts neither prompts nor answers"
        )
    for share_prefix in (True, False):
        batch, slots = packed(share_prefix)
        ours = our_logits(both, slots, attention)
        for number, (places, alone) in enumerate(zip(answer_slots(batch), answered, strict=True)):
            begin = len(PAIRS[number // 2].prompt_ids) - 1
            close(ours[places], alone[begin:-1], f"share_prefix {share_prefix} {number}")


def test_every_weight_matters(both: Both) -> None:
    """A weight in another order gives other logits, by far more than the tolerance above."""
    leaves, tree = jax.tree.flatten(both.params)
    exact = our_logits(both, plain(LONG))
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(both.params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("k_bias") and both.config.positions == "learned":
            continue  # without rope it adds the same to all scores of a query
        changed = jax.tree.unflatten(
            tree, [*leaves[:number], jnp.roll(leaf, 1, axis=-1), *leaves[number + 1 :]]
        )
        other = our_logits(dataclasses.replace(both, params=changed), plain(LONG))
        assert np.abs(other - exact)[: len(LONG)].max() > 1000 * TOLERANCE, name


@pytest.mark.parametrize(
    "both", [case for case in CASES if "num_experts_per_tok" in raw_of(case)], indirect=True
)
def test_router_load_equals_transformers(both: Both) -> None:
    """Over all tokens of a packed sequence without padding; transformers gets them padded."""
    batch, slots = packed(False)
    run = jax.jit(forward_moe, static_argnames=("config", "options"))
    load = run(both.params, both.config, *slots, ForwardOptions(), token_mask(batch)[0])[1]
    assert load is not None and load.tokens == both.config.num_layers * sum(map(len, ANSWERED))
    ids, mask = padded(ANSWERED)
    with torch.no_grad():
        theirs = both.model(ids, attention_mask=mask, output_router_logits=True).aux_loss.item()
    assert theirs > 1.005 * both.config.experts_per_token, "the load is even"
    np.testing.assert_allclose(balance_loss(load), theirs, rtol=1e-5)


def test_bfloat16_folder_is_read_exactly(tmp_path: Path) -> None:
    made = make(tmp_path, "gpt_oss")
    made.model.to(torch.bfloat16).save_pretrained(tmp_path)
    params = load_params(tmp_path, made.config, None, "float32")
    close(
        our_logits(dataclasses.replace(made, params=params), plain(LONG))[: len(LONG)],
        logits_of(read(tmp_path), [LONG])[0],
    )
    assert any(
        (one != other).any()
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(made.params), strict=True)
    )


def test_every_family_is_compared() -> None:
    assert {TINY[name]["model_type"] for name, _ in CASES.values()} == FAMILIES.keys()
