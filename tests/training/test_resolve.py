"""What a config leaves open is resolved once the model is known; what does not fit is refused."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import (
    Config,
    EvalSection,
    LoraSection,
    ModelSection,
    OptimSection,
    TrainSection,
)
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.peft import write_peft
from jaxdpo.training.resolve import (
    attention_of,
    check_attention,
    num_steps,
    resolve_lora,
    resolve_options,
    without_evaluation,
)
from tests.families import tiny
from tests.models.test_lora import random_adapter
from tests.tiny import mesh, model


def resolved(config: Config, some: ModelConfig | None = None, **raw: Any) -> Config:
    return resolve_options(config, mesh(), some or model(), raw)


def test_what_is_automatic_gets_values() -> None:
    config = resolved(Config())
    assert (config.model.compute_dtype, config.data.max_length) == ("float32", 512)
    assert resolved(config) == config


def test_an_automatic_packed_length_holds_two_answers_of_the_longest_pair() -> None:
    long = dataclasses.replace(model(), max_positions=8192)
    assert resolved(Config()).data.packed_length == 4096
    assert resolved(Config(data=DataSection(max_length=3000)), long).data.packed_length == 6016
    set_by_user = DataSection(max_length=100, packed_length=200)
    assert resolved(Config(data=set_by_user)).data.packed_length == 200


def test_evaluation_is_on_where_there_are_validation_pairs() -> None:
    without = DataSection(eval_fraction=0)
    assert resolved(Config()).eval.every == 100
    assert resolved(Config(data=without)).eval.every == 0
    assert resolved(Config(data=dataclasses.replace(without, eval=["b"]))).eval.every == 100
    assert resolved(Config(eval=EvalSection(every=7))).eval.every == 7


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Config(), "frozen"),
        (Config(lora=LoraSection(rank=2)), "adapter_off"),
        (Config(lora=LoraSection(path="p")), "adapter_off"),
        (Config(loss=LossSection(name="simpo")), "none"),
        (Config(reference="cached", lora=LoraSection(rank=2)), "cached"),
        (Config(reference="frozen", loss=LossSection(name="simpo")), "frozen"),
    ],
)
def test_the_reference_follows_from_what_is_trained(config: Config, kind: str) -> None:
    assert resolved(config).reference == kind


def test_the_routers_weight_is_that_of_the_model_where_it_says_so() -> None:
    moe, aux = (
        dataclasses.replace(tiny("mixtral"), router_aux_coef=0.02),
        LossSection(router_aux_coef=0.5),
    )
    assert resolved(Config(), moe).loss.router_aux_coef == 0.0
    assert resolved(Config(), moe, output_router_logits=True).loss.router_aux_coef == 0.02
    assert resolved(Config(loss=aux), moe, output_router_logits=True).loss.router_aux_coef == 0.5
    assert resolved(Config()).loss.router_aux_coef is None
    with pytest.raises(ValueError, match=r"loss.router_aux_coef=0.5: the model has no experts"):
        resolved(Config(loss=aux))


def test_lengths_beyond_the_models_positions_are_refused() -> None:
    config = Config()
    with pytest.raises(ValueError, match=r"data.max_length=600: the model knows 512 positions"):
        resolved(dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=600)))


def test_lora_is_resolved_from_the_options_or_from_an_adapter(tmp_path: Path) -> None:
    config, lora, found = resolve_lora(Config(lora=LoraSection(rank=4, targets="q_proj")), model())
    assert (
        config.lora == LoraSection(rank=4, alpha=16.0, targets=["q"])
        and lora is not None
        and found is None
    )
    write_peft(tmp_path, model(), random_adapter(model(), lora), lora, base="some/base")
    config, again, found = resolve_lora(Config(lora=LoraSection(path=str(tmp_path))), model())
    assert (
        config.lora == LoraSection(rank=4, alpha=16, targets=["q"], path=str(tmp_path))
        and again == lora
    )
    assert found is not None and found.base == "some/base"
    assert resolve_lora(config, model())[0] == config
    assert resolve_lora(Config(), model()) == (Config(), None, None)
    wrong = LoraSection(path=str(tmp_path), rank=8, alpha=1.0, rslora=True, targets=["v"])
    with pytest.raises(ValueError) as caught:
        resolve_lora(Config(lora=wrong), model())
    assert [line.split("=")[0] for line in str(caught.value).split("\n")] == [
        "lora.rank",
        "lora.alpha",
        "lora.rslora",
        "lora.targets",
    ]
    assert "lora.rank=8: the adapter in lora.path has 4. Leave it out" in str(caught.value)


def test_the_platform_chooses_the_type() -> None:
    class Gpu:
        platform = "gpu"

    class Devices:
        flat = (Gpu(),)

    class OnGpu:
        devices = Devices()

    some: Any = OnGpu()
    assert resolve_options(Config(), some, model(), {}).model.compute_dtype == "bfloat16"
    assert (
        resolve_options(
            Config(model=ModelSection(compute_dtype="float32")), some, model(), {}
        ).model.compute_dtype
        == "float32"
    )


# --- attention ---

WINDOW, WIDE = ({"model_type": "mistral", "sliding_window": size} for size in (9, 512))


@pytest.mark.parametrize(
    ("family", "share_prefix", "platform", "chosen"),
    [
        ({}, True, "tpu", "splash"),
        ({}, True, "cpu", "blocks"),
        (WINDOW, True, "tpu", "blocks"),
        (WINDOW, False, "tpu", "splash"),
        (WIDE, True, "tpu", "splash"),
    ],
)
def test_tpus_have_an_attention_of_their_own(
    family: dict[str, Any], share_prefix: bool, platform: str, chosen: str
) -> None:
    devices: Any = SimpleNamespace(devices=np.asarray([SimpleNamespace(platform=platform)]))
    data = DataSection(share_prefix=share_prefix, max_length=64)
    asked = Config(data=data, model=ModelSection(attention="splash"))
    assert attention_of(Config(data=data), devices, model(**family)) == chosen
    assert attention_of(asked, devices, model(**family)) == "splash"
    if chosen == "splash":
        check_attention(asked, devices, model(**family))
    else:
        with pytest.raises(ValueError, match=r"model.attention=splash: .* Use model.attention="):
            check_attention(asked, devices, model(**family))


@pytest.mark.parametrize(
    ("epochs", "steps"), [(None, 30), (1, 30), (3, 90), (0.5, 15), (0.1, 3), (1.01, 31), (1e-9, 1)]
)
def test_epochs_may_be_fractions_and_steps_are_rounded_up(epochs: float | None, steps: int) -> None:
    assert num_steps(Config(train=TrainSection(epochs=epochs)), 30) == steps
    assert num_steps(Config(train=TrainSection(steps=7)), 30) == 7


@pytest.mark.parametrize(("warmup", "epochs"), [(3, 1), (150, 1), (6, 2), (2, 0.5)])
def test_a_warm_up_that_the_run_does_not_outlast_is_refused(warmup: int, epochs: float) -> None:
    config = Config(optim=OptimSection(warmup_steps=warmup), train=TrainSection(epochs=epochs))
    with pytest.raises(ValueError, match=rf"optim\.warmup_steps={warmup}: must be fewer .*epochs="):
        num_steps(config, 3)
    assert num_steps(config, 1000) == 1000 * epochs


def test_without_validation_pairs_there_is_no_evaluation_or_an_error_for_who_asked() -> None:
    config = resolved(Config())
    none: Any = SimpleNamespace(eval=[])
    some: Any = SimpleNamespace(eval=[1])
    assert config.eval.every == 100
    assert without_evaluation(config, None, some) == config
    assert without_evaluation(config, None, none).eval.every == 0
    asked = resolved(Config(eval=EvalSection(every=7)))
    with pytest.raises(ValueError, match=r"eval\.every=7: no pair is held out .* eval\.every=0"):
        without_evaluation(asked, 7, none)
    off = resolved(Config(eval=EvalSection(every=0)))
    assert without_evaluation(off, 0, none) == off
