"""A config.json is refused where it is malformed, contradicts itself or is not implemented."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.models.hf.config_json import from_hf, load_model_config, to_hf
from tests.families import TINY, raw_config, tiny
from tests.models.hf.test_config_json import hub_config


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
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps=1000.*: must be a number above 0"),
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


def test_all_problems_are_listed_at_once_and_once() -> None:
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
        match=rf'{tmp_path}.*\n.*model_type="deepseek_v3": is not implemented. Implemented are: ',
    ):
        load_model_config(tmp_path)


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
