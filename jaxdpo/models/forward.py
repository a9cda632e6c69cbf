"""The forward pass of the decoder: embedding, a scan over the layers, final norm, logits.

Shape suffixes: B packed sequences, T token positions, D model, N query heads, K kv heads, H head
dim, V vocab, L layers, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdpo.distributed.offload import to_device
from jaxdpo.distributed.sharding import constrain, constrain_activations
from jaxdpo.models.attention import attention
from jaxdpo.models.attention_inputs import Window
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import Attend, ForwardOptions, Rope
from jaxdpo.models.layers import embedding_lookup, rope_tables, round_to
from jaxdpo.models.matmul import einsum, soft_cap
from jaxdpo.models.moe import RouterLoad
from jaxdpo.models.params import Params, bind

NO_WINDOW = 1 << 30
"""Window of a layer without one, in tokens: larger than any position, and a sum of it and an index
stays within int32."""

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("matmul", "attention"),
    "full": jax.checkpoint_policies.save_only_these_names("attention"),
}
"""Remat (gradient checkpointing) policies by model.remat: what the forward pass keeps of a layer.

"matmul" are the results of linear maps, "attention" those of attention. Even `full` keeps the
latter: to recompute them is quadratic in the tokens, and they are one [B, T, N, H] array each."""


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    options: ForwardOptions,
) -> jax.Array:
    """Final hidden states of packed sequences.

    Args:
        params: the weights, a nested dict as params.abstract_params gives it, and perhaps "lora".
        tokens_BT, positions_BT: int32 token ids and position ids.
        k_start_BT, k_end_BT: int32 interval of tokens that each token attends to.

    Returns:
        float32 [B, T, D]; `logits` turns them into logits.
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
    token_mask_BT: jax.Array | None = None,
) -> tuple[jax.Array, RouterLoad | None]:
    """`forward`, and how the experts were used, summed over layers; None without experts.

    Args:
        token_mask_BT: bool, the tokens that count for the experts' load. None: all.
    """
    attend = functools.partial(_attend_intervals, positions_BT, k_start_BT, k_end_BT, options)
    x_BTD, _, load = run_layers(
        params, config, tokens_BT, positions_BT, attend, options, token_mask_BT=token_mask_BT
    )
    if load is not None:
        load = jax.tree.map(lambda x_L: x_L.sum(0), load)
    return x_BTD, load


def _attend_intervals(
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
    **score_options: Any,
) -> tuple[jax.Array, None]:
    """`Attend` without a KV cache."""
    del cache
    out_BTNH = attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        k_start_BT,
        k_end_BT,
        implementation=options.attention,
        window=None if window is None else Window(window, positions_BT),
        mesh=options.mesh,
        **score_options,
    )
    return out_BTNH, None


class _LayerInputs(NamedTuple):
    """What the scan gives to one layer; outside the scan, with a leading L."""

    weights: Params
    lora: Params
    window: jax.Array | None
    """int32: the layer's sliding window, NO_WINDOW if it has none; None when no layer has one."""
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
    token_mask_BT: jax.Array | None = None,
) -> tuple[jax.Array, Any, RouterLoad | None]:
    """Embedding, layers and final norm.

    Args:
        params: `params["layers"]` is stacked over the layers, or a tuple with the weights of each
            (kv_cache.for_decoding).
        attend: also gets the layer's `window` and `cache`.
        cache: what each layer's `attend` gets, stacked or a tuple as the weights are.

    Returns:
        (float32 [B, T, D] hidden states; what each layer's `attend` caches; the load of each
        layer's experts.) The last two are stacked, or tuples, as the weights are.
    """
    ropes = _rope_tables(config, positions_BT)

    def layer(x_BTD: jax.Array, inputs: _LayerInputs) -> tuple[jax.Array, tuple]:
        x_BTD = constrain_activations(x_BTD, options.mesh)
        rope, local_rope = ropes
        if local_rope is not None:
            rope = jax.tree.map(
                lambda full, local: jnp.where(inputs.window == NO_WINDOW, full, local), *ropes
            )
        module = bind(config, "layers", _dequantized(to_device(inputs.weights), options.dtype))
        attend_layer = functools.partial(attend, window=inputs.window, cache=inputs.cache)
        x_BTD, new_cache, load = module(
            x_BTD, rope, attend_layer, to_device(inputs.lora), token_mask_BT, options
        )
        return x_BTD, (new_cache, load)

    x_BTD = _embed(params, config, tokens_BT, positions_BT, options)
    windows_L = None
    if config.window_layers:
        sizes = [config.sliding_window if has else NO_WINDOW for has in config.window_layers]
        windows_L = jnp.asarray(sizes, jnp.int32)
    lora = params.get("lora", {}).get("layers", {})
    inputs = _LayerInputs(params["layers"], lora, windows_L, cache)
    policy = REMAT[options.remat]
    body = layer if policy is None else jax.checkpoint(layer, policy=policy)
    scan = _scan_tuple if isinstance(params["layers"], tuple) else jax.lax.scan
    x_BTD, (new_cache, load) = scan(body, x_BTD, inputs)
    return bind(config, "norm", params["norm"])(x_BTD, options), new_cache, load


