"""What every attention implementation takes, and the score of a key that may not be seen.

Shape suffixes: B packed sequences, T token positions of queries, S of keys, N query heads,
K kv heads, H head dim.
"""

from typing import NamedTuple

import jax

# Finite, not -inf: a block without any allowed key then has exp(score - max) = 1 and not NaN, and
# the next block with one rescales that to 0.
MASK_VALUE = -1e30


class Window(NamedTuple):
    """Sliding window attention: a token sees the tokens less than `size` positions before it."""

    size: jax.Array
    """int32 scalar, which may differ between layers; larger than any position for a layer without
    a window."""
    positions_BT: jax.Array
    """int32 position ids. A packed sequence does not order its tokens by position (reversed
    completions, several pairs), so the distance of two indices is not that of two positions."""
    key_positions_BS: jax.Array | None = None
    """int32 position ids of the keys, where the keys are more tokens than the queries."""

    @property
    def positions_of_keys_BS(self) -> jax.Array:
        """int32 [B, S]: position ids of the keys."""
        return self.positions_BT if self.key_positions_BS is None else self.key_positions_BS


class Inputs(NamedTuple):
    """Arguments of an implementation, as `attention.attention` describes them."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    k_start_BT: jax.Array
    k_end_BT: jax.Array
    window: Window | None
    sinks_N: jax.Array | None
