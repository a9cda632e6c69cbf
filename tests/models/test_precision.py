"""Float32 is float32: no product of float32 numbers is lowered at a platform's default precision,
which is TF32 on GPUs and bfloat16 on TPUs."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.data.packing import Batch
from jaxdpo.models.attention_tpu import splash
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.lora import Lora, adapter_shapes
from jaxdpo.models.matmul import exact_products
from jaxdpo.models.params import abstract_params
from jaxdpo.models.sampling import PromptBatch, SamplingParams, _generate_batch
from jaxdpo.training import step
from jaxdpo.training.completion_logps import StepOptions, reference_logps
from jaxdpo.training.state import FrozenState, init_state
from tests.families import TINY, tiny
from tests.tiny import model, pack, pairs

ROOT = Path(__file__).parents[2]
PRODUCT = re.compile(r"(?:dot_general|ragged_dot|dot|convolution)\b.*")
BATCH = pack(pairs(2, low=3, high=9), size=128)
WHOLE = LossSection(name=["sigmoid", "sft"])
QUICK_FAMILIES = ("mixtral",)


def products(lowered: Any) -> list[str]:
    """The lines of a program that multiply matrices."""
    lines = lowered.as_text().splitlines()
    found = []
    for line in lines:
        if re.search(
            r"= \"?(stablehlo|chlo|mhlo)\.(dot|dot_general|ragged_dot|convolution)\b", line
        ):
            found.append(line)
    return found


def inexact(lines: list[str]) -> list[str]:
    """Those that multiply float32 numbers at less than the highest precision."""
    found = []
    for line in lines:
        inputs = line.split(" : ")[-1].split("->")[0]
        if "f32" in inputs and line.count("HIGHEST") < 2:
            found.append(line)
    return found


def options_of(config: ModelConfig, loss: LossSection, **forward: Any) -> StepOptions:
    return StepOptions(
        model=config,
        loss=loss,
        optim=OptimSection(),
        forward=ForwardOptions(**forward),
        total_steps=4,
    )


def shapes_of(batch: Batch) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def lowered_step(config: ModelConfig, loss: LossSection, lora: bool = False, **forward: Any) -> Any:
    """The train step, forward and backward, with a frozen reference."""
    options = options_of(config, loss, **forward)
    params = abstract_params(config, "float32")
    trained, frozen = params, FrozenState(reference=params)
    if lora:
        targets = ("attn/q", "attn/o")
        trained = adapter_shapes(config, Lora(rank=2, alpha=1.0, rslora=False, targets=targets))
        frozen = FrozenState(base=params, reference={})
    state = jax.eval_shape(lambda params: init_state(params, options.optim), trained)
    train = jax.jit(functools.partial(step.train_step, options=options))
    return train.lower(state, frozen, shapes_of(BATCH), jax.ShapeDtypeStruct((), np.bool_))


@pytest.mark.parametrize(
    "family",
    [
        name if name in QUICK_FAMILIES else pytest.param(name, marks=pytest.mark.slow)
        for name in TINY
    ],
)
def test_training_in_float32_multiplies_in_float32(family: str) -> None:
    lines = products(lowered_step(tiny(family), WHOLE, attention="blocks"))
    assert len(lines) > 20 and inexact(lines) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "lora", "forward"),
    [
        (WHOLE, True, {}),
        (LossSection(name="aot"), False, {"attention": "dense"}),
        (LossSection(wpo=True, ld_alpha=0.5), False, {"remat": "full"}),
        (LossSection(router_aux_coef=0.1), False, {}),
    ],
    ids=["lora", "coupled", "wpo", "router"],
)
def test_every_part_of_a_step_in_float32_multiplies_in_float32(
    loss: LossSection, lora: bool, forward: dict[str, Any]
) -> None:
    config = tiny("mixtral") if loss.router_aux_coef else model()
    lines = products(lowered_step(config, loss, lora, **forward))
    assert len(lines) > 20 and inexact(lines) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_and_log_probs_multiply_as_exactly_as_their_inputs(dtype: str) -> None:
    config = model()
    params = abstract_params(config, "float32")
    options = options_of(config, WHOLE, compute_dtype=dtype)

    def int32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.int32)

    logps = jax.jit(lambda params, batch: reference_logps(params, batch, options))
    lines = products(logps.lower(params, shapes_of(BATCH)))
    evaluate = jax.jit(functools.partial(step.eval_step, options=options))
    lines += products(evaluate.lower(params, FrozenState(reference=params), shapes_of(BATCH)))
    temperature = jax.ShapeDtypeStruct((), np.float32)
    sampling = SamplingParams(int32(), int32(1), temperature, top_k=None, top_p=None)
    generation = _generate_batch.lower(
        params,
        PromptBatch(int32(2, 8), int32(2), int32(2), int32(2)),
        sampling,
        model=config,
        options=options.forward,
        max_new_tokens=4,
        num_tokens=config.vocab_size,
    )
    lines += products(generation)
    assert len(lines) > 20 and inexact(lines) == []
    in_bfloat16 = [line for line in lines if "bf16" in line]
    assert bool(in_bfloat16) == (dtype == "bfloat16")
    assert not any("HIGHEST" in line for line in in_bfloat16)  # nothing is paid for there


def test_the_test_sees_a_product_at_default_precision() -> None:
    x = jnp.ones((4, 4))
    assert len(inexact(products(jax.jit(lambda x: x @ x).lower(x)))) == 1
    with exact_products(jnp.dtype("float32")):
        assert inexact(products(jax.jit(lambda x: x @ x).lower(x))) == []
    groups = jnp.asarray([2, 2])
    dotted = jax.jit(lambda x: jax.lax.ragged_dot(x, jnp.ones((2, 4, 4)), groups)).lower(x)
    assert inexact(products(dotted))


def test_splash_attention_in_float32_multiplies_in_float32() -> None:
    """Its kernels say no precision, so that of the context counts: forward and backward."""

    def pull(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        bounds = jnp.zeros((1, 128), jnp.int32), jnp.full((1, 128), 128, jnp.int32)
        return splash(1.0, None, q, k, v, *bounds, None, interpret=True).sum()

    x = jax.ShapeDtypeStruct((1, 128, 1, 128), np.float32)
    with exact_products(jnp.dtype("float32")):
        text = str(jax.make_jaxpr(jax.grad(pull, argnums=(0, 1, 2)))(x, x, x))
    assert text.count("dot_general[") >= 5
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == text.count(
        "dot_general["
    )


def test_every_matmul_of_the_package_is_einsum_of_matmul_py() -> None:
    raw = re.compile(r"jnp\.(einsum|dot|matmul|vdot|inner|tensordot)\(|lax\.(dot|conv)|\s@\s")
    for path in sorted((ROOT / "jaxdpo").rglob("*.py")):
        if path.name == "matmul.py":
            continue
        for line in path.read_text().splitlines():
            assert not raw.search(line.split("#")[0]), f"{path}: {line}"
