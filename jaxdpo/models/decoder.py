"""One decoder for every family: what differs between families are ModelConfig's values.

The nnx modules are containers: they declare the weights, each with its logical axes and stacked
over the layers. Training code holds the weights as a nested dict (`layers/attn/q`, ...; params.py)
and calls forward.py. `params["lora"]`, where there is one, holds LoRA updates of
`params["layers"]`. The LM head is applied in logprobs.py, since training needs it for loss tokens
only.

Shape suffixes: B packed sequences, T token positions, D model, N query heads, K kv heads, H head
dim, F mlp, V vocab, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.layers import (
    ACTIVATIONS,
    apply_rope,
    constant_if,
    gated_activation,
    layer_norm,
    linear,
    param,
    rms_norm,
    round_to,
)
from jaxdpo.models.moe import MoE, RouterLoad

Rope = tuple[jax.Array, jax.Array] | None
"""Cosines and sines; None for learned positions."""
Attend = Callable[..., tuple[jax.Array, Any]]
"""(q_BTNH, k_BTKH, v_BTKH, scale, cap, sinks_N) -> float32 [B, T, N, H], and what to cache of
this layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a forward pass runs; except for lora_scale, nothing here changes more than rounding."""

    compute_dtype: str = "float32"
    """Dtype of matmul inputs (mixed precision)."""
    attention: str = "blocks"
    """A key of attention.IMPLEMENTATIONS."""
    remat: str = "none"
    """Remat (gradient checkpointing) policy: a key of forward.REMAT."""
    lora_scale: float = 1.0
    """Factor of the LoRA updates: alpha / rank."""
    mesh: Mesh | None = None
    """The devices; None means one."""

    @property
    def dtype(self) -> jnp.dtype:
        """compute_dtype as a dtype."""
        return jnp.dtype(self.compute_dtype)

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        if self.mesh is None:
            return jax.default_backend() == "cpu"
        return self.mesh.devices.flat[0].platform == "cpu"


class Attention(nnx.Module):
    """Grouped-query attention (2305.13245) with rotary position embedding.

    Optional: biases, attention sinks, RMS norms of queries and keys.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        L, D, H = config.num_layers, config.hidden_size, config.head_dim
        N, K = config.num_heads, config.num_kv_heads
        normal = functools.partial(
            param, rngs, std=config.initializer_range, dtype=dtype, num_inputs=1
        )
        bias = functools.partial(constant_if, config.qkv_bias, rngs, dtype=dtype)
        self.q = normal((L, D, N, H), ("layer", "embed", "heads", "head_dim"))
        self.k = normal((L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.v = normal((L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.o = normal((L, N, H, D), ("layer", "heads", "head_dim", "embed"), num_inputs=2)
        self.q_bias = bias((L, N, H), ("layer", "heads", "head_dim"))
        self.k_bias = bias((L, K, H), ("layer", "kv_heads", "head_dim"))
        self.v_bias = bias((L, K, H), ("layer", "kv_heads", "head_dim"))
        self.o_bias = constant_if(config.o_bias, rngs, (L, D), ("layer", "norm"), dtype=dtype)
        self.sinks = constant_if(
            config.attention_sinks, rngs, (L, N), ("layer", "heads"), dtype=dtype
        )
        norm = functools.partial(
            constant_if,
            config.qk_norm != "none",
            rngs,
            dtype=dtype,
            fill=_initial_scale(config),
        )
        if config.qk_norm == "all":
            self.q_norm = norm((L, N, H), ("layer", "heads", "head_dim"))
            self.k_norm = norm((L, K, H), ("layer", "kv_heads", "head_dim"))
        else:
            self.q_norm = norm((L, H), ("layer", "norm"))
            self.k_norm = norm((L, H), ("layer", "norm"))
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: Rope,
        attend: Attend,
        lora: Mapping[str, Any],
        options: ForwardOptions,
    ) -> tuple[jax.Array, Any]:
        """float32 [B, T, D] in and out, and what `attend` caches."""
        config, dtype = self.config, options.dtype
        project = functools.partial(linear, compute_dtype=dtype, adapter_scale=options.lora_scale)
        q_BTNH = project("BTD,DNH->BTNH", x_BTD, self.q, self.q_bias, adapter=lora.get("q"))
        k_BTKH = project("BTD,DKH->BTKH", x_BTD, self.k, self.k_bias, adapter=lora.get("k"))
        v_BTKH = project("BTD,DKH->BTKH", x_BTD, self.v, self.v_bias, adapter=lora.get("v"))
        if self.q_norm is not None and self.k_norm is not None:
            norm = functools.partial(
                rms_norm, eps=config.norm_eps, compute_dtype=dtype, offset=_norm_offset(config)
            )
            q_BTNH, k_BTKH = norm(q_BTNH, self.q_norm), norm(k_BTKH, self.k_norm)
        if rope is not None:
            q_BTNH, k_BTKH = apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope)
        scale = config.attention_scale
        if scale is None:
            scale = config.head_dim**-0.5
        sinks_N = None if self.sinks is None else round_to(self.sinks[...], dtype)
        out_BTNH, new_cache = attend(
            q_BTNH.astype(dtype),
            k_BTKH.astype(dtype),
            v_BTKH.astype(dtype),
            scale=scale,
            cap=config.attention_softcap,
            sinks_N=sinks_N,
        )
        out_BTD = project("BTNH,NHD->BTD", out_BTNH, self.o, self.o_bias, adapter=lora.get("o"))
        return out_BTD, new_cache


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (2002.05202), or down(act(up(x))) without a gate."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        L, D, F = config.num_layers, config.hidden_size, config.mlp_size
        normal = functools.partial(
            param, rngs, std=config.initializer_range, dtype=dtype, num_inputs=1
        )
        bias = functools.partial(constant_if, config.mlp_bias, rngs, dtype=dtype)
        self.gate = normal((L, D, F), ("layer", "embed", "mlp")) if config.gated else None
        self.up = normal((L, D, F), ("layer", "embed", "mlp"))
        self.down = normal((L, F, D), ("layer", "mlp", "embed"))
        self.gate_bias = bias((L, F), ("layer", "mlp")) if config.gated else None
        self.up_bias = bias((L, F), ("layer", "mlp"))
        self.down_bias = bias((L, D), ("layer", "norm"))
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, lora: Mapping[str, Any], options: ForwardOptions
    ) -> jax.Array:
        """float32 [B, T, D] in and out."""
        config = self.config
        project = functools.partial(
            linear, compute_dtype=options.dtype, adapter_scale=options.lora_scale
        )
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up, self.up_bias, adapter=lora.get("up"))
        if self.gate is None:
            inner_BTF = ACTIVATIONS[config.activation](up_BTF)
        else:
            gate_BTF = project(
                "BTD,DF->BTF", x_BTD, self.gate, self.gate_bias, adapter=lora.get("gate")
            )
            inner_BTF = gated_activation(
                config.activation, config.activation_limit, gate_BTF, up_BTF
            )
        return project(
            "BTF,FD->BTD", inner_BTF, self.down, self.down_bias, adapter=lora.get("down")
        )


