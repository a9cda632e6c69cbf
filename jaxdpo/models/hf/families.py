"""FAMILIES: what a Hugging Face model_type means, one entry each.

Nothing else in the package compares a family's name. Defaults are those of the configuration
classes of transformers, for keys that config.json leaves out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxdpo.models.hf import tensor_names
from jaxdpo.models.hf.tensor_names import Tensor

KEYS: dict[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tied_head": "tie_word_embeddings",
}
"""ModelConfig field -> key of config.json, in most families."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How a model_type's config.json is read, what it fixes, and what its tensors are called."""

    architecture: str
    tensors: tuple[Tensor, ...] = tensor_names.LLAMA
    """Names of the tensors, as they are written."""
    other_tensors: tuple[tuple[Tensor, ...], ...] = ()
    """Other layouts of the files that are read too."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """ModelConfig fields that the model_type fixes."""
    keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """Differences from KEYS, and additions; None: no key, the value follows from others."""
    mlp_ratio: int | None = None
    """mlp_size / hidden_size when config.json has no mlp_size."""
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Key -> a second name that it may have. Both are written."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """transformers' values for keys that config.json leaves out."""
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys that change the computation -> the one value that is implemented."""
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"silu": "silu"})
    """Value of that key -> ModelConfig.activation. The first is the default and what is written."""
    scalar_key: str | None = None
    """Key of n in the attention scale 1 / sqrt(n); None: n is the head size."""
    scaled_embedding: bool = False
    """Whether token embeddings are multiplied by sqrt(hidden_size)."""
    window: Literal["never", "always", "flag"] = "never"
    """Whether sliding_window is read: never, always, or only when use_sliding_window is true."""
    mixed_windows: bool = False
    """Whether layers may differ: by layer_types, `window_period` or max_window_layers."""
    window_period: int | None = None
    """Without layer_types, every so many layers the last one has no window."""
    period_key: str | None = None
    """Key that gives another period."""
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """The rope_type values that are implemented; () for a model without rope."""
    rope_aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Old names of rope types."""
    rope_default: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Rope parameters of a config.json that has none."""
    partial_rope: bool = False
    """Whether partial_rotary_factor may differ from 1."""
    local_rope: bool = False
    """Whether layers with a sliding window have a rope of their own (rope_local_base_freq)."""
    quantizations: tuple[str, ...] = ()
    """quant_methods whose files are read; weights are always written unquantized."""

    def all_keys(self) -> dict[str, str]:
        """ModelConfig field -> key of config.json."""
        keys = {**KEYS, **self.keys}
        return {field: key for field, key in keys.items() if key is not None}


_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = Family(
    architecture="",
    tensors=tensor_names.GEMMA,
    activation_key="hidden_activation",
    activations={"gelu_pytorch_tanh": "gelu_tanh"},
    scalar_key="query_pre_attn_scalar",
    scaled_embedding=True,
    window="always",
    mixed_windows=True,
    only={"use_bidirectional_attention": False},
    keys={
        **_ATTENTION_BIAS,
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
)
_GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_MOE_KEYS = {"experts_per_token": "num_experts_per_tok", "router_aux_coef": "router_aux_loss_coef"}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM", keys={**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"}
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        window="always",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        window="flag",
        mixed_windows=True,
        defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fixed={"qk_norm": "head"},
        keys=_ATTENTION_BIAS,
        window="flag",
        mixed_windows=True,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    "gemma2": dataclasses.replace(
        _GEMMA,
        architecture="Gemma2ForCausalLM",
        fixed={"norm": "rms_offset", "post_norm": True},
        window_period=2,
        defaults={
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": dataclasses.replace(
        _GEMMA,
        architecture="Gemma3ForCausalLM",
        fixed={"norm": "rms_offset", "post_norm": True, "qk_norm": "head"},
        window_period=6,
        period_key="sliding_window_pattern",
        local_rope=True,
        defaults={**_GEMMA_DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        tensors=tensor_names.OLMO2,
        fixed={"pre_norm": False, "post_norm": True, "qk_norm": "all"},
        keys=_ATTENTION_BIAS,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        tensors=tensor_names.PHI3,
        window="always",
        rope_kinds=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},  # in the first Phi-3 files
        partial_rope=True,
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        tensors=tensor_names.GPT2,
        fixed={
            "norm": "layer",
            "positions": "learned",
            "gated": False,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
        },
        keys={
            "hidden_size": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "num_kv_heads": None,
            "head_dim": None,
            "mlp_size": "n_inner",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
        },
        defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        activation_key="activation_function",
        activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
        mlp_ratio=4,
        rope_kinds=(),
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        tensors=tensor_names.MIXTRAL,
        other_tensors=(tensor_names.JOINT_EXPERTS,),
        fixed={"norm_topk": True},
        keys={**_MOE_KEYS, "num_experts": "num_local_experts"},
        window="always",
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        tensors=tensor_names.QWEN3_MOE,
        other_tensors=(tensor_names.JOINT_EXPERTS,),
        fixed={"qk_norm": "head"},
        keys={
            **_ATTENTION_BIAS,
            **_MOE_KEYS,
            "mlp_size": "moe_intermediate_size",
            "num_experts": "num_experts",
            "norm_topk": "norm_topk_prob",
        },
        window="flag",
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.001,
        },
        other_names={"num_experts": "num_local_experts"},  # what transformers 5 saves
        only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        tensors=tensor_names.GPT_OSS,
        other_tensors=(tensor_names.GPT_OSS_MXFP4,),
        fixed={
            "attention_sinks": True,
            "norm_topk": True,
            "router_bias": True,
            "expert_bias": True,
        },
        keys={
            **_ATTENTION_BIAS,
            **_MOE_KEYS,
            "num_experts": "num_local_experts",
            "activation_limit": "swiglu_limit",
        },
        activations={"silu": "clamped_swish"},
        window="always",
        mixed_windows=True,
        window_period=2,
        rope_default=_GPT_OSS_ROPE,
        defaults={
            "head_dim": 64,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "sliding_window": 128,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "router_aux_loss_coef": 0.001,
        },
        only={"swiglu_alpha": 1.702},  # the constant of clamped_swish
        quantizations=("mxfp4",),
    ),
}
