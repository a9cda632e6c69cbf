import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies

from jaxdpo.distributed.sharding import param_shardings, put
from jaxdpo.models import sampling
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward, logits
from jaxdpo.models.params import Params, logical_axes
from jaxdpo.models.sampling import SamplingParams, generate
from tests.tiny import mesh, model, params

PROMPTS = [np.array(ids, np.int32) for ids in ([5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8])]
NEW = 6
KINDS: dict[str, ModelConfig] = {
    "llama": model(),
    "sliding window": model(
        model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4
    ),
    "window in one layer": dataclasses.replace(
        model(), sliding_window=3, window_layers=(True, False), local_rope_theta=100.0
    ),
    "sinks": dataclasses.replace(model(), attention_sinks=True),
    "soft caps": dataclasses.replace(model(), attention_softcap=2.0, logit_softcap=3.0),
    "learned positions": dataclasses.replace(
        model(), positions="learned", norm="layer", gated=False, activation="gelu_tanh"
    ),
}


@functools.partial(jax.jit, static_argnames="config")
def logits_of_row(weights: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    slots, options = (
        jnp.arange(tokens.shape[1], dtype=jnp.int32)[None],
        ForwardOptions(attention="dense"),
    )
    hidden = forward(weights, config, tokens, slots, jnp.zeros_like(slots), slots + 1, options)
    return logits(weights, config, hidden[0], options)


def next_logits(ids: Sequence[int], config: ModelConfig) -> np.ndarray:
    """Logits after a sequence, computed alone and without a cache."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(logits_of_row(params(0, config), padded, config)[len(ids) - 1])


@functools.cache
def greedy(kind: str = "llama", num_tokens: int = 64) -> list[list[int]]:
    """Each prompt's likeliest continuation, by a full forward pass for each token."""
    config = KINDS[kind]

    def answer(prompt: np.ndarray) -> list[int]:
        ids = prompt.tolist()
        for _ in range(NEW):
            ids.append(int(np.argmax(next_logits(ids, config)[:num_tokens])))
        return ids[len(prompt) :]

    return [answer(prompt) for prompt in PROMPTS]


def sample(
    prompts: Sequence[np.ndarray] = PROMPTS, kind: str = "llama", **more: Any
) -> list[list[int]]:
    options: dict[str, Any] = {"max_new_tokens": NEW, "options": ForwardOptions(), **more}
    return [
        ids.tolist() for ids in generate(params(0, KINDS[kind]), KINDS[kind], prompts, **options)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_likeliest_token_of_each_full_sequence_alone(kind: str) -> None:
    assert sample(kind=kind) == greedy(kind)


def test_bfloat16_completions_begin_as_float32_ones() -> None:
    found = sample(options=ForwardOptions(compute_dtype="bfloat16"))
    assert [ids[0] for ids in found] == [ids[0] for ids in greedy()]


def test_a_completion_ends_with_the_first_stop_token_its_limit_or_the_last_position() -> None:
    assert sample(max_new_tokens=3) == [ids[:3] for ids in greedy()]
    stops = {greedy()[0][2], greedy()[2][0]}
    wanted = [
        ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), NEW)]
        for ids in greedy()
    ]
    assert sample(stop_ids=sorted(stops)) == wanted and len(wanted[2]) == 1
    short = dataclasses.replace(model(), max_positions=8)
    found = generate(params(), short, PROMPTS, max_new_tokens=NEW, options=ForwardOptions())
    assert [ids.tolist() for ids in found] == [greedy()[0][:5], greedy()[1], []]


@pytest.mark.slow
def test_padding_ids_of_the_vocab_are_never_sampled() -> None:
    largest = max(max(ids) for ids in greedy())
    assert sample(num_tokens=largest) == greedy("llama", largest) != greedy()
    assert all(
        token < 5 for ids in sample(num_tokens=5, temperature=9.0, top_k=20) for token in ids
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        pytest.param((2, 4, 1), marks=pytest.mark.slow),
        (2, 2, 2),
    ],
)
def test_meshes_give_the_same_completions_without_implicit_transfers(
    shape: tuple[int, int, int],
) -> None:
    where = mesh(*shape)
    weights = put(params(), param_shardings(where, logical_axes(model()), params()))
    how: dict[str, Any] = {
        "max_new_tokens": NEW,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "seed": 5,
    }
    with jax.transfer_guard("disallow"):
        found = generate(weights, model(), PROMPTS, options=ForwardOptions(mesh=where), **how)
    assert [ids.tolist() for ids in found] == sample(**how)


