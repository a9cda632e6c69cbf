"""One decoder for every family: what differs between families are ModelConfig's values.

The nnx modules are containers. Training code holds the weights as a pure nested dict (`layers/attn/q`, ...) and calls
`forward`; the layers' weights are stacked, and one `lax.scan` runs them. The LM head is apart (logprobs.py), since
training needs it on answer tokens only.

Dimension names: B rows, T slots, D model, F mlp, N query heads, K key-value heads, H head dim, V vocabulary, L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdpo.models.attention import attention
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.layers import param, project, rms_norm, rope_tables, rotate, rounded
from jaxdpo.sharding import ROWS, constrain

Params = dict[str, Any]

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "full": jax.checkpoint_policies.save_only_these_names("attention"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a forward pass is computed; none of it changes the result beyond rounding."""

    compute_dtype: str = "float32"
    """Type of matrix-product inputs."""
    attention: str = "blocks"
    """A key of attention.IMPLEMENTATIONS."""
    remat: str = "none"
    """A key of REMAT."""
    mesh: Mesh | None = None
    """The devices; None means one."""

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return platform == "cpu"


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions (2305.13245), optional biases and per-head norms of q and k."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        L, D, N, K, H = config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        normal = functools.partial(param, rngs, std=config.initializer_range, dtype=dtype)
        constant = functools.partial(param, rngs, std=None, dtype=dtype)
        self.q = normal((L, D, N, H), ("layer", "embed", "heads", "head_dim"))
        self.k = normal((L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.v = normal((L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.o = normal((L, N, H, D), ("layer", "heads", "head_dim", "embed"))
        self.q_bias = constant((L, N, H), ("layer", "heads", "head_dim")) if config.qkv_bias else None
        self.k_bias = constant((L, K, H), ("layer", "kv_heads", "head_dim")) if config.qkv_bias else None
        self.v_bias = constant((L, K, H), ("layer", "kv_heads", "head_dim")) if config.qkv_bias else None
        self.o_bias = constant((L, D), ("layer", "norm")) if config.o_bias else None
        self.q_norm = constant((L, H), ("layer", "norm"), fill=1.0) if config.qk_norm != "none" else None
        self.k_norm = constant((L, H), ("layer", "norm"), fill=1.0) if config.qk_norm != "none" else None
        self.eps = config.norm_eps

    def __call__(self, x_BTD: jax.Array, rope: tuple, k_start_BT: jax.Array, k_end_BT: jax.Array, options: ForwardOptions) -> jax.Array:
        """float32 [B, T, D] in and out."""
        dtype = jnp.dtype(options.compute_dtype)
        q_BTNH = project("BTD,DNH->BTNH", x_BTD, self.q, self.q_bias, dtype)
        k_BTKH = project("BTD,DKH->BTKH", x_BTD, self.k, self.k_bias, dtype)
        v_BTKH = project("BTD,DKH->BTKH", x_BTD, self.v, self.v_bias, dtype)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH = rms_norm(q_BTNH, self.q_norm, self.eps, dtype)
            k_BTKH = rms_norm(k_BTKH, self.k_norm, self.eps, dtype)
        q_BTNH, k_BTKH = rotate(q_BTNH, *rope).astype(dtype), rotate(k_BTKH, *rope).astype(dtype)
        out_BTNH = attention(
            q_BTNH, k_BTKH, v_BTKH.astype(dtype), k_start_BT, k_end_BT, implementation=options.attention, mesh=options.mesh
        )
        return project("BTNH,NHD->BTD", out_BTNH, self.o, self.o_bias, dtype)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        L, D, F = config.num_layers, config.hidden_size, config.mlp_size
        normal = functools.partial(param, rngs, std=config.initializer_range, dtype=dtype)
        constant = functools.partial(param, rngs, std=None, dtype=dtype)
        self.gate = normal((L, D, F), ("layer", "embed", "mlp"))
        self.up = normal((L, D, F), ("layer", "embed", "mlp"))
        self.down = normal((L, F, D), ("layer", "mlp", "embed"))
        self.gate_bias = constant((L, F), ("layer", "mlp")) if config.mlp_bias else None
        self.up_bias = constant((L, F), ("layer", "mlp")) if config.mlp_bias else None
        self.down_bias = constant((L, D), ("layer", "norm")) if config.mlp_bias else None

    def __call__(self, x_BTD: jax.Array, options: ForwardOptions) -> jax.Array:
        """float32 [B, T, D] in and out."""
        dtype = jnp.dtype(options.compute_dtype)
        gate_BTF = project("BTD,DF->BTF", x_BTD, self.gate, self.gate_bias, dtype)
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up, self.up_bias, dtype)
        return project("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down, self.down_bias, dtype)


class Norm(nnx.Module):
    """RMS norm; one scale, or a stack of them with num_layers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, num_layers: int | None = None) -> None:
        shape = (config.hidden_size,) if num_layers is None else (num_layers, config.hidden_size)
        self.scale = param(rngs, shape, ("layer", "norm")[-len(shape) :], std=None, fill=1.0, dtype=dtype)
        self.eps = config.norm_eps

    def __call__(self, x_BTD: jax.Array, options: ForwardOptions) -> jax.Array:
        """float32 [B, T, D] in and out."""
        return rms_norm(x_BTD, self.scale, self.eps, jnp.dtype(options.compute_dtype))


class Layer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream. Holds all layers' weights, stacked."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.attn_norm = Norm(config, rngs=rngs, dtype=dtype, num_layers=config.num_layers)
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = Norm(config, rngs=rngs, dtype=dtype, num_layers=config.num_layers)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x_BTD: jax.Array, rope: tuple, k_start_BT: jax.Array, k_end_BT: jax.Array, options: ForwardOptions) -> jax.Array:
        """float32 [B, T, D] in and out."""
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD, options), rope, k_start_BT, k_end_BT, options)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD, options), options)


class Embedding(nnx.Module):
    """Token vectors [V, D]; also the form of the LM head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.weight = param(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), std=config.initializer_range, dtype=dtype)


class Decoder(nnx.Module):
    """Token ids to final hidden states."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.embed = Embedding(config, rngs=rngs, dtype=dtype)
        self.layers = Layer(config, rngs=rngs, dtype=dtype)
        self.norm = Norm(config, rngs=rngs, dtype=dtype)
        self.head = None if config.tied_head else Embedding(config, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, k_start_BT: jax.Array, k_end_BT: jax.Array, options: ForwardOptions
    ) -> jax.Array:
        """Final hidden states after the last norm, float32 [B, T, D]. Slot t attends to slots k_start <= s < k_end."""
        config = self.config
        if config.sliding_window is not None:  # slots of a row are in order of position when the window can cut (see packing)
            slots = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
            k_start_BT = jnp.maximum(k_start_BT, slots - config.sliding_window + 1)
        rope = rope_tables(positions_BT, config.head_dim, config.rope_theta, config.rope_scaling)
        table_VD = constrain(self.embed.weight[...], options.mesh, "tensor", None)  # gathering from a table cut along D too is slow
        x_BTD = constrain(rounded(table_VD[tokens_BT], jnp.dtype(options.compute_dtype)), options.mesh, ROWS)
        graph, stacked = nnx.split(self.layers)

        def layer(x_BTD: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            x_BTD = constrain(x_BTD, options.mesh, ROWS)
            return nnx.merge(graph, weights)(x_BTD, rope, k_start_BT, k_end_BT, options), None

        policy = REMAT[options.remat]
        x_BTD, _ = jax.lax.scan(layer if policy is None else jax.checkpoint(layer, policy=policy), x_BTD, stacked)
        return self.norm(x_BTD, options)


@functools.cache
def _abstract(config: ModelConfig, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0), dtype=jnp.dtype(dtype))))


def abstract_params(config: ModelConfig, dtype: str) -> Params:
    """The weights' shapes: nested dict of jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(_abstract(config, dtype)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The weights' logical axis names: nested dict of tuples, as sharding.param_shardings takes them."""
    return nnx.to_pure_dict(
        jax.tree.map(lambda leaf: leaf.axes, _abstract(config, "float32")[1], is_leaf=lambda node: isinstance(node, nnx.Variable))
    )


def init_params(config: ModelConfig, key: jax.Array, dtype: str) -> Params:
    """Random weights: normal with deviation initializer_range, norms 1, biases 0. Call it under jit with out_shardings."""
    return nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(params=key), dtype=jnp.dtype(dtype)))[1])


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    options: ForwardOptions,
) -> jax.Array:
    """Final hidden states of packed rows.

    Args:
        params: the weights, nested dict as abstract_params gives it.
        tokens_BT, positions_BT: int32 token ids and rotary positions.
        k_start_BT, k_end_BT: int32 interval of slots that each slot attends to.

    Returns:
        float32 [B, T, D]; logits are hidden states times head_weight.
    """
    graph, state = _abstract(config, "float32")
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes into it
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(tokens_BT, positions_BT, k_start_BT, k_end_BT, options)


def head_weight(params: Params) -> jax.Array:
    """The LM head [V, D]: its own weight, or the token embedding where they are tied."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"]
