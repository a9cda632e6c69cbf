from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models.decoder import ForwardOptions, Params, forward, head_weight
from jaxdpo.sampling import generate
from tests.tiny import mesh, model, params

PROMPTS = [np.array(ids, np.int32) for ids in ([5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8])]


@jax.jit
def logits_of_row(weights: Params, tokens: jax.Array) -> jax.Array:
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden = forward(weights, model(), tokens, slots, jnp.zeros_like(slots), slots + 1, ForwardOptions(attention="dense"))
    return hidden[0] @ head_weight(weights).T


def next_logits(ids: Sequence[int]) -> np.ndarray:
    """Logits after a row, computed alone."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(logits_of_row(params(), padded)[len(ids) - 1])


def greedy(prompt: np.ndarray, count: int, num_tokens: int = 64) -> list[int]:
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(np.argmax(next_logits(ids)[:num_tokens])))
    return ids[len(prompt) :]


def sample(**options: Any) -> list[list[int]]:
    given: dict[str, Any] = {"max_new_tokens": 6, "options": ForwardOptions(), **options}
    return [ids.tolist() for ids in generate(params(), model(), PROMPTS, **given)]


@pytest.fixture(scope="module")
def greedy_answers() -> list[list[int]]:
    return [greedy(prompt, 6) for prompt in PROMPTS]


def test_greedy_takes_the_likeliest_token_of_each_row_computed_alone(greedy_answers: list[list[int]]) -> None:
    assert sample() == greedy_answers
    assert sample(max_new_tokens=3) == [ids[:3] for ids in greedy_answers]


def test_an_answer_ends_with_the_first_stop_token(greedy_answers: list[list[int]]) -> None:
    stops = {greedy_answers[0][2], greedy_answers[2][0]}
    wanted = [ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), 6)] for ids in greedy_answers]
    assert sample(stop_ids=sorted(stops)) == wanted and len(wanted[2]) == 1


def test_padding_rows_of_the_vocabulary_are_never_drawn(greedy_answers: list[list[int]]) -> None:
    largest = max(max(ids) for ids in greedy_answers)
    assert sample(num_tokens=largest) == [greedy(prompt, 6, largest) for prompt in PROMPTS] != greedy_answers


def test_devices_do_not_change_the_answers_and_nothing_moves_unasked(greedy_answers: list[list[int]]) -> None:
    where = mesh(2, 1, 1)
    weights = jax.device_put(params(), jax.sharding.NamedSharding(where, jax.sharding.PartitionSpec()))
    with jax.transfer_guard("disallow"):
        found = generate(weights, model(), PROMPTS + PROMPTS[:1], max_new_tokens=6, options=ForwardOptions(mesh=where))
    assert [ids.tolist() for ids in found] == greedy_answers + greedy_answers[:1]


def test_samples_follow_the_softmax_and_the_seed() -> None:
    many = [PROMPTS[0]] * 1000
    drawn = generate(params(), model(), many, max_new_tokens=1, options=ForwardOptions(), temperature=0.7, seed=3)
    counts = np.bincount(np.concatenate(drawn), minlength=64) / len(many)
    logits = next_logits(PROMPTS[0].tolist()) / 0.7
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    assert np.abs(counts - wanted).max() < 5 * np.sqrt(wanted.max() / len(many)) and wanted.max() > 2.5 / 64
    first, again, other = (sample(temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