def _scan_tuple(layer: Callable, x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, tuple]:
    """lax.scan, unrolled over tuples instead of stacked arrays."""
    results = []
    for index, weights in enumerate(inputs.weights):
        window = None if inputs.window is None else inputs.window[index]
        cache = None if inputs.cache is None else inputs.cache[index]
        lora = inputs.lora[index] if inputs.lora else inputs.lora
        x_BTD, result = layer(x_BTD, _LayerInputs(weights, lora, window, cache))
        results.append(result)
    return x_BTD, tuple(zip(*results, strict=True))


def _dequantized(weights: Params, dtype: jnp.dtype) -> Params:
    """The weights as arrays. Quantized ones (quantize.py) are pytree nodes with `dequantized`."""

    def is_quantized(leaf: Any) -> bool:
        return hasattr(leaf, "dequantized")

    def as_array(leaf: Any) -> jax.Array:
        return leaf.dequantized(dtype) if is_quantized(leaf) else leaf

    return jax.tree.map(as_array, weights, is_leaf=is_quantized)


def _rope_tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[Rope, Rope]:
    """RoPE tables of layers with full attention, and of those with a sliding window.

    The second is None where the layers share one table, both where positions are learned.
    """
    if config.positions == "learned":
        return None, None
    full = rope_tables(positions_BT, config.rotary_dim, config.rope_theta, config.rope_scaling)
    if config.local_rope_theta is None or not config.window_layers:
        return full, None
    return full, rope_tables(positions_BT, config.rotary_dim, config.local_rope_theta, None)


def _embed(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    options: ForwardOptions,
) -> jax.Array:
    """Token embeddings, with those of positions where they are learned: float32 [B, T, D]."""
    mesh, dtype = options.mesh, options.dtype
    x_BTD = round_to(embedding_lookup(params["embed"]["weight"], tokens_BT, mesh), dtype)
    if config.embed_scale != 1.0:
        x_BTD = x_BTD * round_to(jnp.asarray(config.embed_scale, jnp.float32), dtype)
    if config.positions == "learned":
        table = constrain(params["positions"]["weight"], mesh, None, None)
        x_BTD = x_BTD + round_to(table[positions_BT], dtype)
    return constrain_activations(x_BTD, mesh)


def head_weight(params: Params) -> jax.Array:
    """The LM head [V, D]: its own weight, or the token embedding where they are tied."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"]


def logits(
    params: Params, config: ModelConfig, hidden: jax.Array, options: ForwardOptions
) -> jax.Array:
    """Logits of hidden states [..., D]: float32 [..., V]."""
    head_VD = head_weight(params).astype(options.dtype)
    scores = einsum("...D,VD->...V", hidden.astype(options.dtype), head_VD)
    return soft_cap(scores, config.logit_softcap)
