"""Mixed precision matmuls: their gradients, and that they accumulate in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models.matmul import matmul


@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTF,FD->BTD"])
def test_matmul_has_the_gradients_of_einsum(equation: str) -> None:
    sizes = {"B": 2, "T": 5, "D": 6, "N": 3, "H": 4, "F": 7}
    x_dims, rest = equation.split(",")
    weight_dims, y_dims = rest.split("->")
    x, weight, pull = (
        jax.random.normal(jax.random.key(i), [sizes[dim] for dim in dims])
        for i, dims in enumerate((x_dims, weight_dims, y_dims))
    )

    def through(f: Any) -> Any:
        return jax.value_and_grad(lambda x, weight: jnp.vdot(f(x, weight), pull), argnums=(0, 1))(
            x, weight
        )

    ours, theirs = (
        through(functools.partial(matmul, equation, jnp.dtype("float32"))),
        through(functools.partial(jnp.einsum, equation)),
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_weight_gradients_of_bfloat16_matmuls_accumulate_in_float32() -> None:
    x = jnp.ones((1, 1000, 1))
    weight = jnp.ones((1, 1), jnp.float32)

    def total(weight: jax.Array) -> jax.Array:
        y: Any = matmul("BTD,DF->BTF", jnp.dtype("bfloat16"), x, weight)
        return y.sum()

    grad = jax.grad(total)(weight)
    assert (
        grad.dtype == jnp.float32 and float(grad[0, 0]) == 1000
    )  # bfloat16 sums would stop at 256
