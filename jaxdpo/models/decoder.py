"""One decoder for every family: what differs between families are ModelConfig's values.

The nnx modules are containers. Training code holds the weights as a pure nested dict (`layers/attn/q`, ...) and calls
`forward`; the layers' weights are stacked, and one `lax.scan` runs them. The LM head is apart (logprobs.py), since
training needs it on answer tokens only. `params["lora"]`, where there is one, holds low-rank updates of `params["layers"]`.

Dimension names: B rows, T slots, D model, F mlp, N query heads, K key-value heads, H head dim, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdpo.distributed.offload import fetched
from jaxdpo.distributed.sharding import constrain, constrain_slots
from jaxdpo.models.attention import Window, attention
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.layers import (
    ACTIVATIONS,
    gated,
    layer_norm,
    look_up,
    param,
    project,
    rms_norm,
    rope_tables,
    rotate,
    rounded,
)
from jaxdpo.models.matmul import soft_cap
from jaxdpo.models.moe import MoE, RouterLoad

Params = dict[str, Any]
Rope = tuple[jax.Array, jax.Array] | None
Attend = Callable[..., tuple[jax.Array, Any]]
"""(q_BTNH, k_BTKH, v_BTKH, scale, cap, sinks_N) -> float32 [B, T, N, H] and what is to be kept of this layer."""

NO_WINDOW = 1 << 30
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "full": jax.checkpoint_policies.save_only_these_names("attention"),
}


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
        normal = functools.partial(param, rngs, std=config.initializer_range, dtype=dtype)
        constant = functools.partial(param, rngs, std=None, dtype=dtype)
        self.q = normal((L, D, N, H), ("layer", "embed", "heads", "head_dim"))
        self.k = normal((L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.v = normal((L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.o = normal((L, N, H, D), ("layer", "heads", "head_dim", "embed"))
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
        normal = functools.partial(param, rngs, std=config.initializer_range, dtype=dtype)
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


@functools.cache
def _abstract(
    config: ModelConfig, dtype: str, part: str | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    decoder = nnx.eval_shape(
        lambda: Decoder(config, rngs=nnx.Rngs(params=0), dtype=jnp.dtype(dtype))
    )
    return nnx.split(decoder if part is None else getattr(decoder, part))


def abstract_params(config: ModelConfig, dtype: str) -> Params:
    """The weights' shapes: nested dict of jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(_abstract(config, dtype)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The weights' logical axis names: nested dict of tuples, as sharding.param_shardings takes them."""
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda leaf: leaf.axes,
            _abstract(config, "float32")[1],
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
    )


def init_params(config: ModelConfig, key: jax.Array, dtype: str) -> Params:
    """Random weights: normal with deviation initializer_range, norms 1, biases 0. Call it under jit with out_shardings."""
    return nnx.to_pure_dict(
        nnx.split(Decoder(config, rngs=nnx.Rngs(params=key), dtype=jnp.dtype(dtype)))[1]
    )


def _bind(config: ModelConfig, part: str, weights: Params) -> Any:
    """The module `part` of the decoder with these weights."""
    graph, state = _abstract(config, "float32", part)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes into it
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


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
        params: the weights, nested dict as abstract_params gives it, and perhaps "lora".
        tokens_BT, positions_BT: int32 token ids and positions.
        k_start_BT, k_end_BT: int32 interval of slots that each slot attends to.

    Returns:
        float32 [B, T, D]; `logits` makes logits of them.
    """
    return forward_moe(params, config, tokens_BT, positions_BT, k_start_BT, k_end_BT, options)[0]


def forward_moe(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    options: ForwardOptions,
    real_BT: jax.Array | None = None,
) -> tuple[jax.Array, RouterLoad | None]:
    """`forward`, and how the experts were used by the tokens that `real_BT` (bool, None: all) names, where there are experts."""
    attend = functools.partial(_attend_to_row, positions_BT, k_start_BT, k_end_BT, options)
    x_BTD, _, load = run_layers(
        params, config, tokens_BT, positions_BT, attend, options, real_BT=real_BT
    )
    return x_BTD, None if load is None else jax.tree.map(lambda x_L: x_L.sum(0), load)


def _attend_to_row(
    positions_BT: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    options: ForwardOptions,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    window: jax.Array | None,
    cache: None,
    **how: Any,
) -> tuple[jax.Array, None]:
    del cache
    windowed = None if window is None else Window(window, positions_BT)
    out_BTNH = attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        k_start_BT,
        k_end_BT,
        implementation=options.attention,
        window=windowed,
        mesh=options.mesh,
        **how,
    )
    return out_BTNH, None


