"""AdamW with a schedule: pure functions from gradients to new weights. State is a plain dict, so that checkpoints are too."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdpo.config.schema import OptimSection
from jaxdpo.distributed import offload

Tree = Any


def init(params: Tree, section: OptimSection) -> dict[str, Any]:
    """Zero moments: {"count": int32 scalar, "mu": like params in mu_dtype, "nu": like params in float32}."""
    return {
        "count": jnp.zeros((), jnp.int32),
        "mu": jax.tree.map(lambda w: jnp.zeros(w.shape, section.mu_dtype), params),
        "nu": jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params),
    }


def schedule(section: OptimSection, total_steps: int) -> optax.Schedule:
    """Learning rate of update k, counted from 0: warm-up to the peak, then down to 0 at total_steps, or constant."""
    peak, warmup = section.learning_rate, section.warmup_steps
    decay_steps = max(total_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    }[section.schedule]
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), after], [warmup]
    )


def update(
    grads: Tree,
    grad_norm: jax.Array,
    opt: dict[str, Any],
    params: Tree,
    learning_rate: jax.Array,
    section: OptimSection,
    accept: jax.Array,
) -> tuple[Tree, dict]:
    """One AdamW update (1711.05101), gradients first scaled down to max_grad_norm.

    Args:
        grads: float32, like params.
        grad_norm: their global norm, float32 scalar.
        accept: bool scalar; False leaves everything as it is, whatever the gradients hold.

    Returns:
        (new params in their own types, new state).
    """
    count = opt["count"] + accept.astype(jnp.int32)
    corrections = [1.0 - decay ** count.astype(jnp.float32) for decay in (section.b1, section.b2)]
    scale = (
        jnp.minimum(1.0, section.max_grad_norm / (grad_norm + 1e-6))
        if section.max_grad_norm
        else 1.0
    )

    def moment(decay: float, power: int, old: Tree, grads: Tree) -> Tree:
        def mix(g: jax.Array, m: jax.Array) -> jax.Array:
            return jnp.where(
                accept,
                (decay * m.astype(jnp.float32) + (1.0 - decay) * (g * scale) ** power).astype(
                    m.dtype
                ),
                m,
            )

        return jax.tree.map(mix, grads, old)

    def move(path: tuple, w: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
        master = w.astype(jnp.float32)
        step = (mean.astype(jnp.float32) / corrections[0]) / (
            jnp.sqrt(square / corrections[1]) + section.eps
        )
        decay = section.weight_decay * master if section.weight_decay and _decays(path) else 0.0
        return jnp.where(accept, (master - learning_rate * (step + decay)).astype(w.dtype), w)

    def change(params: Tree, mu: Tree, nu: Tree, grads: Tree) -> tuple[Tree, Tree, Tree]:
        mu, nu = moment(section.b1, 1, mu, grads), moment(section.b2, 2, nu, grads)
        mu, nu = jax.lax.optimization_barrier(
            (mu, nu)
        )  # first the moments, in place; else the compiler keeps copies of the old ones
        return jax.tree_util.tree_map_with_path(move, params, mu, nu), mu, nu

    params, mu, nu = offload.changed(change, (params, opt["mu"], opt["nu"]), grads)
    return params, {"count": count, "mu": mu, "nu": nu}


def _decays(path: tuple) -> bool:
    """Whether weight decay applies: to matrices, not to norm scales and biases."""
    name = str(path[-1].key)
    return not (name == "scale" or name.endswith(("_norm", "_bias")))


def global_norm(grads: Tree) -> jax.Array:
    """Square root of the sum of all squares; float32 scalar."""
    return jnp.sqrt(jax.tree.reduce(jnp.add, jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)))


def leaves_named(tree: Tree, name: str) -> list[jax.Array]:
    """The leaves of a nested dict that lie under a key."""
    return [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == name
    ]
