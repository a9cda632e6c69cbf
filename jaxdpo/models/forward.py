"""The decoder's forward pass: embedding, a scan over the layers, the last norm, logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdpo.distributed.offload import fetched
from jaxdpo.distributed.sharding import constrain, constrain_slots
from jaxdpo.models.attention import Window, attention
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import Attend, ForwardOptions, Rope
from jaxdpo.models.layers import (
    look_up,
    rope_tables,
    rounded,
)
from jaxdpo.models.matmul import soft_cap
from jaxdpo.models.moe import RouterLoad
from jaxdpo.models.params import Params, bind

NO_WINDOW = 1 << 30


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "full": jax.checkpoint_policies.save_only_these_names("attention"),
}


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
        module = bind(config, "layers", _plain(fetched(inputs.weights), options.dtype))
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
    return bind(config, "norm", params["norm"])(x_BTD, options), kept, load


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
