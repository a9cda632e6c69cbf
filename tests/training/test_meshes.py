"""Meshes: eight devices train as one, arrays keep their shardings, nothing large is sent."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.data.packing import Batch
from jaxdpo.models.config import ModelConfig
from jaxdpo.planning.hlo_collectives import collectives
from jaxdpo.training.completion_logps import StepOptions
from jaxdpo.training.state import FrozenState, TrainState
from jaxdpo.training.step import train_step
from tests.families import tiny
from tests.tiny import Setup, Stepper, model, pairs

L, T, V = 3, 512, 320  # sizes that no other dimension has
DENSE = model(num_hidden_layers=L, vocab_size=V)
EXPERTS = tiny("gpt_oss", num_hidden_layers=L, vocab_size=V)  # with windows, sinks and biases
MESHES = {  # data, fsdp, tensor, context, expert
    "data 8": (8,),
    "fsdp 4 x tensor 2": (1, 4, 2),
    "context 8": (1, 1, 1, 8),
    "fsdp 2 x context 2 x tensor 2": (1, 2, 2, 2),
    "data 2 x fsdp 2 x context 2": (2, 2, 1, 2),
    "data 2 x context 2 x tensor 2": (2, 1, 2, 2),
}
EXPERT_MESHES = {
    "fsdp 2 x expert 4": (1, 2, 1, 1, 4),
    "expert 2 x context 2 x tensor 2": (1, 1, 2, 2, 2),
}
CHUNK = 16  # fewer tokens than any device has
KEYS = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")


@functools.cache
def started(
    config: ModelConfig, sizes: tuple[int, ...], share_prefix: bool = True
) -> tuple[Stepper, list, str]:
    """A run, the batches that it repeats, and the text of its compiled step, which it then runs."""
    optim = OptimSection(learning_rate=3e-4, weight_decay=0.1)
    run = Stepper(
        Setup(
            config=config,
            mesh=sizes,
            share_prefix=share_prefix,
            size=T,
            optim=optim,
            remat="full",
            chunk=CHUNK,
            total_steps=20,
        )
    )
    batches = [run.pack(pairs(6, seed=seed, low=3, high=25, vocab=V)) for seed in range(3)]
    compiled = run.train_step.lower(run.state, run.frozen, batches[0], np.asarray(True)).compile()
    run.train_step = compiled
    return run, batches, compiled.as_text()


@functools.cache
def trajectory(
    config: ModelConfig, sizes: tuple[int, ...], steps: int, share_prefix: bool = True
) -> dict[str, np.ndarray]:
    """What is logged of each step, and of an evaluation at the end."""
    run, batches, _ = started(config, sizes, share_prefix)
    run.reset()
    metrics = [run.train(batches[step % len(batches)]) for step in range(steps)]
    return {key: np.array([one[key] for one in metrics]) for key in KEYS}


def check_trajectory(
    config: ModelConfig, sizes: tuple[int, ...], steps: int, share_prefix: bool = True
) -> None:
    ours, alone = trajectory(config, sizes, steps, share_prefix), trajectory(config, (1,), steps)
    assert (
        alone["loss"][0] != alone["loss"][-1] and np.ptp(alone["rewards/margins"]) > 0.1
    )  # it moves
    for key in KEYS:
        np.testing.assert_allclose(
            ours[key], alone[key], rtol=0, atol=1e-5 * np.abs(alone[key]).max(), err_msg=key
        )


@pytest.mark.slow
def test_a_few_steps_on_eight_devices_are_those_of_one() -> None:
    check_trajectory(DENSE, MESHES["fsdp 2 x context 2 x tensor 2"], 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_train_as_one_does(name: str) -> None:
    check_trajectory(DENSE, MESHES[name], 20)


@pytest.mark.slow
def test_eight_devices_train_on_separate_rows_as_one_does_on_shared_ones() -> None:
    check_trajectory(DENSE, MESHES["context 8"], 20, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERT_MESHES)
def test_eight_devices_train_a_mixture_of_experts_as_one_does(name: str) -> None:
    check_trajectory(EXPERTS, EXPERT_MESHES[name], 20)


@pytest.mark.slow
def test_an_evaluation_on_eight_devices_is_that_of_one() -> None:
    measured = []
    for sizes in (MESHES["fsdp 2 x context 2 x tensor 2"], (1,)):
        run, batches, _ = started(DENSE, sizes)
        run.reset()
        measured.append(run.evaluate(batches[0]))
    for key, value in measured[1].items():
        np.testing.assert_allclose(measured[0][key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    assert measured[1]["kl/token_exact"] > 0.01


# --- where everything lies ---


def places(run: Stepper, path: str) -> set[PartitionSpec]:
    """Of a weight and of its moments, in the state that a step has left."""
    trees = (run.state.params, run.state.opt["mu"], run.state.opt["nu"])
    leaves = [
        functools.reduce(lambda tree, key: tree[key], path.split("/"), tree) for tree in trees
    ]
    return {leaf.sharding.spec for leaf in leaves}


DENSE_PLACES = {
    "embed/weight": ("tensor", "fsdp"),
    "head/weight": ("tensor", "fsdp"),
    "layers/attn/q": (None, "fsdp", "tensor", None),
    "layers/attn/v": (None, "fsdp", "tensor", None),
    "layers/attn/o": (None, "tensor", None, "fsdp"),
    "layers/mlp/gate": (None, "fsdp", "tensor"),
    "layers/mlp/down": (None, "tensor", "fsdp"),
    "layers/mlp_norm/scale": (None, None),
}
EXPERT_PLACES = {
    "embed/weight": ("tensor", "expert"),
    "layers/attn/q": (None, "expert", "tensor", None),
    "layers/moe/gate": (None, "expert", "fsdp", "tensor"),
    "layers/moe/down": (None, "expert", "tensor", "fsdp"),
    "layers/moe/down_bias": (None, "expert", None),
    "layers/moe/router": (None, "expert", None),
}


def check_places(run: Stepper, expected: dict[str, tuple]) -> None:
    for path, spec in expected.items():
        found, wanted = places(run, path), NamedSharding(run.mesh, PartitionSpec(*spec))
        assert all(
            NamedSharding(run.mesh, one).is_equivalent_to(wanted, len(spec)) for one in found
        ), (path, found)


@pytest.mark.slow
def test_weights_and_moments_keep_their_shardings_after_a_step() -> None:
    run, batches, _ = started(DENSE, MESHES["fsdp 2 x context 2 x tensor 2"])
    run.reset()
    run.train(batches[0])
    check_places(run, DENSE_PLACES)


@pytest.mark.slow
def test_experts_and_their_moments_keep_their_shardings_after_a_step() -> None:
    run, batches, _ = started(EXPERTS, EXPERT_MESHES["expert 2 x context 2 x tensor 2"])
    run.reset()
    run.train(batches[0])
    check_places(run, EXPERT_PLACES)
    wide, batches, _ = started(EXPERTS, EXPERT_MESHES["fsdp 2 x expert 4"])
    wide.reset()
    wide.train(batches[0])
    check_places(
        wide,
        {
            "layers/attn/o": (None, None, None, ("fsdp", "expert")),
            "layers/moe/up": (None, "expert", "fsdp", None),
        },
    )


# --- what is sent ---


def too_large(text: str, run: Stepper) -> list[str]:
    """In a compiled step: gathers of all layers' weights, arrays with a logit of every token."""
    gathers = [
        one
        for one in collectives(text, run.mesh)
        if one.kind in ("all-gather", "all-to-all", "collective-permute")
    ]
    stacks = [
        f"{one.kind} {shape}"
        for one in gathers
        for shape in one.shapes
        if len(shape) > 2 and shape[0] == L
    ]
    tokens, vocabulary = T // run.mesh.shape["context"], V // run.mesh.shape["tensor"]
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\b(?:f32|bf16|pred)\[([\d,]+)\]", text)
    }
    return stacks + [
        f"logits {shape}"
        for shape in shapes
        if vocabulary in shape and np.prod(shape) >= tokens * vocabulary
    ]


