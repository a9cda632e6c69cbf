"""What the decoder's modules are made of: linear maps, norms, activations, rotary embedding.

Not nnx.Linear, nnx.RMSNorm and nnx.LayerNorm because a linear map here has float32 accumulation
and float32 weight gradients under a bfloat16 compute dtype (matmul.py), a LoRA update, and weights
with several output dimensions that are stacked over the layers; the norms follow the families'
variants (offset, over all heads).

Weights are stacked: inside the decoder's scan each call sees one layer's slice.

Shape suffixes: B packed sequences, T token positions, D model, N query heads, K kv heads, H head
dim, F mlp, V vocab, L layers, R LoRA rank.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.distributed.sharding import activation_spec, on_each_device, shared_axes
from jaxdpo.models.config import RopeScaling
from jaxdpo.models.matmul import matmul

Adapter = Mapping[str, jax.Array]
"""The LoRA update of one weight: "a" [*inputs, R] and "b" [R, *outputs]."""


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
    """A weight with its logical axes: normal with this standard deviation, or constant.

    Args:
        axes: a key of sharding.RULES for each dimension.
        std: standard deviation; None: every number is `fill`.
        num_inputs: how many of its axes (after layer and expert) a matmul contracts; 0 for a
            vector.
    """
    if std is None:
        value = jnp.full(shape, fill, dtype)
    else:
        # Drawn in float32, so that a seed gives the same weights in every dtype, but for rounding.
        value = (std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32)).astype(dtype)
    return nnx.Param(value, axes=tuple(axes), num_inputs=num_inputs)


def constant_if(
    used: bool,
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str],
    *,
    dtype: jnp.dtype,
    fill: float = 0.0,
) -> nnx.Param | None:
    """A constant `param`, such as a bias, if the model has it."""
    return param(rngs, shape, axes, std=None, dtype=dtype, fill=fill) if used else None


def linear(
    equation: str,
    x: jax.Array,
    weight: nnx.Param,
    bias: nnx.Param | None,
    compute_dtype: jnp.dtype,
    adapter: Adapter | None = None,
    adapter_scale: float = 1.0,
) -> jax.Array:
    """A linear map in compute_dtype, with its LoRA update (2106.09685 eq. 3) if there is one.

    Args:
        equation: as `matmul.matmul` takes it.

    Returns:
        float32, as x is.
    """
    y = checkpoint_name(matmul(equation, compute_dtype, x, weight[...]), "matmul")
    if adapter is not None:
        y = y + adapter_scale * _lora_update(equation, x, adapter, compute_dtype)
    if bias is None:
        return y
    return y + add_leading_dims(round_to(bias[...], compute_dtype), y.ndim)


def _lora_update(
    equation: str, x: jax.Array, adapter: Adapter, compute_dtype: jnp.dtype
) -> jax.Array:
    """(x A) B. It costs less than adding A B to the weight, which then needs no gradient."""
    x_dims, weight_dims, y_dims = equation.replace("->", ",").split(",")
    inputs = "".join(dim for dim in weight_dims if dim in x_dims)
    outputs = weight_dims.removeprefix(inputs)
    x_BTR = matmul(f"{x_dims},{inputs}R->BTR", compute_dtype, x, adapter["a"])
    return matmul(f"BTR,R{outputs}->{y_dims}", compute_dtype, x_BTR, adapter["b"])


def embedding_lookup(table_VD: jax.Array, ids_BT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Embeddings of token ids: [B, T, D], of the table's dtype.

    On a mesh, not table[ids] because XLA then moves the table and, in the backward pass, its
    gradient: gigabytes where vocab and D are large. Here only ids and embeddings move: each device
    looks up its shard of D, in its shard of the vocab, for the sequences of all devices that shard
    D with it.
    """
    if mesh is None or mesh.size == 1:
        return table_VD[ids_BT]
    vocab, embed = shared_axes(mesh, "vocab"), shared_axes(mesh, "embed")
    tokens = activation_spec(mesh, ids_BT.shape[1])

    def lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        if embed:
            ids_BT = jax.lax.all_gather(ids_BT, embed, axis=0, tiled=True)
        if not vocab:
            x_BTD = table_VD[ids_BT]
        else:
            ids_BT = ids_BT - jax.lax.axis_index(vocab) * table_VD.shape[0]
            local_BT = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
            x_BTD = jnp.where(local_BT[..., None], table_VD[jnp.where(local_BT, ids_BT, 0)], 0)
            x_BTD = jax.lax.psum(x_BTD, vocab)
        if embed:
            x_BTD = jax.lax.all_to_all(x_BTD, embed, split_axis=0, concat_axis=2, tiled=True)
        return x_BTD

    table = PartitionSpec(vocab or None, embed or None)
    return on_each_device(lookup, mesh, (table, tokens), tokens)(table_VD, ids_BT)


