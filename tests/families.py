"""A tiny config.json for every family, as on the hub, and variants that take other code paths."""

import copy
from collections.abc import Collection
from typing import Any

import pytest

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.config_json import from_hf

_IDS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    **_IDS,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 9,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"type": "longrope", "short_factor": [1.1, 1.5], "long_factor": [2.0, 8.0]}

TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **_GEMMA},
    "gemma3": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5},
    "phi3": {"model_type": "phi3", "sliding_window": 9},
    "phi3 long": {
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_scaling": LONGROPE,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.1,
        **_IDS,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": 9,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": _YARN,
        "rope_theta": 15000.0,
    },
}


def quick_and_slow(quick: Collection[str]) -> list[Any]:
    """Parameters for a test of every family, of which those that are not named are slow ones."""
    params = []
    for name in TINY:
        marks = () if name in quick else (pytest.mark.slow,)
        params.append(pytest.param(name, marks=marks))
    return params


def raw_config(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model; a change to `...` removes a key."""
    sizes = {} if TINY[name]["model_type"] == "gpt2" else _SIZES
    # A copy, since transformers writes into the rope parameters that it is given.
    every = copy.deepcopy({**sizes, **TINY[name], **changes})
    return {key: value for key, value in every.items() if value is not ...}


def tiny(name: str, **changes: Any) -> ModelConfig:
    """The ModelConfig of a tiny model."""
    return from_hf(raw_config(name, **changes))


PLAIN = ModelConfig(
    family="llama",
    vocab_size=40,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=24,
    max_positions=64,
)
