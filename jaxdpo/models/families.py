"""FAMILIES: what a Hugging Face model_type means, one row each; nothing else in the package compares a family's name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a model_type fixes. A bool is fixed; a string names the config.json key that tells (false when absent)."""

    architecture: str
    window: Literal["never", "always", "flag"] = "never"
    """Whether the key sliding_window counts: never, always, or only when use_sliding_window is true."""
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: Literal["none", "head", "all"] = "none"
    head_dim: int | None = None
    """head_dim when config.json has none. None: hidden_size / num_attention_heads."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other values that transformers takes for keys that config.json leaves out."""


FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(architecture="MistralForCausalLM", window="always", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        window="flag",
        qkv_bias=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        window="flag",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        head_dim=128,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
}


class _Reader:
    """Reads typed values of config.json and collects every problem, so that all are told at once."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.raw = {**defaults, **raw}
        self.problems: list[str] = []
