"""Small numerical pieces that model and log-probs share. Dimension names: R rows, I inputs, O outputs."""

import jax
import jax.numpy as jnp


def sum_of_outer_products(x_RI: jax.Array, y_RO: jax.Array) -> jax.Array:
    """x^T y: what the gradient of a weight is. Any float inputs, float32 sums and result [I, O].

    XLA's CPU products are two to three times slower in bfloat16 when the first factor has to be read along its columns, so
    there it is transposed first.
    """
    return jax.lax.platform_dependent(x_RI, y_RO, cpu=_transposed_first, default=_as_it_is)


def _transposed_first(x_RI: jax.Array, y_RO: jax.Array) -> jax.Array:
    x_IR = jax.lax.optimization_barrier(
        x_RI.T
    )  # without it, XLA takes the transpose back into the product
    return jnp.einsum("IR,RO->IO", x_IR, y_RO, preferred_element_type=jnp.float32)


def _as_it_is(x_RI: jax.Array, y_RO: jax.Array) -> jax.Array:
    return jnp.einsum("RI,RO->IO", x_RI, y_RO, preferred_element_type=jnp.float32)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap): values stay within the cap (Gemma 2, 2408.00118). Without a cap, x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: jax.Array, cap: float | None) -> jax.Array | None:
    """The derivative of `soft_cap`, from its result; None where it is 1."""
    return None if cap is None else 1.0 - jnp.square(capped / cap)
