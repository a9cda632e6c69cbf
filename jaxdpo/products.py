"""Matrix products whose fastest form depends on the platform. Dimension names: R rows, I inputs, O outputs."""

import jax
import jax.numpy as jnp


def sum_of_outer_products(x_RI: jax.Array, y_RO: jax.Array) -> jax.Array:
    """x^T y: what the gradient of a weight is. Any float inputs, float32 sums and result [I, O].

    XLA's CPU products are two to three times slower in bfloat16 when the first factor has to be read along its columns, so
    there it is transposed first.
    """
    return jax.lax.platform_dependent(x_RI, y_RO, cpu=_transposed_first, default=_as_it_is)


def _transposed_first(x_RI: jax.Array, y_RO: jax.Array) -> jax.Array:
    x_IR = jax.lax.optimization_barrier(x_RI.T)  # without it, XLA takes the transpose back into the product
    return jnp.einsum("IR,RO->IO", x_IR, y_RO, preferred_element_type=jnp.float32)


def _as_it_is(x_RI: jax.Array, y_RO: jax.Array) -> jax.Array:
    return jnp.einsum("RI,RO->IO", x_RI, y_RO, preferred_element_type=jnp.float32)
