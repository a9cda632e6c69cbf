"""The weight table: sizes and names of real models, agreement with decoder and transformers."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.config_json import load_model_config, to_hf
from jaxdpo.models.hf.tensor_map import files_of, readable_tables, weight_table
from jaxdpo.models.params import abstract_params
from tests.families import TINY, raw_config, tiny

TRUE_COUNTS = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "gpt2": 124_439_808,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "olmo-2-1124-7b": 7_298_617_344,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "qwen2-1.5b-instruct": 1_543_714_304,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
}
"""What the models' own files hold, tied heads counted once."""


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the decoder's parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config, "float32"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


@pytest.mark.parametrize("name", TRUE_COUNTS)
def test_real_models_have_the_true_parameter_count_in_table_and_decoder(
    real_data: Path, name: str
) -> None:
    config = load_model_config(real_data / "model_configs" / name)
    table = {row.path: row.full_shape for row in weight_table(config)}
    assert sum(map(math.prod, table.values())) == TRUE_COUNTS[name]
    assert shapes_of(config) == table


@pytest.mark.parametrize("name", TRUE_COUNTS)
def test_every_tensor_of_the_real_models_is_filled_exactly_once(real_data: Path, name: str) -> None:
    """Each form of the files holds as many numbers as the model has, none of them twice."""
    for table in readable_tables(load_model_config(real_data / "model_configs" / name)):
        assert_filled_once(table)
        assert sum(math.prod(row.full_shape) for row in table) == TRUE_COUNTS[name]


def assert_filled_once(table: list[Any]) -> None:
    shapes, outputs = {}, {}
    for row in table:
        width = row.hf_shape[-2 if row.transposed else -1]
        shapes[row.hf_name] = (row.hf_shape, row.stack, row.transposed, width)
        outputs.setdefault(row.hf_name, []).extend(range(*row.cut.indices(width)))
    for name, (_, _, _, width) in shapes.items():
        assert sorted(outputs[name]) == list(range(width)), name
    names = [name for form in {row.hf_name: row for row in table}.values() for name in form.names()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_have_the_decoders_parameters_in_every_form(name: str) -> None:
    for table in readable_tables(tiny(name)):
        assert shapes_of(tiny(name)) == {row.path: row.full_shape for row in table}
        assert_filled_once(table)


@pytest.mark.parametrize(
    ("name", "path", "tensor", "shape"),
    [
        ("phi3", "layers/attn/k", "model.layers.2.self_attn.qkv_proj.weight", (64, 32)),
        ("gpt2", "layers/attn/v_bias", "transformer.h.2.attn.c_attn.bias", (96,)),
        ("gpt2", "positions/weight", "transformer.wpe.weight", (128, 32)),
        (
            "gemma2",
            "layers/mlp_norm/scale",
            "model.layers.2.pre_feedforward_layernorm.weight",
            (32,),
        ),
        (
            "olmo2",
            "layers/attn_post_norm/scale",
            "model.layers.2.post_attention_layernorm.weight",
            (32,),
        ),
        ("olmo2", "layers/attn/k_norm", "model.layers.2.self_attn.k_norm.weight", (16,)),
        (
            "mixtral",
            "layers/moe/up",
            "model.layers.2.block_sparse_moe.experts.3.w3.weight",
            (64, 32),
        ),
        ("qwen3_moe", "layers/moe/down", "model.layers.2.mlp.experts.3.down_proj.weight", (32, 16)),
        ("gpt_oss", "layers/moe/gate", "model.layers.2.mlp.experts.gate_up_proj", (4, 32, 128)),
        ("gpt_oss", "layers/attn/sinks", "model.layers.2.self_attn.sinks", (4,)),
    ],
)
def test_where_parameters_are_stored(
    name: str, path: str, tensor: str, shape: tuple[int, ...]
) -> None:
    (row,) = [row for row in weight_table(tiny(name)) if row.path == path]
    assert files_of(row)[tensor] == shape and tensor in row.names()


def test_parameters_of_a_shared_tensor_are_sliced_out() -> None:
    rows = {row.path: row for row in weight_table(tiny("phi3"))}
    tensor = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    np.testing.assert_array_equal(
        rows["layers/attn/k"].ours(tensor), tensor[32:48].T.reshape(32, 2, 8)
    )
    rows = {row.path: row for row in weight_table(tiny("gpt_oss"))}
    tensor = np.arange(4 * 32 * 128, dtype=np.float32).reshape(4, 32, 128)
    np.testing.assert_array_equal(rows["layers/moe/up"].ours(tensor), tensor[:, :, 1::2])
    rows = {row.path: row for row in weight_table(tiny("gpt2"))}
    tensor = np.arange(32 * 96, dtype=np.float32).reshape(32, 96)
    np.testing.assert_array_equal(
        rows["layers/attn/v"].ours(tensor), tensor[:, 64:].reshape(32, 4, 8)
    )


# ---- against transformers -----------------------------------------------------------------------


def meta_model(config: dict[str, Any]) -> Any:
    """transformers' model of a config.json, without memory for its weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with torch.device("meta"):
        kind = transformers.AutoConfig.for_model(**config)
        return transformers.AutoModelForCausalLM.from_config(kind)


def their_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }


def forms(config: ModelConfig) -> list[dict[str, tuple[int, ...]]]:
    return [
        {name: shape for row in table for name, shape in files_of(row).items()}
        for table in readable_tables(config)
    ]


@pytest.mark.torch
@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_in_memory_are_transformers(name: str) -> None:
    assert their_shapes(meta_model(raw_config(name))) in forms(tiny(name))


@pytest.mark.torch
@pytest.mark.parametrize("name", TRUE_COUNTS)
def test_real_models_are_transformers(real_data: Path, name: str) -> None:
    folder = real_data / "model_configs" / name
    model = meta_model(json.loads((folder / "config.json").read_text()))
    assert their_shapes(model) in forms(load_model_config(folder))
    assert sum(weight.numel() for weight in model.parameters()) == TRUE_COUNTS[name]


@pytest.mark.torch
@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_in_files_are_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**to_hf(tiny(name)))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes == forms(tiny(name))[0]
    assert load_model_config(tmp_path) == tiny(name)
