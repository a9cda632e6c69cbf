"""ModelConfig from config.json and back: every family, the real configs, and transformers' own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.config_json import from_hf, load_model_config, to_hf
from jaxdpo.models.hf.families import FAMILIES
from tests.families import TINY, raw_config, tiny

REAL = (
    "gemma-2-2b",
    "gemma-3-1b",
    "gpt-oss-20b",
    "gpt2",
    "llama-2-7b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "mistral-7b-v0.1",
    "mixtral-8x7b",
    "olmo-2-1124-7b",
    "phi-3-mini-4k",
    "phi-4",
    "qwen2-1.5b-instruct",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-30b-a3b",
    "qwen3-8b",
    "smollm2-135m",
    "smollm2-360m",
)


def hub_config(model_type: Any = "llama", **changes: Any) -> dict[str, Any]:
    """A small config.json in the hub's form; a change to `...` leaves the key out."""
    base = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "num_hidden_layers": 3,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    return raw_config("llama", **{"model_type": model_type, **base, **changes})


@pytest.mark.parametrize("name", REAL)
def test_real_configs_survive_writing_and_reading(real_data: Path, name: str) -> None:
    raw = json.loads((real_data / "model_configs" / name / "config.json").read_text())
    config = load_model_config(real_data / "model_configs" / name)
    assert from_hf(to_hf(config, raw)) == config == from_hf(to_hf(config))


def test_every_real_config_is_tried(real_data: Path) -> None:
    assert sorted(
        path.parent.name for path in real_data.glob("model_configs/*/config.json")
    ) == sorted(REAL)


def test_what_the_real_configs_say(real_data: Path) -> None:
    def has(name: str, **fields: Any) -> None:
        config = load_model_config(real_data / "model_configs" / name)
        assert {field: getattr(config, field) for field in fields} == fields

    has(
        "gemma-2-2b",
        attention_softcap=50.0,
        logit_softcap=30.0,
        embed_scale=48.0,
        attention_scale=1 / 16,
        window_layers=(True, False) * 13,
        sliding_window=4096,
        tied_head=True,
        norm="rms_offset",
        pre_norm=True,
        post_norm=True,
        qk_norm="none",
    )
    has(
        "gemma-3-1b",
        window_layers=((True,) * 5 + (False,)) * 4 + (True, True),
        attention_softcap=None,
        rope_theta=1e6,
        local_rope_theta=1e4,
        qk_norm="head",
    )
    has(
        "gpt-oss-20b",
        attention_sinks=True,
        router_bias=True,
        expert_bias=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=False,
        activation="clamped_swish",
        activation_limit=7.0,
        num_experts=32,
        experts_per_token=4,
        window_layers=(True, False) * 12,
        sliding_window=128,
    )
    scaling = load_model_config(real_data / "model_configs" / "gpt-oss-20b").rope_scaling
    assert scaling is not None and (scaling.kind, scaling.truncate) == ("yarn", False)
    assert scaling.attention_factor == pytest.approx(1.3465735902799727)
    has(
        "gpt2",
        norm="layer",
        positions="learned",
        gated=False,
        mlp_size=3072,
        activation="gelu_tanh",
        tied_head=True,
        num_kv_heads=12,
        head_dim=64,
        norm_eps=1e-5,
    )
    has("olmo-2-1124-7b", pre_norm=False, post_norm=True, qk_norm="all", norm_eps=1e-6)
    has(
        "phi-3-mini-4k",
        sliding_window=2047,
        window_layers=(True,) * 32,
        rotary_dim=96,
        head_dim=96,
    )
    has("mixtral-8x7b", num_experts=8, experts_per_token=2, norm_topk=True, router_aux_coef=0.02)
    has("qwen3-30b-a3b", mlp_size=768, qk_norm="head", norm_topk=True)


