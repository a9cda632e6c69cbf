"""Keys and values of the tokens so far, so that a new token costs one token: the forward pass for generation.

Rows of a batch have prompts of different lengths. All rows write a new token to the same slot, behind the longest prompt; the slots
between a shorter prompt and that place stay empty. Positions say what a slot holds.

Dimension names: B rows, T slots of the prompts, S slots of the cache, D model, N query heads, K key-value heads, H head dim, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdpo.models.attention import Window, attend_to_cache, attention
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions, Params, run_layers
from jaxdpo.sharding import ROWS, constrain


class Cache(NamedTuple):
    """All layers' keys and values, in the type of the products."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    positions_BS: jax.Array
    """int32: position of the token in each slot, -1 where there is none."""


def prefill(
    params: Params, config: ModelConfig, tokens_BT: jax.Array, lengths_B: jax.Array, options: ForwardOptions, num_slots: int
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
    hidden_BTD, (k_LBKTH, v_LBKTH), _ = run_layers(params, config, tokens_BT, slots_BT, attend, options)
    behind = num_slots - T
    positions_BT = jnp.where(slots_BT < lengths_B[:, None], slots_BT, -1)
    grown = ((0, 0), (0, 0), (0, 0), (0, behind), (0, 0))
    positions_BS = jnp.pad(positions_BT, ((0, 0), (0, behind)), constant_values=-1)
    return hidden_BTD, _pinned(Cache(jnp.pad(k_LBKTH, grown), jnp.pad(v_LBKTH, grown), positions_BS), options)


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
    filled_BS = cache.positions_BS >= 0
    attend = functools.partial(_attend_to_cache, positions_B, cache.positions_BS, filled_BS)
    hidden_B1D, (k_LBK1H, v_LBK1H), _ = run_layers(
        params, config, tokens_B[:, None], positions_B[:, None], attend, options, cache=(cache.k_LBKSH, cache.v_LBKSH)
    )
    k_LBKSH = jax.lax.dynamic_update_slice_in_dim(cache.k_LBKSH, k_LBK1H, slot, axis=3)
    v_LBKSH = jax.lax.dynamic_update_slice_in_dim(cache.v_LBKSH, v_LBK1H, slot, axis=3)
    positions_BS = jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, positions_B[:, None], slot, axis=1)
    return hidden_B1D[:, 0], _pinned(Cache(k_LBKSH, v_LBKSH, positions_BS), options)


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
) -> tuple[jax.Array, tuple]:
    """Causal attention within the prompts, whose keys and values are kept."""
    del cache
    windowed = None if window is None else Window(window, slots_BT)
    first_BT = jnp.zeros_like(slots_BT)
    out_BTNH = attention(
        q_BTNH, k_BTKH, v_BTKH, first_BT, slots_BT + 1, implementation=options.attention, window=windowed, mesh=options.mesh, **how
    )
    return out_BTNH, (k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3))


def _attend_to_cache(
    positions_B: jax.Array,
    cached_BS: jax.Array,
    filled_BS: jax.Array,
    q_B1NH: jax.Array,
    k_B1KH: jax.Array,
    v_B1KH: jax.Array,
    *,
    window: jax.Array | None,
    cache: tuple[jax.Array, jax.Array],
    **how: Any,
) -> tuple[jax.Array, tuple]:
    """One token's attention; its key and value are kept."""
    allowed_BS = filled_BS if window is None else filled_BS & (positions_B[:, None] - cached_BS < window)
    out_BNH = attend_to_cache(q_B1NH[:, 0], k_B1KH[:, 0], v_B1KH[:, 0], *cache, allowed_BS, **how)
    return out_BNH[:, None], (k_B1KH.transpose(0, 2, 1, 3), v_B1KH.transpose(0, 2, 1, 3))


def _pinned(cache: Cache, options: ForwardOptions) -> Cache:
    """Rows spread over the devices that see different rows, heads over those that share products."""
    k_LBKSH, v_LBKSH = (constrain(x, options.mesh, None, ROWS, "tensor") for x in (cache.k_LBKSH, cache.v_LBKSH))
    return Cache(k_LBKSH, v_LBKSH, constrain(cache.positions_BS, options.mesh, ROWS))