def round_to(weight: jax.Array, compute_dtype: jnp.dtype) -> jax.Array:
    """A weight rounded to compute_dtype, as float32.

    So a reference that is stored in compute_dtype computes the same bits as its float32 source.
    """
    return weight.astype(compute_dtype).astype(jnp.float32)


def add_leading_dims(weight: jax.Array, ndim: int) -> jax.Array:
    """A weight with leading dimensions of size 1 up to ndim, as rank promotion raises in tests."""
    return weight.reshape((1,) * (ndim - weight.ndim) + weight.shape)


def rms_norm(
    x: jax.Array, scale: nnx.Param, eps: float, compute_dtype: jnp.dtype, *, offset: float = 0.0
) -> jax.Array:
    """x / rms(x) * (offset + scale), in float32 (1910.07467).

    It normalizes over as many last dimensions as the scale has.
    """
    weight = round_to(scale[...], compute_dtype)
    dims = tuple(range(-weight.ndim, 0))
    mean_square = jnp.mean(jnp.square(x), axis=dims, keepdims=True)
    normed = x * jax.lax.rsqrt(mean_square + eps)
    if offset:
        weight = weight + offset
    return normed * add_leading_dims(weight, x.ndim)


def layer_norm(
    x: jax.Array, scale: nnx.Param, bias: nnx.Param, eps: float, compute_dtype: jnp.dtype
) -> jax.Array:
    """(x - mean) / deviation * scale + bias over the last dimension, in float32 (1607.06450)."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + eps)
    scaled = normed * add_leading_dims(round_to(scale[...], compute_dtype), x.ndim)
    return scaled + add_leading_dims(round_to(bias[...], compute_dtype), x.ndim)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def gated_activation(
    activation: str, limit: float | None, gate: jax.Array, up: jax.Array
) -> jax.Array:
    """act(gate) * up, the gated linear unit of SwiGLU and GEGLU (2002.05202).

    clamped_swish is gpt-oss's: gate and up are clamped to the limit, and up is increased by 1.
    """
    if activation != "clamped_swish":
        return ACTIVATIONS[activation](gate) * up
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    # 1.702: sigmoid's factor in the approximation of GELU (1606.08415 section 2), as in gpt-oss.
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)


def rope_tables(
    positions_BT: jax.Array, rotary_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary position embedding (RoPE, 2104.09864).

    Returns:
        Two float32 [B, T, 1, rotary_dim / 2].
    """
    frequencies = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling, theta)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is None or scaling.attention_factor == 1.0:
        return cos, sin
    return scaling.attention_factor * cos, scaling.attention_factor * sin


def scale_frequencies(frequencies: jax.Array, scaling: RopeScaling, theta: float) -> jax.Array:
    """RoPE frequencies scaled for a longer context.

    `linear` (2306.15595) divides all by one factor and `longrope` (2402.13753) each by its own.
    `llama3` (2407.21783) and `yarn` (2309.00071) keep high frequencies, divide low ones by the
    factor and interpolate between.
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / jnp.asarray(scaling.short_factor, jnp.float32)
    if scaling.kind == "yarn":
        keep = 1 - _yarn_ramp(frequencies.size, scaling, theta)
    else:
        # Full rotations within the original context.
        rotations = scaling.original_max_positions * frequencies / (2 * jnp.pi)
        width = scaling.high_freq_factor - scaling.low_freq_factor
        keep = jnp.clip((rotations - scaling.low_freq_factor) / width, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def _yarn_ramp(num_frequencies: int, scaling: RopeScaling, theta: float) -> jax.Array:
    """YaRN's interpolation ramp (2309.00071 section 3.2) by frequency, float32.

    0 for frequencies of at least beta_fast rotations within the original context, 1 for those of
    at most beta_slow, linear between.
    """

    def frequency_index(rotations: float) -> float:
        wavelengths = scaling.original_max_positions / (rotations * 2 * math.pi)
        return num_frequencies * math.log(wavelengths) / math.log(theta)

    low, high = frequency_index(scaling.beta_fast), frequency_index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_frequencies - 1)
    width = high - low or 0.001  # as transformers does it, so that a ramp of no width divides too
    ramp = (jnp.arange(num_frequencies, dtype=jnp.float32) - low) / width
    return jnp.clip(ramp, 0.0, 1.0)


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of each head's first dimensions, in float32.

    Pairs are dimension i and i + half, the convention of Hugging Face's weights, and not
    neighbours as in the paper.
    """
    half = cos.shape[-1]
    first, second = x_BTNH[..., :half], x_BTNH[..., half : 2 * half]
    rest = x_BTNH[..., 2 * half :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1)
