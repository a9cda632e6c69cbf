"""Names of the tensors in Hugging Face files, a list for each kind of decoder."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the files, or one for each layer (and expert) when the name has {layer}."""

    name: str
    holds: tuple[str, ...]
    """Our parameters in it, side by side along the outputs; a model may lack some."""
    inputs_first: bool = False
    """Matrices are [in, out] like ours; otherwise [out, in]."""
    interleaved: bool = False
    """Outputs alternate between the parameters: the first, the second, the first, ..."""
    mxfp4: bool = False
    """Stored as NAME_blocks and NAME_scales, see mxfp4.py."""


def _model(name: str, *holds: str, inputs_first: bool = False) -> Tensor:
    return Tensor(name, holds, inputs_first)


def _layer(
    name: str,
    *holds: str,
    inputs_first: bool = False,
    interleaved: bool = False,
    mxfp4: bool = False,
) -> Tensor:
    return Tensor(
        "model.layers.{layer}." + name,
        tuple(f"layers/{path}" for path in holds),
        inputs_first,
        interleaved,
        mxfp4,
    )


def _conv1d(name: str, *holds: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of GPT-2's Conv1D, which is a linear map stored as [in, out]."""
    paths = [f"layers/{path}" for path in holds]
    weight = Tensor(f"transformer.h.{{layer}}.{name}.weight", tuple(paths), inputs_first=True)
    return weight, Tensor(
        f"transformer.h.{{layer}}.{name}.bias", tuple(f"{path}_bias" for path in paths)
    )


_EMBED = _model("model.embed_tokens.weight", "embed/weight", inputs_first=True)
_END = (
    _model("model.norm.weight", "norm/scale"),
    _model("lm_head.weight", "head/weight", inputs_first=True),
)
_OUTPUT = (
    _layer("self_attn.o_proj.weight", "attn/o"),
    _layer("self_attn.o_proj.bias", "attn/o_bias"),
)
_ATTENTION = (
    *(_layer(f"self_attn.{name}_proj.weight", f"attn/{name}") for name in "qkv"),
    *(_layer(f"self_attn.{name}_proj.bias", f"attn/{name}_bias") for name in "qkv"),
    *_OUTPUT,
    *(_layer(f"self_attn.{name}_norm.weight", f"attn/{name}_norm") for name in "qk"),
)
_MLP = (
    *(_layer(f"mlp.{name}_proj.weight", f"mlp/{name}") for name in ("gate", "up", "down")),
    *(_layer(f"mlp.{name}_proj.bias", f"mlp/{name}_bias") for name in ("gate", "up", "down")),
)
_PRE_NORMS = (
    _layer("input_layernorm.weight", "attn_norm/scale"),
    _layer("post_attention_layernorm.weight", "mlp_norm/scale"),
)
_SINKS = _layer("self_attn.sinks", "attn/sinks")

LLAMA = (_EMBED, *_PRE_NORMS, *_ATTENTION, *_MLP, *_END)

GEMMA = (
    _EMBED,
    _layer("input_layernorm.weight", "attn_norm/scale"),
    _layer("post_attention_layernorm.weight", "attn_post_norm/scale"),
    _layer("pre_feedforward_layernorm.weight", "mlp_norm/scale"),
    _layer("post_feedforward_layernorm.weight", "mlp_post_norm/scale"),
    *_ATTENTION,
    *_MLP,
    *_END,
)

OLMO2 = (
    _EMBED,
    _layer("post_attention_layernorm.weight", "attn_post_norm/scale"),
    _layer("post_feedforward_layernorm.weight", "mlp_post_norm/scale"),
    *_ATTENTION,
    *_MLP,
    *_END,
)

PHI3 = (
    _EMBED,
    *_PRE_NORMS,
    _layer("self_attn.qkv_proj.weight", "attn/q", "attn/k", "attn/v"),
    *_OUTPUT,
    _layer("mlp.gate_up_proj.weight", "mlp/gate", "mlp/up"),
    _layer("mlp.down_proj.weight", "mlp/down"),
    *_END,
)

GPT2 = (
    _model("transformer.wte.weight", "embed/weight", inputs_first=True),
    _model("transformer.wpe.weight", "positions/weight", inputs_first=True),
    Tensor("transformer.h.{layer}.ln_1.weight", ("layers/attn_norm/scale",)),
    Tensor("transformer.h.{layer}.ln_1.bias", ("layers/attn_norm/bias",)),
    *_conv1d("attn.c_attn", "attn/q", "attn/k", "attn/v"),
    *_conv1d("attn.c_proj", "attn/o"),
    Tensor("transformer.h.{layer}.ln_2.weight", ("layers/mlp_norm/scale",)),
    Tensor("transformer.h.{layer}.ln_2.bias", ("layers/mlp_norm/bias",)),
    *_conv1d("mlp.c_fc", "mlp/up"),
    *_conv1d("mlp.c_proj", "mlp/down"),
    _model("transformer.ln_f.weight", "norm/scale"),
    _model("transformer.ln_f.bias", "norm/bias"),
    _model("lm_head.weight", "head/weight", inputs_first=True),
)

_EXPERT = "block_sparse_moe.experts.{expert}."
MIXTRAL = (
    _EMBED,
    *_PRE_NORMS,
    *_ATTENTION,
    _layer("block_sparse_moe.gate.weight", "moe/router"),
    *(
        _layer(f"{_EXPERT}{name}.weight", f"moe/{ours}")
        for name, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
    ),
    *_END,
)

_ROUTER = _layer("mlp.gate.weight", "moe/router")
QWEN3_MOE = (
    _EMBED,
    *_PRE_NORMS,
    *_ATTENTION,
    _ROUTER,
    *(
        _layer(f"mlp.experts.{{expert}}.{name}_proj.weight", f"moe/{name}")
        for name in ("gate", "up", "down")
    ),
    *_END,
)

JOINT_EXPERTS = (
    _EMBED,
    *_PRE_NORMS,
    *_ATTENTION,
    _ROUTER,
    _layer("mlp.experts.gate_up_proj", "moe/gate", "moe/up"),
    _layer("mlp.experts.down_proj", "moe/down"),
    *_END,
)
"""Mixtral's and Qwen3-MoE's names in transformers 5's modules, which its files can have too."""

_GPT_OSS = (
    _EMBED,
    *_PRE_NORMS,
    *_ATTENTION,
    _SINKS,
    _layer("mlp.router.weight", "moe/router"),
    _layer("mlp.router.bias", "moe/router_bias"),
    _layer("mlp.experts.gate_up_proj_bias", "moe/gate_bias", "moe/up_bias", interleaved=True),
    _layer("mlp.experts.down_proj_bias", "moe/down_bias"),
)
GPT_OSS = (
    *_GPT_OSS,
    _layer("mlp.experts.gate_up_proj", "moe/gate", "moe/up", inputs_first=True, interleaved=True),
    _layer("mlp.experts.down_proj", "moe/down", inputs_first=True),
    *_END,
)
GPT_OSS_MXFP4 = (
    *_GPT_OSS,
    _layer("mlp.experts.gate_up_proj", "moe/gate", "moe/up", interleaved=True, mxfp4=True),
    _layer("mlp.experts.down_proj", "moe/down", mxfp4=True),
    *_END,
)