def test_the_tiny_models_are_of_every_family() -> None:
    assert {config["model_type"] for config in TINY.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", TINY)
def test_tiny_configs_survive_writing_and_reading(name: str) -> None:
    raw, config = raw_config(name), tiny(name)
    for written in (to_hf(config, raw), to_hf(config)):
        assert from_hf(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("name", TINY)
def test_to_hf_keeps_harmless_keys_and_corrects_the_others(name: str) -> None:
    config = tiny(name)
    stale = {
        "eos_token_id": [7, 9],
        "rope_theta": 1.0,
        "vocab_size": 1,
        "_name_or_path": "/home/me",
    }
    stale |= {"auto_map": {"AutoConfig": "code.Config"}, "quantization_config": {"bits": 4}}
    raw = to_hf(config, stale, dtype="bfloat16")
    assert raw["eos_token_id"] == [7, 9] and raw["torch_dtype"] == raw["dtype"] == "bfloat16"
    assert raw["vocab_size"] == config.vocab_size and not raw.keys() & {
        "_name_or_path",
        "auto_map",
        "quantization_config",
    }
    assert from_hf(json.loads(json.dumps(raw))) == config


def test_what_a_family_fixes_and_what_its_config_tells() -> None:
    llama = from_hf(hub_config("llama", attention_bias=True, mlp_bias=True, sliding_window=7))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm, llama.sliding_window) == (
        True,
        True,
        True,
        "none",
        None,
    )
    qwen2 = from_hf(hub_config("qwen2", attention_bias=False, sliding_window=7))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm, qwen2.sliding_window) == (
        True,
        False,
        False,
        "none",
        None,
    )
    qwen3 = from_hf(hub_config("qwen3"))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, "head", 128)
    assert from_hf(hub_config("qwen3", attention_bias=True)).o_bias
    assert from_hf(hub_config("llama", num_key_value_heads=...)).num_kv_heads == 4
    assert (
        from_hf(hub_config("mistral", num_attention_heads=16, num_key_value_heads=...)).num_kv_heads
        == 8
    )
    assert from_hf(hub_config("llama", head_dim=20)).head_dim == 20
    assert tiny("gpt2", n_inner=80).mlp_size == 80 and tiny("gpt2").mlp_size == 128
    assert tiny("gemma2", attn_logit_softcapping=None).attention_softcap is None
    assert tiny(
        "gpt_oss", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []}
    ) == tiny("gpt_oss")


@pytest.mark.parametrize(
    ("model_type", "changes", "window", "layers"),
    [
        (
            "mistral",
            {},
            4096,
            [1, 1, 1],
        ),  # transformers' default for a config.json that does not say
        ("mistral", {"sliding_window": None}, None, []),
        ("mistral", {"sliding_window": 16}, 16, [1, 1, 1]),
        ("mixtral", {}, None, []),
        ("mixtral", {"sliding_window": 16}, 16, [1, 1, 1]),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, None, []),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
            16,
            [1, 1, 1],
        ),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
            16,
            [0, 0, 1],
        ),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
            None,
            [],
        ),
        (
            "qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 3,
            },
            16,
            [1, 1, 1],
        ),
        ("qwen3", {"sliding_window": None, "layer_types": ["full_attention"] * 3}, None, []),
        (
            "qwen3_moe",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
            16,
            [1, 1, 1],
        ),
        ("gemma2", {"sliding_window": 16}, 16, [1, 0, 1]),
        ("gemma2", {"sliding_window": 16, "layer_types": ["full_attention"] * 3}, None, []),
        (
            "gemma2",
            {
                "sliding_window": 16,
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            },
            16,
            [0, 0, 1],
        ),
        ("gemma3_text", {"sliding_window": 16}, 16, [1, 1, 1]),
        ("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 2}, 16, [1, 0, 1]),
        ("gemma3_text", {"sliding_window_pattern": 1}, None, []),
        ("gpt_oss", {}, 128, [1, 0, 1]),
    ],
)
def test_sliding_window(
    model_type: str, changes: dict, window: int | None, layers: list[int]
) -> None:
    raw = hub_config(model_type, hidden_act=..., **changes)
    config = from_hf(raw)
    assert config.sliding_window == window and config.window_layers == tuple(map(bool, layers))
    assert from_hf(to_hf(config)) == from_hf(to_hf(config, raw)) == config


def test_a_config_is_hashable_and_frozen() -> None:
    config = from_hf(hub_config())
    assert isinstance(config, ModelConfig) and hash(config) == hash(from_hf(hub_config()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TINY)
def test_transformers_reads_what_is_written_and_is_read_back(name: str) -> None:
    config = tiny(name)
    for raw in (raw_config(name), None):
        theirs = AutoConfig.for_model(**to_hf(config, raw)).to_dict()
        assert from_hf(json.loads(json.dumps(theirs))) == config


def test_a_key_with_two_names() -> None:
    """transformers 5 saves Qwen3-MoE's num_experts under another name."""
    config = tiny("qwen3_moe")
    assert (
        tiny("qwen3_moe", num_experts=..., num_local_experts=4)
        == config
        == tiny("qwen3_moe", num_local_experts=4)
    )
    assert to_hf(config)["num_experts"] == to_hf(config)["num_local_experts"] == 4
    with pytest.raises(ValueError, match="num_experts=4: num_local_experts=8 says otherwise"):
        tiny("qwen3_moe", num_local_experts=8)