@pytest.mark.slow
def test_no_stack_of_weights_and_no_logits_of_all_tokens_are_in_the_program() -> None:
    run, _, text = started(DENSE, MESHES["fsdp 2 x context 2 x tensor 2"])
    assert too_large(text, run) == []
    kinds = {(one.kind, axes) for one in collectives(text, run.mesh) for axes in one.axes}
    assert {
        ("all-gather", "fsdp"),
        ("all-gather", "context"),
        ("reduce-scatter", "context"),
        ("all-reduce", "tensor"),
    } <= kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MESHES, *EXPERT_MESHES])
def test_no_program_sends_stacks_of_weights_or_holds_all_logits(name: str) -> None:
    run, _, text = started(
        *((DENSE, MESHES[name]) if name in MESHES else (EXPERTS, EXPERT_MESHES[name]))
    )
    assert too_large(text, run) == []


def several_microbatches(sizes: tuple[int, ...], loss: str) -> tuple[Stepper, Batch]:
    run = Stepper(
        Setup(
            loss=LossSection(name=loss), config=DENSE, mesh=sizes, size=T, remat="full", chunk=CHUNK
        )
    )
    batch = run.pack(pairs(120, seed=0, low=3, high=25, vocab=V))
    assert len(batch.tokens_MBT) > 1
    return run, batch


