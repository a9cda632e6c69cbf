"""Forward pass for generation with a KV cache, so that a new token costs one token.

The prompts of a batch have different lengths. All sequences write a new token to the same index of
the cache, after the longest prompt, so the entries between a shorter prompt and that index stay
empty. Position ids say which entries hold a token, and which.

Not the decode mode of flax.nnx.MultiHeadAttention because it has no soft-capping and no attention
sinks, and its cache is state of the module, while weights and cache go stacked through the scan
over the layers here.

Shape suffixes: B sequences, T token positions of the prompts, S entries of the cache, D model,
N query heads, K kv heads, H head dim, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdpo.distributed.offload import to_device
from jaxdpo.distributed.sharding import ROWS, constrain
from jaxdpo.models.attention import attend_to_cache, attention
from jaxdpo.models.attention_inputs import Window
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import head_weight, run_layers
from jaxdpo.models.layers import round_to
from jaxdpo.models.params import Params


class LayerCache(NamedTuple):
    """Keys and values of one layer, or of all with a leading L, in the compute dtype."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


class KVCache(NamedTuple):
    """Keys and values of all layers."""

    layers: LayerCache | tuple[LayerCache, ...]
    """Stacked, or a tuple by layer where the weights are one (`for_decoding`)."""
    positions_BS: jax.Array
    """int32 position id of the token in each entry, -1 where it is empty."""


def prefill(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    options: ForwardOptions,
    cache_length: int,
) -> tuple[jax.Array, KVCache]:
    """Run the prompts.

    Args:
        tokens_BT: int32 prompts, padded on the right.
        lengths_B: int32 tokens of each, at least 1.
        cache_length: entries of the cache, at least T.

    Returns:
        (final hidden states float32 [B, T, D], those of padding meaningless; the cache.)
    """
    B, T = tokens_BT.shape
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    attend = functools.partial(_attend_and_cache, index_BT, options)
    hidden_BTD, layers, _ = run_layers(params, config, tokens_BT, index_BT, attend, options)

    def pad(x: jax.Array) -> jax.Array:
        """[..., T, H] -> [..., S, H]."""
        padding = [(0, 0)] * x.ndim
        padding[-2] = (0, cache_length - T)
        return jnp.pad(x, padding)

    layers = jax.tree.map(pad, layers)
    positions_BT = jnp.where(index_BT < lengths_B[:, None], index_BT, -1)
    positions_BS = jnp.pad(positions_BT, [(0, 0), (0, cache_length - T)], constant_values=-1)
    return hidden_BTD, _constrain(KVCache(layers, positions_BS), options)


def for_decoding(params: Params, config: ModelConfig, options: ForwardOptions) -> Params:
    """The weights in the form that `prefill` and `decode` read fastest.

    They are in the compute dtype. On CPUs the layers are a tuple, because a scan would copy each
    layer's weights and cache in every step; and the embedding is float32, because the lookup of
    one token would otherwise convert the full table.

    It costs a copy of the weights that are not in this form yet.
    """

    def to_compute_dtype(tree: Any) -> Any:
        return jax.tree.map(
            lambda w: w.astype(options.dtype) if w.dtype == jnp.float32 else w, tree
        )

    def layer(tree: Any, index: int) -> Any:
        return to_compute_dtype(jax.tree.map(lambda leaf: leaf[index], tree))

    def unstack(tree: Any) -> tuple:
        return tuple(layer(tree, index) for index in range(config.num_layers))

    params = to_device(params)
    if not options.on_cpu:
        return to_compute_dtype(params)
    if isinstance(params["layers"], tuple):
        return params  # converted already
    unstacked = dict(params)
    unstacked["head"] = {"weight": to_compute_dtype(head_weight(params))}
    unstacked["embed"] = {"weight": round_to(params["embed"]["weight"], options.dtype)}
    if "lora" in params:
        unstacked["lora"] = {"layers": unstack(params["lora"]["layers"])}
    unstacked["layers"] = unstack(params["layers"])
    return unstacked


def decode(
    params: Params,
    config: ModelConfig,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    cache: KVCache,
    index: jax.Array,
    options: ForwardOptions,
) -> tuple[jax.Array, KVCache]:
    """Run one new token of each sequence.

    Args:
        tokens_B, positions_B: int32 token ids and position ids.
        index: int32 scalar, the empty entry of the cache that the tokens take.

    Returns:
        (final hidden states float32 [B, D], the cache with the tokens in it.)
    """
    positions_BS = jax.lax.dynamic_update_slice_in_dim(
        cache.positions_BS, positions_B[:, None], index, axis=1
    )
    by_layer = not isinstance(cache.layers, LayerCache)
    attend = functools.partial(_attend_to_cache, positions_BS, index, by_layer)
    hidden_B1D, layers, _ = run_layers(
        params, config, tokens_B[:, None], positions_B[:, None], attend, options, cache=cache.layers
    )
    if not by_layer:
        layers = _write(cache.layers, layers, index)
    return hidden_B1D[:, 0], _constrain(KVCache(layers, positions_BS), options)


def _attend_and_cache(
    index_BT: jax.Array,
    options: ForwardOptions,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    window: jax.Array | None,
    cache: None,
    **score_options: Any,
) -> tuple[jax.Array, LayerCache]:
    """Causal attention within the prompts, whose keys and values are cached."""
    del cache
    out_BTNH = attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        jnp.zeros_like(index_BT),
        index_BT + 1,
        implementation=options.attention,
        window=None if window is None else Window(window, index_BT),
        mesh=options.mesh,
        **score_options,
    )
    return out_BTNH, LayerCache(k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3))


def _attend_to_cache(
    positions_BS: jax.Array,
    index: jax.Array,
    by_layer: bool,
    q_B1NH: jax.Array,
    k_B1KH: jax.Array,
    v_B1KH: jax.Array,
    *,
    window: jax.Array | None,
    cache: LayerCache,
    **score_options: Any,
) -> tuple[jax.Array, LayerCache]:
    """One token's attention to itself and the tokens before it.

    Returned is the layer's cache with the token in it, which is updated in place, where layers are
    a tuple; else the token's key and value alone, as a scan would copy the full caches to stack
    them.
    """
    new = LayerCache(k_B1KH.transpose(0, 2, 1, 3), v_B1KH.transpose(0, 2, 1, 3))
    cache = _write(cache, new, index)
    allowed_BS = positions_BS >= 0
    if window is not None:
        position_B1 = jax.lax.dynamic_slice_in_dim(positions_BS, index, 1, axis=1)
        allowed_BS &= position_B1 - positions_BS < window
    out_BNH = attend_to_cache(q_B1NH[:, 0], *cache, allowed_BS, **score_options)
    return out_BNH[:, None], cache if by_layer else new


def _write(layers: Any, new: LayerCache, index: jax.Array) -> LayerCache:
    """The cache with new keys and values at an index."""

    def write(x: jax.Array, x_new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, x_new, index, axis=x.ndim - 2)

    return jax.tree.map(write, layers, new)


def _constrain(cache: KVCache, options: ForwardOptions) -> KVCache:
    """Sharded like activations: sequences over data parallel devices, heads over `tensor`."""

    def constrain_layers(x: jax.Array) -> jax.Array:
        stacked = [None] * (x.ndim - 4)  # a leading L
        return constrain(x, options.mesh, *stacked, ROWS, "tensor")

    layers = jax.tree.map(constrain_layers, cache.layers)
    return KVCache(layers, constrain(cache.positions_BS, options.mesh, ROWS))
