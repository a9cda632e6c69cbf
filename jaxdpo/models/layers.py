"""Parts of the decoder: projections, norms, activations, rotary positions. Containers are nnx modules with stacked weights.

A module made with num_layers=L holds weights with a leading `layer` dimension; inside the decoder's scan each call sees
one layer's slice. Dimension names: B rows, T slots, D model, F mlp, N query heads, K key-value heads, H head dim, R rank.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.distributed.sharding import on_each_device, shared_axes, slots_spec
from jaxdpo.models.config import RopeScaling
from jaxdpo.models.matmul import sum_of_outer_products

Adapter = Mapping[str, jax.Array]
"""One weight's low-rank update: "a" [*inputs, R] and "b" [R, *outputs]."""


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str],
    *,
    std: float | None,
    dtype: jnp.dtype,
    fill: float = 0.0,
    num_inputs: int = 0,
) -> nnx.Param:
    """A weight with its logical axes; normal with deviation `std`, or constant `fill` when std is None.

    Args:
        num_inputs: how many of its axes (after layer and expert) a matrix multiplication sums over;
            0 for a vector.
    """
    value = (
        jnp.full(shape, fill, dtype)
        if std is None
        else (std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32)).astype(dtype)
    )
    return nnx.Param(value, axes=tuple(axes), num_inputs=num_inputs)


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
    x_dims, weight_dims, y_dims = equation.replace("->", ",").split(",")
    summed = sum(dim in x_dims for dim in weight_dims)
    if summed > 1:  # as one dimension, because for several the compiler may copy weight and x
        x, weight = x.reshape(*x.shape[:-summed], -1), weight.reshape(-1, *weight.shape[summed:])
        equation = (
            f"{x_dims[:-summed]}{weight_dims[0]},{weight_dims[0]}{weight_dims[summed:]}->{y_dims}"
        )
    return jnp.einsum(
        equation,
        x.astype(compute_dtype),
        weight.astype(compute_dtype),
        preferred_element_type=jnp.float32,
    )


def _product_fwd(equation: str, compute_dtype: jnp.dtype, x: jax.Array, weight: jax.Array) -> tuple:
    x = x.astype(compute_dtype)
    return product(equation, compute_dtype, x, weight), (x, weight)


def _product_bwd(equation: str, compute_dtype: jnp.dtype, saved: tuple, d_y: jax.Array) -> tuple:
    x, weight = saved
    inputs, y_dims = equation.split("->")
    x_dims, weight_dims = inputs.split(",")
    d_y = d_y.astype(compute_dtype)
    d_x = jnp.einsum(
        f"{y_dims},{weight_dims}->{x_dims}",
        d_y,
        weight.astype(compute_dtype),
        preferred_element_type=jnp.float32,
    )
    rows = x.shape[0] * x.shape[1]
    d_weight = sum_of_outer_products(x.reshape(rows, -1), d_y.reshape(rows, -1))
    return d_x, d_weight.reshape(weight.shape).astype(weight.dtype)


product.defvjp(_product_fwd, _product_bwd)


def project(
    equation: str,
    x: jax.Array,
    weight: nnx.Param,
    bias: nnx.Param | None,
    compute_dtype: jnp.dtype,
    adapter: Adapter | None = None,
    adapter_scale: float = 1.0,
) -> jax.Array:
    """A linear map in compute_dtype, with a low-rank update (LoRA, 2106.09685 eq. 3) where there is one: float32 in and out."""
    y = checkpoint_name(product(equation, compute_dtype, x, weight[...]), "product")
    if adapter is not None:
        y = y + adapter_scale * _low_rank(equation, x, adapter, compute_dtype)
    return y if bias is None else y + widened(rounded(bias[...], compute_dtype), y.ndim)


def _low_rank(equation: str, x: jax.Array, adapter: Adapter, compute_dtype: jnp.dtype) -> jax.Array:
    """(x A) B, which costs less than adding A B to the weight and keeps the weight free of gradients."""
    inputs, y_dims = equation.split("->")
    x_dims, weight_dims = inputs.split(",")
    summed = "".join(dim for dim in weight_dims if dim in x_dims)
    x_BTR = product(f"{x_dims},{summed}R->BTR", compute_dtype, x, adapter["a"])
    return product(
        f"BTR,R{weight_dims.removeprefix(summed)}->{y_dims}", compute_dtype, x_BTR, adapter["b"]
    )