class Norm(nnx.Module):
    """The family's norm: one, or with num_layers a stack of them."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        num_layers: int | None = None,
    ) -> None:
        shape, axes = (config.hidden_size,), ("norm",)
        if num_layers is not None:
            shape, axes = (num_layers, *shape), ("layer", *axes)
        constant = functools.partial(param, rngs, shape, axes, std=None, dtype=dtype)
        self.scale = constant(fill=_initial_scale(config))
        self.bias = constant() if config.norm == "layer" else None
        self.config = config

    def __call__(self, x_BTD: jax.Array, options: ForwardOptions) -> jax.Array:
        """float32 [B, T, D] in and out."""
        eps, offset = self.config.norm_eps, _norm_offset(self.config)
        if self.bias is not None:
            return layer_norm(x_BTD, self.scale, self.bias, eps, options.dtype)
        return rms_norm(x_BTD, self.scale, eps, options.dtype, offset=offset)


def _norm_offset(config: ModelConfig) -> float:
    """What is added to a norm's scale (Gemma stores the scale minus 1)."""
    return 1.0 if config.norm == "rms_offset" else 0.0


def _initial_scale(config: ModelConfig) -> float:
    """A norm's initial scale, so that it multiplies by 1."""
    return 1.0 - _norm_offset(config)


class Layer(nnx.Module):
    """Attention and MLP, each added to the residual stream, with norms before or after them.

    It holds the weights of all layers, stacked.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        norm = functools.partial(Norm, config, rngs=rngs, dtype=dtype, num_layers=config.num_layers)
        self.attn_norm = norm() if config.pre_norm else None
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.attn_post_norm = norm() if config.post_norm else None
        self.mlp_norm = norm() if config.pre_norm else None
        self.mlp = None if config.num_experts else MLP(config, rngs=rngs, dtype=dtype)
        self.moe = MoE(config, rngs=rngs, dtype=dtype) if config.num_experts else None
        self.mlp_post_norm = norm() if config.post_norm else None

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: Rope,
        attend: Attend,
        lora: Mapping[str, Any],
        token_mask_BT: jax.Array | None,
        options: ForwardOptions,
    ) -> tuple[jax.Array, Any, RouterLoad | None]:
        """One layer.

        Returns:
            (float32 [B, T, D], as x_BTD; what `attend` caches; how the experts were used, None
            without experts.)
        """
        inner_BTD = _norm_if(self.attn_norm, x_BTD, options)
        inner_BTD, new_cache = self.attn(inner_BTD, rope, attend, lora.get("attn", {}), options)
        x_BTD = x_BTD + _norm_if(self.attn_post_norm, inner_BTD, options)
        inner_BTD = _norm_if(self.mlp_norm, x_BTD, options)
        load = None
        if self.moe is not None:
            inner_BTD, load = self.moe(inner_BTD, token_mask_BT, options.dtype, options.mesh)
        elif self.mlp is not None:
            inner_BTD = self.mlp(inner_BTD, lora.get("mlp", {}), options)
        x_BTD = x_BTD + _norm_if(self.mlp_post_norm, inner_BTD, options)
        return x_BTD, new_cache, load


def _norm_if(norm: Norm | None, x_BTD: jax.Array, options: ForwardOptions) -> jax.Array:
    return x_BTD if norm is None else norm(x_BTD, options)


class Embed(nnx.Module):
    """One vector per token [V, D], which is also the layout of the LM head, or per position."""

    def __init__(
        self, config: ModelConfig, size: int, axis: str, *, rngs: nnx.Rngs, dtype: jnp.dtype
    ) -> None:
        self.weight = param(
            rngs,
            (size, config.hidden_size),
            (axis, "embed"),
            std=config.initializer_range,
            dtype=dtype,
            num_inputs=1,
        )


class Decoder(nnx.Module):
    """All the weights of a model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        embed = functools.partial(Embed, config, rngs=rngs, dtype=dtype)
        self.embed = embed(config.vocab_size, "vocab")
        learned = config.positions == "learned"
        self.positions = embed(config.max_positions, "position") if learned else None
        self.layers = Layer(config, rngs=rngs, dtype=dtype)
        self.norm = Norm(config, rngs=rngs, dtype=dtype)
        self.head = None if config.tied_head else embed(config.vocab_size, "vocab")
