"""ModelConfig: the real configs, both forms of config.json, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxdpo.models.config import ModelConfig, RopeScaling
from jaxdpo.models.decoder import abstract_params
from jaxdpo.models.families import FAMILIES
from jaxdpo.models.hfconfig import from_hf, load_model_config, to_hf
from jaxdpo.models.weights import weight_table

TRUE_COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2-1.5b-instruct": 1_543_714_304,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
}
REFUSED = {
    "gemma-2-2b": "gemma2",
    "gemma-3-1b": "gemma3_text",
    "gpt-oss-20b": "gpt_oss",
    "gpt2": "gpt2",
    "mixtral-8x7b": "mixtral",
    "olmo-2-1124-7b": "olmo2",
    "phi-3-mini-4k": "phi3",
    "phi-4": "phi3",
    "qwen3-30b-a3b": "qwen3_moe",
}


def hub_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A small config.json in the hub's form; a change to `...` leaves the key out."""
    base = {
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    return {key: value for key, value in (base | changes).items() if value is not ...}


@pytest.mark.parametrize("name", TRUE_COUNTS)
def test_real_configs_have_the_true_parameter_count_in_table_and_decoder(real_data: Path, name: str) -> None:
    config = load_model_config(real_data / "model_configs" / name)
    table = {tuple(row.path.split("/")): row.full_shape for row in weight_table(config)}
    assert sum(map(math.prod, table.values())) == TRUE_COUNTS[name]
    for path, shape in table.items():
        leaf: Any = abstract_params(config, "float32")
        for key in path:
            leaf = leaf[key]
        assert leaf.shape == shape, path


@pytest.mark.parametrize("name", TRUE_COUNTS)
def test_real_configs_survive_writing_and_reading(real_data: Path, name: str) -> None:
    raw = json.loads((real_data / "model_configs" / name / "config.json").read_text())
    assert from_hf(to_hf(from_hf(raw), raw)) == from_hf(raw) == from_hf(to_hf(from_hf(raw)))


@pytest.mark.parametrize("name", REFUSED)
def test_real_configs_of_other_architectures_are_refused_by_name(real_data: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f'{name}.*\n.*model_type="{REFUSED[name]}": is not implemented. Implemented are: llama, mistral'):
        load_model_config(real_data / "model_configs" / name)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2.0}, RopeScaling(kind="linear", factor=2.0)),
        (LLAMA3, RopeScaling(kind="llama3", factor=8.0, original_max_positions=64)),
    ],
)
def test_hub_form_and_transformers_5_form_are_read_alike(scaling: dict | None, expected: RopeScaling | None) -> None:
    old = from_hf(hub_config(rope_theta=5e5, rope_scaling=scaling))
    new = from_hf(
        hub_config(
            rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="bfloat16", rope_parameters={"rope_theta": 5e5, **(scaling or {})}
        )
    )
    both = from_hf(
        hub_config(rope_theta=5e5, rope_scaling=scaling, rope_parameters={"rope_theta": 5e5, **(scaling or {"rope_type": "default"})})
    )
    assert old == new == both
    assert old.rope_theta == 5e5 and old.rope_scaling == expected


def test_what_a_family_fixes_and_what_its_config_tells() -> None:
    llama = from_hf(hub_config("llama", attention_bias=True, mlp_bias=True, sliding_window=7))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm, llama.sliding_window) == (True, True, True, "none", None)
    qwen2 = from_hf(hub_config("qwen2", attention_bias=False, sliding_window=7))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm, qwen2.sliding_window) == (True, False, False, "none", None)
    qwen3 = from_hf(hub_config("qwen3"))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, "head", 128)
    assert from_hf(hub_config("qwen3", attention_bias=True)).o_bias
    assert from_hf(hub_config("llama", num_key_value_heads=...)).num_kv_heads == 4
    assert from_hf(hub_config("mistral", num_attention_heads=16, num_key_value_heads=...)).num_kv_heads == 8
    assert from_hf(hub_config("llama", head_dim=20)).head_dim == 20


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("mistral", {}, 4096),  # transformers' default for a config.json that does not say
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 16}, 16),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, None),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 16),
        ("qwen3", {"sliding_window": None, "layer_types": ["full_attention"] * 3}, None),
    ],
)
def test_sliding_window(model_type: str, changes: dict, window: int | None) -> None:
    config = from_hf(hub_config(model_type, **changes))
    assert config.sliding_window == window
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, r'model_type="bert": is not implemented. Implemented are: llama, mistral, qwen2, qwen3'),
        ({"model_type": ...}, r"model_type=null"),
        ({"model_type": ["llama"]}, r'model_type=\["llama"\]'),
        ({"hidden_act": "gelu"}, r'hidden_act="gelu": only "silu"'),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config=.*gptq"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures=.*not a causal language model"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r'rope_type="yarn": is not implemented.*default, linear, llama3'),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, r'rope_type="dynamic"'),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, r'rope_type="longrope"'),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, r"high_freq_factor=1.0: must exceed"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"low_freq_factor: is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, r"factor=-1: must be a number above 0"),
        ({"rope_scaling": "linear"}, r"rope_scaling=.*must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, r"rope_parameters=.*differs between layers"),
        ({"rope_parameters": {"rope_theta": 2e4}}, r"rope_theta=10000.0: the rope parameters say 20000.0"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, r"rope_scaling.rope_type=llama3"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3: must divide num_attention_heads=4"),
        ({"hidden_size": 30}, r"hidden_size=30: is not a multiple of num_attention_heads=4"),
        ({"head_dim": 7}, r"head_dim=7: must be even"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0: must be a whole number"),
        ({"vocab_size": "96"}, r'vocab_size="96": must be a whole number'),
        ({"hidden_size": 10**30}, r"hidden_size=1000"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps=NaN: must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, r'tie_word_embeddings="yes": must be true or false'),
        ({"layer_types": ["linear_attention"] * 3}, r"layer_types=.*other kinds of layer"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, r"such a mixture is not implemented"),
        ({"layer_types": ["sliding_attention"] * 3}, r"none is switched on"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, r"no layer has a window, but sliding_window=4096"),
        (
            {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            r"sliding_window=16: 2 of 3 layers .*max_window_layers=1.* mixture",
        ),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": "1"}, r"max_window_layers=\"1\""),
    ],
)
def test_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(hub_config(**changes))


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        from_hf({"model_type": "llama", "hidden_act": "relu", "rope_scaling": {"type": "yarn"}})
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
    assert all(f"{key}: is missing" in str(error.value) for key in needed)
    assert "hidden_act" in str(error.value) and "yarn" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"llama"'])
def test_a_config_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (is not valid JSON|holds a)"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_to_hf_keeps_harmless_keys_and_writes_both_forms(family: str) -> None:
    config = from_hf(hub_config(family, rope_scaling=LLAMA3, sliding_window=None, eos_token_id=[7, 9]))
    raw = to_hf(config, {"eos_token_id": [7, 9], "rope_theta": 1.0, "hidden_size": 1}, dtype="bfloat16")
    assert raw["eos_token_id"] == [7, 9] and raw["torch_dtype"] == raw["dtype"] == "bfloat16"
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 10000.0
    assert raw["rope_scaling"]["factor"] == raw["rope_parameters"]["factor"] == 8.0
    assert from_hf(json.loads(json.dumps(raw))) == config


def test_a_config_is_hashable_and_frozen() -> None:
    config = from_hf(hub_config())
    assert isinstance(config, ModelConfig) and hash(config) == hash(from_hf(hub_config()))