def test_lora_updates_are_part_of_the_model() -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 32, 3), (2, 3, 4, 8)))
    lora = {"layers": {"attn": {"q": {"a": a, "b": b}}}}
    attn = params()["layers"]["attn"]
    merged = params() | {
        "layers": params()["layers"]
        | {"attn": attn | {"q": attn["q"] + 0.5 * np.einsum("LDR,LRNH->LDNH", a, b)}}
    }
    ours = generate(
        params() | {"lora": lora},
        model(),
        PROMPTS,
        max_new_tokens=NEW,
        options=ForwardOptions(lora_scale=0.5),
    )
    theirs = generate(merged, model(), PROMPTS, max_new_tokens=NEW, options=ForwardOptions())
    assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in theirs] != greedy()


def test_a_sample_depends_on_seed_and_prompt_index_but_not_on_the_batch() -> None:
    how: dict[str, Any] = {"temperature": 1.0, "seed": 1}
    together = sample(**how)
    reported: list[int] = []
    assert sample(**how, batch_size=2, report=reported.append) == sample(
        **how, batch_size=1
    ) == together and reported == [2, 3]
    assert sample(PROMPTS[:2], **how) == together[:2]
    assert sample(temperature=1.0, seed=2) != together
    same = sample([PROMPTS[0]] * 3, **how)
    assert same[0] == together[0] and same[1] != same[0] != same[2]


def test_few_programs_are_compiled_for_many_lengths() -> None:
    rng = np.random.default_rng(0)
    program: Any = sampling._generate_batch
    before = program._cache_size()
    for length, new, temperature in ((3, 2, 0.3), (16, 16, 0.5), (9, 11, 2.0), (1, 1, 1.0)):
        sample(
            [rng.integers(1, 64, length).astype(np.int32)] * 2,
            max_new_tokens=new,
            temperature=temperature,
            seed=length,
            num_tokens=61,
        )
    assert program._cache_size() == before + 1


@pytest.mark.parametrize(
    ("count", "bucket"),
    [(1, 16), (16, 16), (17, 24), (24, 24), (25, 32), (33, 48), (97, 128), (1025, 1536)],
)
def test_lengths_are_rounded_up_to_buckets(count: int, bucket: int) -> None:
    assert sampling._bucket(count) == bucket


DRAWN = 4000
SCORES = np.array([2.0, -1.0, 0.5, 1.9, -np.inf, 0.0, 3.0], np.float32)


def frequencies(scores: np.ndarray, **how: float) -> np.ndarray:
    """How often each token is drawn."""
    knobs = {"temperature": 1.0, "top_k": None, "top_p": None} | how
    draw = SamplingParams(
        np.uint32(7),
        np.array([-1], np.int32),
        *(None if value is None else np.float32(value) for value in knobs.values()),
    )
    rows = jnp.broadcast_to(jnp.asarray(scores)[:, None], (len(scores), DRAWN))
    ids = jax.jit(sampling._sample)(rows, draw, jnp.arange(DRAWN, dtype=jnp.int32), jnp.int32(0))
    return np.bincount(np.asarray(ids), minlength=len(scores)) / DRAWN


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    wanted = softmax(SCORES / np.float32(temperature))
    found = frequencies(SCORES, temperature=temperature)
    assert (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / DRAWN)).all()


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        ({"top_k": 1}, [6]),
        ({"top_k": 3}, [0, 3, 6]),
        ({"top_k": 100}, [0, 1, 2, 3, 5, 6]),
        ({"top_p": 0.3}, [6]),  # probabilities 0.54, 0.20, 0.18, 0.04, 0.03, 0.01
        ({"top_p": 0.7}, [0, 6]),
        ({"top_p": 0.74}, [0, 3, 6]),
        ({"top_k": 2, "top_p": 0.74}, [0, 6]),
        ({"top_k": 2, "top_p": 0.72}, [6]),  # after top_k, the likeliest has 0.731
    ],
)
def test_top_k_and_top_p_leave_exactly_their_tokens(
    how: dict[str, float], allowed: list[int]
) -> None:
    kept = np.full_like(SCORES, -np.inf)
    kept[allowed] = SCORES[allowed]
    wanted, found = softmax(kept), frequencies(SCORES, **how)
    assert sorted(np.flatnonzero(found)) == sorted(np.flatnonzero(wanted > 2e-3))
    assert (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / DRAWN)).all()


@given(
    strategies.lists(
        strategies.floats(-9, 9, width=32) | strategies.just(-np.inf), min_size=1, max_size=12
    ),
    strategies.integers(1, 14),
)
def test_the_likeliest_are_those_that_a_sort_finds(scores: list[float], k: int) -> None:
    row = np.array([scores + [-np.inf] * (12 - len(scores))], np.float32) + np.float32(
        0
    )  # which makes -0 into 0
    found = np.asarray(LIKELIEST(row.T, np.ones_like(row.T), np.float32(min(k, 12)))).T
    np.testing.assert_array_equal(found, row >= np.sort(row[0])[::-1][min(k, 12) - 1])


LIKELIEST = jax.jit(sampling._top)
