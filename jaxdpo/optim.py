"""AdamW with a schedule: pure functions from gradients to new weights. State is a plain dict, so that checkpoints are too."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdpo.config import OptimSection

Tree = Any


def init(params: Tree, section: OptimSection) -> dict[str, Any]:
    """Zero moments: {"count": int32 scalar, "mu": like params in moments_dtype, "nu": like params in float32}."""
    return {
        "count": jnp.zeros((), jnp.int32),
        "mu": jax.tree.map(lambda w: jnp.zeros(w.shape, section.moments_dtype), params),
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
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), after], [warmup])


def update(
    grads: Tree, grad_norm: jax.Array, opt: dict[str, Any], params: Tree, learning_rate: jax.Array, section: OptimSection
) -> tuple[Tree, dict]:
    """One AdamW update (1711.05101), gradients first scaled down to max_grad_norm.

    Args:
        grads: float32, like params.
        grad_norm: their global norm, float32 scalar.

    Returns:
        (new params in their own types, new state).
    """
    if section.max_grad_norm:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, section.max_grad_norm / (grad_norm + 1e-6)), grads)
    adam = optax.scale_by_adam(section.b1, section.b2, section.eps, mu_dtype=section.moments_dtype)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to an int32 count
        steps, updated = adam.update(grads, optax.ScaleByAdamState(**opt))
    moments: Any = updated

    def move(path: tuple, w: jax.Array, step: jax.Array) -> jax.Array:
        master = w.astype(jnp.float32)
        decay = section.weight_decay * master if section.weight_decay and _decays(path) else 0.0
        return (master - learning_rate * (step + decay)).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(move, params, steps), {"count": moments.count, "mu": moments.mu, "nu": moments.nu}


def _decays(path: tuple) -> bool:
    """Whether weight decay applies: to matrices, not to norm scales and biases."""
    name = str(path[-1].key)
    return not (name == "scale" or name.endswith(("_norm", "_bias")))


def global_norm(grads: Tree) -> jax.Array:
    """Square root of the sum of all squares; float32 scalar."""
    return jnp.sqrt(jax.tree.reduce(jnp.add, jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)))
