"""ModelConfig from config.json and back: every family, the real configs, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
    gemma2, gemma3, oss, gpt2, olmo, phi3, mixtral, qwen_moe = (
        load_model_config(real_data / "model_configs" / name)
        for name in (
            "gemma-2-2b",
            "gemma-3-1b",
            "gpt-oss-20b",
            "gpt2",
            "olmo-2-1124-7b",
            "phi-3-mini-4k",
            "mixtral-8x7b",
            "qwen3-30b-a3b",
        )
    )
    assert (
        gemma2.attention_softcap,
        gemma2.logit_softcap,
        gemma2.embed_scale,
        gemma2.attention_scale,
    ) == (50.0, 30.0, 48.0, 1 / 16)
    assert (
        gemma2.window_layers == (True, False) * 13
        and gemma2.sliding_window == 4096
        and gemma2.tied_head
    )
    assert (gemma2.norm, gemma2.pre_norm, gemma2.post_norm, gemma2.qk_norm) == (
        "rms_offset",
        True,
        True,
        "none",
    )
    assert (
        gemma3.window_layers == ((True,) * 5 + (False,)) * 4 + (True, True)
        and gemma3.attention_softcap is None
    )
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.qk_norm) == (1e6, 1e4, "head")
    assert oss.rope_scaling is not None and (oss.rope_scaling.kind, oss.rope_scaling.truncate) == (
        "yarn",
        False,
    )
    assert oss.rope_scaling.attention_factor == pytest.approx(1.3465735902799727)
    assert (
        oss.attention_sinks
        and oss.router_bias
        and oss.expert_bias
        and oss.qkv_bias
        and oss.o_bias
        and not oss.mlp_bias
    )
    assert (oss.activation, oss.activation_limit, oss.num_experts, oss.experts_per_token) == (
        "clamped_swish",
        7.0,
        32,
        4,
    )
    assert oss.window_layers == (True, False) * 12 and oss.sliding_window == 128
    assert (gpt2.norm, gpt2.positions, gpt2.gated, gpt2.mlp_size, gpt2.activation) == (
        "layer",
        "learned",
        False,
        3072,
        "gelu_tanh",
    )
    assert (
        gpt2.tied_head and gpt2.num_kv_heads == 12 and gpt2.head_dim == 64 and gpt2.norm_eps == 1e-5
    )
    assert (olmo.pre_norm, olmo.post_norm, olmo.qk_norm, olmo.norm_eps) == (
        False,
        True,
        "all",
        1e-6,
    )
    assert (
        phi3.sliding_window == 2047
        and all(phi3.window_layers)
        and phi3.rotary_dim == phi3.head_dim == 96
    )
    assert (
        mixtral.num_experts,
        mixtral.experts_per_token,
        mixtral.norm_topk,
        mixtral.router_aux_coef,
    ) == (8, 2, True, 0.02)
    assert (qwen_moe.mlp_size, qwen_moe.qk_norm, qwen_moe.norm_topk) == (768, "head", True)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "bert"},
            r'model_type="bert": is not implemented. Implemented are: llama, mistral, qwen2, qwen3',
        ),
        ({"model_type": "gemma3"}, r'model_type="gemma3": is not implemented'),
        ({"model_type": ...}, r"model_type=null"),
        ({"model_type": ["llama"]}, r'model_type=\["llama"\]'),
        ({"hidden_act": "gelu"}, r'hidden_act="gelu": only "silu"'),
        ({"hidden_act": ["silu"]}, r'hidden_act=\["silu"\]: only "silu"'),
        (
            {"model_type": "gemma2", "hidden_activation": "gelu"},
            r'hidden_activation="gelu": only "gelu_pytorch_tanh"',
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            r"use_bidirectional_attention=true: only false",
        ),
        (
            {"model_type": "gemma2", "query_pre_attn_scalar": 0},
            r"query_pre_attn_scalar=0: must be a whole number",
        ),
        (
            {"model_type": "gemma2", "final_logit_softcapping": -1},
            r"final_logit_softcapping=-1: must be a number above 0",
        ),
        (
            {"model_type": "gemma2", "sliding_window": None},
            r"sliding_window=null: 2 layers have a window",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config=.*gptq"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantization_config=.*mxfp4"),
        ({"model_type": "gpt_oss", "quantization_config": "fp8"}, r"quantization_config=.*fp8"),
        ({"model_type": "gpt_oss", "swiglu_alpha": 1.5}, r"swiglu_alpha=1.5: only 1.702"),
        (
            {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
            r"decoder_sparse_step=2: only 1 is",
        ),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
            r"mlp_only_layers=\[0\]: only \[\] is",
        ),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9},
            r"num_experts_per_tok=9: .*at most num_local_experts=8",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": None},
            r"num_experts_per_tok=2: .*at most num_local_experts=0",
        ),
        (
            {"model_type": "mixtral", "router_aux_loss_coef": -1},
            r"router_aux_loss_coef=-1: must be a number of at least 0",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"architectures=.*not a causal language model",
        ),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30.0"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3: must divide num_attention_heads=4"),
        ({"hidden_size": 30}, r"hidden_size=30: is not a multiple of num_attention_heads=4"),
        ({"head_dim": 7}, r"head_dim=7: must be even"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0: must be a whole number"),
        ({"num_hidden_layers": 10**11}, r"num_hidden_layers=100000000000: must be at most 16384"),
        ({"vocab_size": "96"}, r'vocab_size="96": must be a whole number'),
        ({"hidden_size": 10**30}, r"hidden_size=1000"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps=NaN: must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, r'tie_word_embeddings="yes": must be true or false'),
        (
            {"layer_types": ["linear_attention"] * 3},
            r"layer_types=.*other kinds are not implemented",
        ),
        ({"layer_types": 3}, r"layer_types=3: must name 3 layers"),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention"] * 4},
            r"layer_types=.*must name 3 layers",
        ),
        (
            {"layer_types": ["sliding_attention"] * 3},
            r"3 layers have a window \(layer_types\), but none is switched on",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
            r"one kind of layer, and sliding_window=4096",
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 16,
                "use_sliding_window": True,
                "max_window_layers": "1",
            },
            r"max_window_layers=\"1\"",
        ),
    ],
)
def test_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(hub_config(**({"hidden_act": ...} if "model_type" in changes else {}) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=true: only false",
        ),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=true: only false"),
        ({"scale_attn_weights": False}, "scale_attn_weights=false: only true"),
        ({"add_cross_attention": True}, "add_cross_attention=true: only false"),
        (
            {"activation_function": "relu"},
            'activation_function="relu": only "gelu_new" or "gelu_pytorch_tanh"',
        ),
        ({"n_head": 5}, "n_embd=32: is not a multiple of n_head=5"),
        ({"n_positions": ...}, "n_positions: is missing"),
        (
            {"architectures": ["GPT2DoubleHeadsModel"]},
            "architectures=.*not a causal language model",
        ),
    ],
)
def test_refused_by_name_of_gpt2(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("gpt2", **changes)


def test_all_problems_are_told_at_once_and_once() -> None:
    with pytest.raises(ValueError) as error:
        from_hf({"model_type": "llama", "hidden_act": "relu", "rope_scaling": {"type": "dynamic"}})
    needed = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ]
    assert all(str(error.value).count(f"{key}: is missing") == 1 for key in needed)
    assert "hidden_act" in str(error.value) and "dynamic" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"llama"'])
def test_a_config_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (is not valid JSON|holds a)"):
        load_model_config(tmp_path)


def test_an_unknown_architecture_is_refused_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hub_config("deepseek_v3")))
    with pytest.raises(
        ValueError,
        match=rf'{tmp_path}.*\n.*model_type="deepseek_v3": is not implemented. Implemented are: llama',
    ):
        load_model_config(tmp_path)


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


_WORDS = ["yarn", "default", "sliding_attention"]
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(_WORDS),
    lambda part: (
        st.lists(part, max_size=4)
        | st.dictionaries(
            st.sampled_from(["rope_type", "factor", "full_attention"]), part, max_size=3
        )
    ),
    max_leaves=6,
)
_KEYS = sorted(
    {key for name in TINY for raw in (raw_config(name), to_hf(tiny(name))) for key in raw}
    | {"quantization_config"}
)


@given(
    name=st.sampled_from(sorted(TINY)),
    changes=st.dictionaries(st.sampled_from(_KEYS), _JSON, min_size=1, max_size=3),
)
@settings(max_examples=200)
def test_whatever_config_json_says_is_read_or_refused(name: str, changes: dict) -> None:
    try:
        config = from_hf(raw_config(name) | changes)
    except ValueError:
        return
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
