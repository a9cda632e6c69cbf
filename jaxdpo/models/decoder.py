"""One decoder for every family: what differs between families are ModelConfig's values.

The nnx modules are containers. Training code holds the weights as a pure nested dict (`layers/attn/q`, ...) and calls
`forward`; the layers' weights are stacked, and one `lax.scan` runs them. The LM head is apart (logprobs.py), since
training needs it on answer tokens only. `params["lora"]`, where there is one, holds low-rank updates of `params["layers"]`.

Dimension names: B rows, T slots, D model, F mlp, N query heads, K key-value heads, H head dim, V vocabulary, L layers.
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
    gated,
    layer_norm,
    param,
    project,
    rms_norm,
    rotate,
    rounded,
)
from jaxdpo.models.moe import MoE, RouterLoad

Rope = tuple[jax.Array, jax.Array] | None
Attend = Callable[..., tuple[jax.Array, Any]]
"""(q_BTNH, k_BTKH, v_BTKH, scale, cap, sinks_N) -> float32 [B, T, N, H] and what is to be kept of this layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a forward pass is computed; but for lora_scale, none of it changes the result beyond rounding."""

    compute_dtype: str = "float32"
    """Type of matrix-product inputs."""
    attention: str = "blocks"
    """A key of attention.IMPLEMENTATIONS."""
    remat: str = "none"
    """A key of REMAT."""
    lora_scale: float = 1.0
    """Factor of the low-rank updates: alpha / rank."""
    mesh: Mesh | None = None
    """The devices; None means one."""

    @property
    def dtype(self) -> jnp.dtype:
        """compute_dtype as a type."""
        return jnp.dtype(self.compute_dtype)

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        platform = (
            jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        )
        return platform == "cpu"


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions (2305.13245), optional biases, sinks and norms of q and k."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        L, D, N, K, H = (
            config.num_layers,
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        normal = functools.partial(
            param, rngs, std=config.initializer_range, dtype=dtype, num_inputs=1
        )
        constant = functools.partial(param, rngs, std=None, dtype=dtype)
        self.q = normal((L, D, N, H), ("layer", "embed", "heads", "head_dim"))
        self.k = normal((L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.v = normal((L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.o = normal((L, N, H, D), ("layer", "heads", "head_dim", "embed"), num_inputs=2)
        self.q_bias = (
            constant((L, N, H), ("layer", "heads", "head_dim")) if config.qkv_bias else None
        )
        self.k_bias = (
            constant((L, K, H), ("layer", "kv_heads", "head_dim")) if config.qkv_bias else None
        )
        self.v_bias = (
            constant((L, K, H), ("layer", "kv_heads", "head_dim")) if config.qkv_bias else None
        )
        self.o_bias = constant((L, D), ("layer", "norm")) if config.o_bias else None
        self.sinks = constant((L, N), ("layer", "heads")) if config.attention_sinks else None
        one = 0.0 if config.norm == "rms_offset" else 1.0
        if config.qk_norm == "all":
            self.q_norm = constant((L, N, H), ("layer", "heads", "head_dim"), fill=one)
            self.k_norm = constant((L, K, H), ("layer", "kv_heads", "head_dim"), fill=one)
        else:
            self.q_norm = (
                constant((L, H), ("layer", "norm"), fill=one) if config.qk_norm == "head" else None
            )
            self.k_norm = (
                constant((L, H), ("layer", "norm"), fill=one) if config.qk_norm == "head" else None
            )
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: Rope,
        attend: Attend,
        lora: Mapping[str, Any],
        options: ForwardOptions,
    ) -> tuple[jax.Array, Any]:
        """float32 [B, T, D] in and out, and what `attend` keeps."""
        config, dtype = self.config, options.dtype
        linear = functools.partial(project, compute_dtype=dtype, adapter_scale=options.lora_scale)
        q_BTNH = linear("BTD,DNH->BTNH", x_BTD, self.q, self.q_bias, adapter=lora.get("q"))
        k_BTKH = linear("BTD,DKH->BTKH", x_BTD, self.k, self.k_bias, adapter=lora.get("k"))
        v_BTKH = linear("BTD,DKH->BTKH", x_BTD, self.v, self.v_bias, adapter=lora.get("v"))
        if self.q_norm is not None and self.k_norm is not None:
            norm = functools.partial(
                rms_norm, eps=config.norm_eps, compute_dtype=dtype, offset=_offset(config)
            )
            q_BTNH, k_BTKH = norm(q_BTNH, self.q_norm), norm(k_BTKH, self.k_norm)
        if rope is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        sinks_N = None if self.sinks is None else rounded(self.sinks[...], dtype)
        heads = (x.astype(dtype) for x in (q_BTNH, k_BTKH, v_BTKH))
        out_BTNH, kept = attend(*heads, scale=scale, cap=config.attention_softcap, sinks_N=sinks_N)
        return linear("BTNH,NHD->BTD", out_BTNH, self.o, self.o_bias, adapter=lora.get("o")), kept


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (2002.05202), or down(act(up(x))) without a gate."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        L, D, F = config.num_layers, config.hidden_size, config.mlp_size
        normal = functools.partial(
            param, rngs, std=config.initializer_range, dtype=dtype, num_inputs=1
        )
        constant = functools.partial(param, rngs, std=None, dtype=dtype)
        self.gate = normal((L, D, F), ("layer", "embed", "mlp")) if config.gated else None
        self.up = normal((L, D, F), ("layer", "embed", "mlp"))
        self.down = normal((L, F, D), ("layer", "mlp", "embed"))
        self.gate_bias = (
            constant((L, F), ("layer", "mlp")) if config.gated and config.mlp_bias else None
        )
        self.up_bias = constant((L, F), ("layer", "mlp")) if config.mlp_bias else None
        self.down_bias = constant((L, D), ("layer", "norm")) if config.mlp_bias else None
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, lora: Mapping[str, Any], options: ForwardOptions
    ) -> jax.Array:
        """float32 [B, T, D] in and out."""
        config = self.config
        linear = functools.partial(
            project, compute_dtype=options.dtype, adapter_scale=options.lora_scale
        )
        up_BTF = linear("BTD,DF->BTF", x_BTD, self.up, self.up_bias, adapter=lora.get("up"))
        if self.gate is None:
            inner_BTF = ACTIVATIONS[config.activation](up_BTF)
        else:
            gate_BTF = linear(
                "BTD,DF->BTF", x_BTD, self.gate, self.gate_bias, adapter=lora.get("gate")
            )
            inner_BTF = gated(config.activation, config.activation_limit, gate_BTF, up_BTF)
        return linear("BTF,FD->BTD", inner_BTF, self.down, self.down_bias, adapter=lora.get("down"))


class Norm(nnx.Module):
    """The family's norm; one, or a stack of them with num_layers."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        num_layers: int | None = None,
    ) -> None:
        shape = (config.hidden_size,) if num_layers is None else (num_layers, config.hidden_size)
        constant = functools.partial(
            param, rngs, shape, ("layer", "norm")[-len(shape) :], std=None, dtype=dtype
        )
        self.scale = constant(fill=0.0 if config.norm == "rms_offset" else 1.0)
        self.bias = constant() if config.norm == "layer" else None
        self.config = config

    def __call__(self, x_BTD: jax.Array, options: ForwardOptions) -> jax.Array:
        """float32 [B, T, D] in and out."""
        if self.bias is not None:
            return layer_norm(x_BTD, self.scale, self.bias, self.config.norm_eps, options.dtype)
        return rms_norm(
            x_BTD, self.scale, self.config.norm_eps, options.dtype, offset=_offset(self.config)
        )