class _LayerInputs(NamedTuple):
    """What the scan hands to one layer (here with a leading L)."""

    weights: Params
    lora: Params
    window: jax.Array | None
    """int32: the layer's window, NO_WINDOW where it has none; None when no layer has one."""
    cache: Any


def run_layers(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attend: Attend,
    options: ForwardOptions,
    *,
    cache: Any = None,
    real_BT: jax.Array | None = None,
) -> tuple[jax.Array, Any, RouterLoad | None]:
    """Embedding, layers and last norm: hidden states, and what each layer kept and counted (stacked; in tuples if the weights are)."""
    sizes = [config.sliding_window if windowed else NO_WINDOW for windowed in config.window_layers]
    ropes = _ropes(config, positions_BT)

    def layer(x_BTD: jax.Array, inputs: _LayerInputs) -> tuple[jax.Array, tuple]:
        x_BTD = constrain_slots(x_BTD, options.mesh)
        rope = ropes[0]
        if ropes[1] is not None:
            rope = jax.tree.map(
                lambda far, near: jnp.where(inputs.window == NO_WINDOW, far, near), *ropes
            )
        module = _bind(config, "layers", _plain(fetched(inputs.weights), options.dtype))
        attend_here = functools.partial(attend, window=inputs.window, cache=inputs.cache)
        x_BTD, kept, load = module(x_BTD, rope, attend_here, fetched(inputs.lora), real_BT, options)
        return x_BTD, (kept, load)

    policy = REMAT[options.remat]
    x_BTD = _embed(params, config, tokens_BT, positions_BT, options)
    windows_L = jnp.asarray(sizes, jnp.int32) if sizes else None
    inputs = _LayerInputs(
        params["layers"], params.get("lora", {}).get("layers", {}), windows_L, cache
    )
    scan = _one_by_one if isinstance(params["layers"], tuple) else jax.lax.scan
    x_BTD, (kept, load) = scan(
        layer if policy is None else jax.checkpoint(layer, policy=policy), x_BTD, inputs
    )
    return _bind(config, "norm", params["norm"])(x_BTD, options), kept, load


def _one_by_one(layer: Callable, x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, tuple]:
    """What lax.scan does, over tuples."""
    results = []
    for index, weights in enumerate(inputs.weights):
        window, cache = (
            None if part is None else part[index] for part in (inputs.window, inputs.cache)
        )
        x_BTD, result = layer(
            x_BTD, _LayerInputs(weights, inputs.lora and inputs.lora[index], window, cache)
        )
        results.append(result)
    return x_BTD, tuple(zip(*results, strict=True))


def _plain(weights: Params, dtype: jnp.dtype) -> Params:
    """The weights as arrays: those that are held in another form (models/quant.py) know how to become one."""

    def coded(leaf: Any) -> bool:
        return hasattr(leaf, "dequantized")

    return jax.tree.map(
        lambda leaf: leaf.dequantized(dtype) if coded(leaf) else leaf, weights, is_leaf=coded
    )


def _ropes(config: ModelConfig, positions_BT: jax.Array) -> tuple[Rope, Rope]:
    """Rotary tables of the layers without a window and of those with one; None where there are none of their own."""
    if config.positions == "learned":
        return None, None
    full = rope_tables(positions_BT, config.rotary_dim, config.rope_theta, config.rope_scaling)
    local = config.local_rope_theta if config.window_layers else None
    return full, None if local is None else rope_tables(
        positions_BT, config.rotary_dim, local, None
    )


def _embed(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    options: ForwardOptions,
) -> jax.Array:
    """Token vectors, with positions where those are learned: float32 [B, T, D]."""
    mesh, dtype = options.mesh, options.dtype
    x_BTD = rounded(look_up(params["embed"]["weight"], tokens_BT, mesh), dtype)
    if config.embed_scale != 1.0:
        x_BTD = x_BTD * rounded(jnp.asarray(config.embed_scale, jnp.float32), dtype)
    if config.positions == "learned":
        x_BTD = x_BTD + rounded(
            constrain(params["positions"]["weight"], mesh, None, None)[positions_BT], dtype
        )
    return constrain_slots(x_BTD, mesh)


def head_weight(params: Params) -> jax.Array:
    """The LM head [V, D]: its own weight, or the token embedding where they are tied."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"]


def logits(
    params: Params, config: ModelConfig, hidden: jax.Array, options: ForwardOptions
) -> jax.Array:
    """Logits of hidden states [..., D]: float32 [..., V]."""
    head_VD = head_weight(params).astype(options.dtype)
    scores = jnp.einsum(
        "...D,VD->...V", hidden.astype(options.dtype), head_VD, preferred_element_type=jnp.float32
    )
    return soft_cap(scores, config.logit_softcap)
