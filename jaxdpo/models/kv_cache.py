"""Keys and values of the tokens so far, so that a new token costs one token: the forward pass for generation.

Rows of a batch have prompts of different lengths. All rows write a new token to the same slot, behind the longest prompt; the slots
between a shorter prompt and that place stay empty. Positions say what a slot holds.

Dimension names: B rows, T slots of the prompts, S slots of the cache, D model, N query heads, K key-value heads, H head dim, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdpo.distributed.offload import fetched
from jaxdpo.distributed.sharding import ROWS, constrain
from jaxdpo.models.attention import Window, attend_to_cache, attention
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import head_weight, run_layers
from jaxdpo.models.layers import rounded
from jaxdpo.models.params import Params


class KeysValues(NamedTuple):
    """Keys and values of one layer, or of all with a leading L, in the type of the products."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


class Cache(NamedTuple):
    """All layers' keys and values."""

    layers: KeysValues | tuple[KeysValues, ...]
    """Of all layers at once, or one for each where the weights are taken apart."""
    positions_BS: jax.Array
    """int32: position of the token in each slot, -1 where there is none."""


def prefill(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    options: ForwardOptions,
    num_slots: int,
) -> tuple[jax.Array, Cache]:
    """Run prompts.

    Args:
        tokens_BT: int32 prompts, each from slot 0 on, padded behind.
        lengths_B: int32 tokens of each, at least 1.
        num_slots: slots of the cache, at least T.

    Returns:
        (final hidden states float32 [B, T, D], those of padding meaningless; the cache.)
    """
    B, T = tokens_BT.shape
    slots_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    attend = functools.partial(_attend_and_keep, slots_BT, options)
    hidden_BTD, kept, _ = run_layers(params, config, tokens_BT, slots_BT, attend, options)
    behind = (0, num_slots - T)
    layers = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [behind, (0, 0)]), kept)
    positions_BT = jnp.where(slots_BT < lengths_B[:, None], slots_BT, -1)
    return hidden_BTD, _pinned(
        Cache(layers, jnp.pad(positions_BT, [(0, 0), behind], constant_values=-1)), options
    )


def for_decoding(params: Params, config: ModelConfig, options: ForwardOptions) -> Params:
    """The weights in the form that `prefill` and `decode` read fastest; costs a copy of those that are not in it yet.

    They have the type of the products. On CPUs they are taken apart by layer, because a scan would copy each layer's weights and cache in
    every step; and the embedding is float32, because reading a row of it would otherwise convert the whole.
    """

    def of_products(tree: Any) -> Any:
        return jax.tree.map(
            lambda w: w.astype(options.dtype) if w.dtype == jnp.float32 else w, tree
        )

    def layer(tree: Any, index: int) -> Any:
        return of_products(jax.tree.map(lambda leaf: leaf[index], tree))

    def by_layer(tree: Any) -> tuple:
        return tuple(layer(tree, index) for index in range(config.num_layers))

    params = fetched(params)
    if not options.on_cpu:
        return of_products(params)
    if isinstance(params["layers"], tuple):
        return params
    head, embed = (
        of_products(head_weight(params)),
        rounded(params["embed"]["weight"], options.dtype),
    )
    lora = {"lora": {"layers": by_layer(params["lora"]["layers"])}} if "lora" in params else {}
    return (
        params
        | {
            "head": {"weight": head},
            "embed": {"weight": embed},
            "layers": by_layer(params["layers"]),
        }
        | lora
    )


def decode(
    params: Params,
    config: ModelConfig,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    cache: Cache,
    slot: jax.Array,
    options: ForwardOptions,
) -> tuple[jax.Array, Cache]:
    """Run one new token of each row.

    Args:
        tokens_B, positions_B: int32 ids and positions.
        slot: int32 scalar, the empty slot of the cache that they take.

    Returns:
        (final hidden states float32 [B, D], the cache with the tokens in it.)
    """
    positions_BS = jax.lax.dynamic_update_slice_in_dim(
        cache.positions_BS, positions_B[:, None], slot, axis=1
    )
    apart = not isinstance(cache.layers, KeysValues)
    attend = functools.partial(_attend_to_cache, positions_BS, slot, apart)
    hidden_B1D, kept, _ = run_layers(
        params, config, tokens_B[:, None], positions_B[:, None], attend, options, cache=cache.layers
    )
    layers = kept if apart else _written(cache.layers, kept, slot)
    return hidden_B1D[:, 0], _pinned(Cache(layers, positions_BS), options)


def _attend_and_keep(
    slots_BT: jax.Array,
    options: ForwardOptions,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    window: jax.Array | None,
    cache: None,
    **how: Any,
) -> tuple[jax.Array, KeysValues]:
    """Causal attention within the prompts, whose keys and values are kept."""
    del cache
    windowed = None if window is None else Window(window, slots_BT)
    first_BT = jnp.zeros_like(slots_BT)
    out_BTNH = attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        first_BT,
        slots_BT + 1,
        implementation=options.attention,
        window=windowed,
        mesh=options.mesh,
        **how,
    )
    return out_BTNH, KeysValues(k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3))


def _attend_to_cache(
    positions_BS: jax.Array,
    slot: jax.Array,
    apart: bool,
    q_B1NH: jax.Array,
    k_B1KH: jax.Array,
    v_B1KH: jax.Array,
    *,
    window: jax.Array | None,
    cache: KeysValues,
    **how: Any,
) -> tuple[jax.Array, KeysValues]:
    """One token's attention to itself and the tokens before it.

    Kept is the layer's cache with the token in it, which is written in place where layers are apart; else the token's key and value alone,
    as a scan would copy whole caches to stack them.
    """
    new = KeysValues(k_B1KH.transpose(0, 2, 1, 3), v_B1KH.transpose(0, 2, 1, 3))
    cache = _written(cache, new, slot)
    allowed_BS = positions_BS >= 0
    if window is not None:
        position_B1 = jax.lax.dynamic_slice_in_dim(positions_BS, slot, 1, axis=1)
        allowed_BS &= position_B1 - positions_BS < window
    out_BNH = attend_to_cache(q_B1NH[:, 0], *cache, allowed_BS, **how)
    return out_BNH[:, None], cache if apart else new


def _written(layers: Any, new: KeysValues, slot: jax.Array) -> KeysValues:
    """Keys and values with new ones in a slot."""
    return jax.tree.map(
        lambda x, x_slot: jax.lax.dynamic_update_slice_in_dim(x, x_slot, slot, axis=x.ndim - 2),
        layers,
        new,
    )


def _pinned(cache: Cache, options: ForwardOptions) -> Cache:
    """Rows spread over the devices that see different rows, heads over those that share products."""

    def pin(x: jax.Array) -> jax.Array:
        return constrain(x, options.mesh, *[None] * (x.ndim - 4), ROWS, "tensor")

    return Cache(jax.tree.map(pin, cache.layers), constrain(cache.positions_BS, options.mesh, ROWS))