def _offset(config: ModelConfig) -> float:
    return 1.0 if config.norm == "rms_offset" else 0.0


class Layer(nnx.Module):
    """Attention and MLP, added to the residual stream, with norms before or behind each. Holds all layers' weights, stacked."""

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
        real_BT: jax.Array | None,
        options: ForwardOptions,
    ) -> tuple[jax.Array, Any, RouterLoad | None]:
        """float32 [B, T, D] in and out; what `attend` keeps; how the experts were used, where there are some."""
        inner_BTD = x_BTD if self.attn_norm is None else self.attn_norm(x_BTD, options)
        inner_BTD, kept = self.attn(inner_BTD, rope, attend, lora.get("attn", {}), options)
        x_BTD = x_BTD + (
            inner_BTD if self.attn_post_norm is None else self.attn_post_norm(inner_BTD, options)
        )
        inner_BTD = x_BTD if self.mlp_norm is None else self.mlp_norm(x_BTD, options)
        load = None
        if self.moe is not None:
            inner_BTD, load = self.moe(inner_BTD, real_BT, options.dtype, options.mesh)
        elif self.mlp is not None:
            inner_BTD = self.mlp(inner_BTD, lora.get("mlp", {}), options)
        x_BTD = x_BTD + (
            inner_BTD if self.mlp_post_norm is None else self.mlp_post_norm(inner_BTD, options)
        )
        return x_BTD, kept, load


class Table(nnx.Module):
    """Vectors of tokens [V, D], which is also the form of the LM head, or of positions."""

    def __init__(
        self, config: ModelConfig, rows: int, axis: str, *, rngs: nnx.Rngs, dtype: jnp.dtype
    ) -> None:
        self.weight = param(
            rngs,
            (rows, config.hidden_size),
            (axis, "embed"),
            std=config.initializer_range,
            dtype=dtype,
            num_inputs=1,
        )


class Decoder(nnx.Module):
    """All the weights of a model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.embed = Table(config, config.vocab_size, "vocab", rngs=rngs, dtype=dtype)
        self.positions = (
            Table(config, config.max_positions, "position", rngs=rngs, dtype=dtype)
            if config.positions == "learned"
            else None
        )
        self.layers = Layer(config, rngs=rngs, dtype=dtype)
        self.norm = Norm(config, rngs=rngs, dtype=dtype)
        self.head = (
            None
            if config.tied_head
            else Table(config, config.vocab_size, "vocab", rngs=rngs, dtype=dtype)
        )