@pytest.mark.slow
def test_data_parallelism_sums_gradients_once_a_step_under_gradient_accumulation() -> None:
    run, batch = several_microbatches(MESHES["data 2 x fsdp 2 x context 2"], "sigmoid")
    text = run.train_step.lower(run.state, run.frozen, batch, np.asarray(True)).compile().as_text()
    sent = sum(one.sent for one in collectives(text, run.mesh) if "data" in one.axes)
    assert sent == pytest.approx(
        sum(leaf.nbytes for leaf in jax.tree.leaves(run.state.params)) / 2, rel=0.05
    )  # a half over fsdp


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])  # of each pair, and of the whole batch
def test_gradient_accumulation_on_eight_devices_equals_one(loss: str) -> None:
    (run, batch), (alone, same) = (
        several_microbatches(sizes, loss) for sizes in (MESHES["data 2 x fsdp 2 x context 2"], (1,))
    )
    for _ in range(4):
        ours, theirs = run.train(batch), alone.train(same)
        for key in KEYS:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key


@pytest.mark.slow
def test_programs_that_gather_stacks_or_hold_all_logits_are_found() -> None:
    run, batches, _ = started(DENSE, MESHES["fsdp 4 x tensor 2"])
    taken = (run.state, run.frozen, batches[0], np.asarray(True))

    def text_of(options: StepOptions, everywhere: bool) -> str:
        def step(state: TrainState, fixed: FrozenState, batch: Batch, apply: jax.Array) -> tuple:
            if everywhere:  # weights that are put together before the layers, not in them
                whole = jax.tree.map(
                    lambda w: jax.lax.with_sharding_constraint(
                        w, NamedSharding(run.mesh, PartitionSpec())
                    ),
                    state.params,
                )
                state = state._replace(params=whole)
            return train_step(state, fixed, batch, apply, options)

        return str(jax.jit(step).lower(*taken).compile().as_text())

    plain = run.setup.options()
    found = too_large(text_of(plain, everywhere=True), run)
    assert any(one.startswith("all-gather") for one in found) and not any(
        one.startswith("logits") for one in found
    )
    found = too_large(text_of(dataclasses.replace(plain, chunk=T), everywhere=False), run)
    assert found and all(one.startswith("logits") for one in found)
