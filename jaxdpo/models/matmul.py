"""Matrix multiplications in the compute dtype with float32 accumulation (mixed precision).

Float32 is float32: without a precision, GPUs multiply float32 matrices in TF32 (10 bits) and TPUs
in bfloat16 (7 bits). Every matmul of the package is `einsum` here, or says its precision itself.

Also the logit soft-capping that attention and LM head share.

Shape suffixes: R rows (tokens), I inputs, O outputs.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp


def precision_of(*arrays: jax.Array) -> jax.lax.Precision | None:
    """The precision at which a matmul of these arrays keeps their bits: HIGHEST for float32.

    None for bfloat16, whose products every platform computes exactly.
    """
    if any(x.dtype == jnp.float32 for x in arrays):
        return jax.lax.Precision.HIGHEST
    return None


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """jnp.einsum with products as exact as its inputs, and float32 accumulation; float32."""
    return jnp.einsum(
        equation, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32
    )


def exact_products(compute_dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """While this is entered, matmuls that say no precision are traced as `einsum` would.

    For code that is not ours: the splash attention kernel.
    """
    if compute_dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def matmul(equation: str, compute_dtype: jnp.dtype, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum with inputs cast to compute_dtype and float32 accumulation, also in the backward pass.

    Not plain autodiff of jnp.einsum because that rounds a weight's gradient to bfloat16 before the
    microbatches are added up (gradient accumulation).

    Args:
        equation: "BT..,..->BT..": batch and tokens first, the contracted dimensions last in x and
            first in the weight.
        x, weight: float arrays.

    Returns:
        float32; gradients are float32 for x and of the weight's dtype for the weight.
    """
    x_dims, weight_dims, y_dims = equation.replace("->", ",").split(",")
    num_contracted = sum(dim in x_dims for dim in weight_dims)
    if num_contracted > 1:
        # As one dimension, because for several the compiler may copy weight and x.
        x = x.reshape(*x.shape[:-num_contracted], -1)
        weight = weight.reshape(-1, *weight.shape[num_contracted:])
        first = weight_dims[0]
        x_dims = x_dims[:-num_contracted] + first
        weight_dims = first + weight_dims[num_contracted:]
        equation = f"{x_dims},{weight_dims}->{y_dims}"
    return einsum(equation, x.astype(compute_dtype), weight.astype(compute_dtype))


def _matmul_fwd(equation: str, compute_dtype: jnp.dtype, x: jax.Array, weight: jax.Array) -> tuple:
    x = x.astype(compute_dtype)
    return matmul(equation, compute_dtype, x, weight), (x, weight)


def _matmul_bwd(equation: str, compute_dtype: jnp.dtype, saved: tuple, d_y: jax.Array) -> tuple:
    x, weight = saved
    x_dims, weight_dims, y_dims = equation.replace("->", ",").split(",")
    d_y = d_y.astype(compute_dtype)
    d_x = einsum(f"{y_dims},{weight_dims}->{x_dims}", d_y, weight.astype(compute_dtype))
    num_rows = x.shape[0] * x.shape[1]
    d_weight = weight_gradient(x.reshape(num_rows, -1), d_y.reshape(num_rows, -1))
    return d_x, d_weight.reshape(weight.shape).astype(weight.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def weight_gradient(x_RI: jax.Array, d_y_RO: jax.Array) -> jax.Array:
    """x^T d_y, the gradient of the weight in y = x W: float32 [I, O] with float32 accumulation.

    On CPUs the transpose is computed first, because XLA's bfloat16 matmuls are two to three times
    slower there when they read the first factor along its columns.
    """
    return jax.lax.platform_dependent(x_RI, d_y_RO, cpu=_transpose_first, default=_contract_rows)


def _transpose_first(x_RI: jax.Array, d_y_RO: jax.Array) -> jax.Array:
    # Without the barrier, XLA merges the transpose into the matmul again.
    x_IR = jax.lax.optimization_barrier(x_RI.T)
    return einsum("IR,RO->IO", x_IR, d_y_RO)


def _contract_rows(x_RI: jax.Array, d_y_RO: jax.Array) -> jax.Array:
    return einsum("RI,RO->IO", x_RI, d_y_RO)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Logit soft-capping, cap * tanh(x / cap) (Gemma 2, 2408.00118). Without a cap, x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: jax.Array, cap: float | None) -> jax.Array | None:
    """The derivative of `soft_cap`, from its result; None where it is 1."""
    return None if cap is None else 1.0 - jnp.square(capped / cap)