def look_up(table_VD: jax.Array, ids_BT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Vectors of token ids: [B, T, D], of the table's type.

    On a mesh each device looks up its share of D, in its share of the vocabulary, for the rows of all that share D. So token ids and
    vectors travel, and not the table nor, backward, its gradient: gigabytes where vocabulary and D are large.
    """
    if mesh is None or mesh.size == 1:
        return table_VD[ids_BT]
    vocab, embed, slots = (
        shared_axes(mesh, "vocab"),
        shared_axes(mesh, "embed"),
        slots_spec(mesh, ids_BT.shape[1]),
    )

    def here(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        if embed:
            ids_BT = jax.lax.all_gather(ids_BT, embed, axis=0, tiled=True)
        if not vocab:
            x_BTD = table_VD[ids_BT]
        else:
            ids_BT = ids_BT - jax.lax.axis_index(vocab) * table_VD.shape[0]
            own_BT = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
            x_BTD = jax.lax.psum(
                jnp.where(own_BT[..., None], table_VD[jnp.where(own_BT, ids_BT, 0)], 0), vocab
            )
        return (
            jax.lax.all_to_all(x_BTD, embed, split_axis=0, concat_axis=2, tiled=True)
            if embed
            else x_BTD
        )

    places = (PartitionSpec(vocab or None, embed or None), slots)
    return on_each_device(here, mesh, places, slots)(table_VD, ids_BT)


def rounded(weight: jax.Array, compute_dtype: jnp.dtype) -> jax.Array:
    """A weight as float32 with compute_dtype's digits, so that a reference held in compute_dtype computes the same bits."""
    return weight.astype(compute_dtype).astype(jnp.float32)


def widened(weight: jax.Array, ndim: int) -> jax.Array:
    """A weight with leading dimensions of size 1 up to ndim."""
    return weight.reshape((1,) * (ndim - weight.ndim) + weight.shape)


def rms_norm(
    x: jax.Array, scale: nnx.Param, eps: float, compute_dtype: jnp.dtype, *, offset: float = 0.0
) -> jax.Array:
    """x / rms(x) * (offset + scale), in float32 (1910.07467); over as many last dimensions as the scale has."""
    weight = rounded(scale[...], compute_dtype)
    dims = tuple(range(-weight.ndim, 0))
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True) + eps)
    return normed * widened(weight + offset if offset else weight, x.ndim)


def layer_norm(
    x: jax.Array, scale: nnx.Param, bias: nnx.Param, eps: float, compute_dtype: jnp.dtype
) -> jax.Array:
    """(x - mean) / deviation * scale + bias over the last dimension, in float32 (1607.06450)."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return normed * widened(rounded(scale[...], compute_dtype), x.ndim) + widened(
        rounded(bias[...], compute_dtype), x.ndim
    )


def gated(activation: str, limit: float | None, gate: jax.Array, up: jax.Array) -> jax.Array:
    """act(gate) * up (2002.05202); clamped_swish is gpt-oss's form: both clamped to the limit, and up + 1."""
    if activation != "clamped_swish":
        return ACTIVATIONS[activation](gate) * up
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def rope_tables(
    positions_BT: jax.Array, rotary_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding (2104.09864), float32 [B, T, 1, rotary_dim / 2]."""
    frequencies = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling, theta)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = 1.0 if scaling is None else scaling.attention_factor
    return (cos, sin) if factor == 1.0 else (factor * cos, factor * sin)


def scale_frequencies(frequencies: jax.Array, scaling: RopeScaling, theta: float) -> jax.Array:
    """Stretch rotary frequencies for longer contexts: `linear` (2306.15595), `longrope` (2402.13753) with a factor for each, or
    `llama3` (2407.21783) and `yarn` (2309.00071), which leave fast rotations alone, divide slow ones by the factor and blend between."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / jnp.asarray(scaling.short_factor, jnp.float32)
    if scaling.kind == "yarn":
        keep = 1 - _yarn_ramp(frequencies.size, scaling, theta)
    else:
        turns = (
            scaling.original_max_positions * frequencies / (2 * jnp.pi)
        )  # full turns within the original context
        keep = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = jnp.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def _yarn_ramp(num_frequencies: int, scaling: RopeScaling, theta: float) -> jax.Array:
    """0 for frequencies that turn beta_fast times or more within the original context, 1 from beta_slow turns down, linear between."""

    def place(turns: float) -> float:
        return (
            num_frequencies
            * math.log(scaling.original_max_positions / (turns * 2 * math.pi))
            / math.log(theta)
        )

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_frequencies - 1)
    ramp = (jnp.arange(num_frequencies, dtype=jnp.float32) - low) / (high - low or 0.001)
    return jnp.clip(ramp, 0.0, 1.0)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of the first dimensions of each head, halves convention of Hugging Face; float32."""
    half = cos.shape[-1]
    first, second, rest = x_BTNH[..., :half], x_BTNH[..., half : 2 * half], x_BTNH[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
