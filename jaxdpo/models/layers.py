"""Parts of the decoder: projections, norms, rotary positions. Containers are nnx modules with stacked weights.

A module made with num_layers=L holds weights with a leading `layer` dimension; inside the decoder's scan each call sees
one layer's slice. Dimension names: B rows, T slots, D model, F mlp, N query heads, K key-value heads, H head dim.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxdpo.models.config import RopeScaling
from jaxdpo.products import sum_of_outer_products


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], *, std: float | None, dtype: jnp.dtype, fill: float = 0.0
) -> nnx.Param:
    """A weight with its logical axes; normal with deviation `std`, or constant `fill` when std is None."""
    value = (
        jnp.full(shape, fill, dtype) if std is None else (std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32)).astype(dtype)
    )
    return nnx.Param(value, axes=tuple(axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, compute_dtype: jnp.dtype, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum with inputs cast to compute_dtype and float32 sums, also in the backward pass.

    Plain autodiff would round a bfloat16 product's weight gradient to bfloat16 before microbatches are added up.

    Args:
        equation: "BT..,..->BT..": rows and slots first, the summed dimensions last in x and first in the weight.
        x, weight: float arrays.

    Returns:
        float32; gradients are float32 for x and of the weight's type for the weight.
    """
    return jnp.einsum(equation, x.astype(compute_dtype), weight.astype(compute_dtype), preferred_element_type=jnp.float32)


def _product_fwd(equation: str, compute_dtype: jnp.dtype, x: jax.Array, weight: jax.Array) -> tuple:
    x = x.astype(compute_dtype)
    return product(equation, compute_dtype, x, weight), (x, weight)


def _product_bwd(equation: str, compute_dtype: jnp.dtype, saved: tuple, d_y: jax.Array) -> tuple:
    x, weight = saved
    inputs, y_dims = equation.split("->")
    x_dims, weight_dims = inputs.split(",")
    d_y = d_y.astype(compute_dtype)
    d_x = jnp.einsum(f"{y_dims},{weight_dims}->{x_dims}", d_y, weight.astype(compute_dtype), preferred_element_type=jnp.float32)
    rows = x.shape[0] * x.shape[1]
    d_weight = sum_of_outer_products(x.reshape(rows, -1), d_y.reshape(rows, -1))
    return d_x, d_weight.reshape(weight.shape).astype(weight.dtype)


product.defvjp(_product_fwd, _product_bwd)


def project(equation: str, x: jax.Array, weight: nnx.Param, bias: nnx.Param | None, compute_dtype: jnp.dtype) -> jax.Array:
    """A linear map in compute_dtype: float32 in, float32 out."""
    y = checkpoint_name(product(equation, compute_dtype, x, weight[...]), "product")
    return y if bias is None else y + widened(rounded(bias[...], compute_dtype), y.ndim)


def rounded(weight: jax.Array, compute_dtype: jnp.dtype) -> jax.Array:
    """A weight as float32 with compute_dtype's digits, so that a reference held in compute_dtype computes the same bits."""
    return weight.astype(compute_dtype).astype(jnp.float32)


def widened(weight: jax.Array, ndim: int) -> jax.Array:
    """A weight with leading dimensions of size 1 up to ndim."""
    return weight.reshape((1,) * (ndim - weight.ndim) + weight.shape)


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float, compute_dtype: jnp.dtype) -> jax.Array:
    """x / rms(x) * scale over the last dimension, in float32 (1910.07467)."""
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return normed * widened(rounded(scale[...], compute_dtype), x.ndim)


def rope_tables(positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding (2104.09864), float32 [B, T, 1, H / 2]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def scale_frequencies(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Stretch rotary frequencies for longer contexts: `linear` (2306.15595), or `llama3` (2407.21783), which leaves fast
    rotations alone, divides slow ones by the factor and blends between."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * jnp.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding, halves convention of Hugging Face; float32."""
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
