"""AdamW and its learning rate schedule: pure functions from gradients to new weights.

Not optax.adamw (its schedules are used), because of what it takes beside the weights and moments
on a step that a NaN may not touch, with clipping and the update donated (benchmarks/adamw.py, 37M
weights, jax 0.10.2 and optax 0.2.8 on a CPU):

    temporary memory, float32 copies of the weights      mu float32   mu bfloat16
    this module                                             1.3           0.5
    optax.adamw, old values kept by `where`                 2.0           1.7
    optax.apply_if_finite                                   2.2           2.0

Also, moments that are offloaded to the host are updated one layer at a time here
(offload.update_by_layer); nu stays float32 under bfloat16 weights (optax gives it the weights'
type); and optax relies on implicit type promotion, which this package turns off in its tests. A
test compares both.

The state is a plain dict, so that a checkpoint restores without optax and without this package.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdpo.config.schema import OptimSection
from jaxdpo.distributed import offload

Tree = Any

NORM_EPS = 1e-6
"""Added to the gradient norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does."""

MATRICES = frozenset(["weight", "q", "k", "v", "o", "gate", "up", "down", "router", "a", "b"])
"""Names of the weights that a matmul or an embedding takes, adapters' A and B too. By name and not
by the number of dimensions: layers are stacked, and biases of attention have two (heads, head
dimension)."""


def init(params: Tree, section: OptimSection) -> dict[str, Any]:
    """Zero moments: count int32 scalar; mu like params, in mu_dtype; nu like params, float32.

    nu has no bfloat16 option: a step moves it by (1 - b2) of a difference, most of which would be
    rounded away with 8 bits.
    """
    return {
        "count": jnp.zeros((), jnp.int32),
        "mu": jax.tree.map(lambda w: jnp.zeros(w.shape, section.mu_dtype), params),
        "nu": jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params),
    }


def schedule(section: OptimSection, total_steps: int) -> optax.Schedule:
    """Learning rate of update k, counted from 0: linear warm-up to the peak, then the decay.

    The decay (linear, cosine) reaches 0 at total_steps; the constant schedule has none.
    """
    peak = section.learning_rate
    warmup = section.warmup_steps
    if section.warmup_ratio:
        warmup = min(math.ceil(section.warmup_ratio * total_steps), total_steps - 1)
    decay_steps = max(total_steps - warmup, 1)
    after_warmup = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    }[section.schedule]
    if not warmup:
        return after_warmup
    # From peak / warmup and not from 0, which would waste the first update.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after_warmup], [warmup])


def update(
    grads: Tree,
    grad_norm: jax.Array,
    opt: dict[str, Any],
    params: Tree,
    learning_rate: jax.Array,
    section: OptimSection,
    accept: jax.Array,
) -> tuple[Tree, dict]:
    """One AdamW update (1711.05101 algorithm 2), gradients first clipped to max_grad_norm.

    Args:
        grads: float32, like params.
        grad_norm: their global norm, float32 scalar.
        accept: bool scalar; False leaves everything as it is, whatever the gradients hold.

    Returns:
        (new params in their own types, new state).
    """
    count = opt["count"] + accept.astype(jnp.int32)
    mu_correction = 1.0 - section.b1 ** count.astype(jnp.float32)
    nu_correction = 1.0 - section.b2 ** count.astype(jnp.float32)
    scale = 1.0
    if section.max_grad_norm:
        scale = jnp.minimum(1.0, section.max_grad_norm / (grad_norm + NORM_EPS))

    def moment(decay: float, power: int, old: Tree, grads: Tree) -> Tree:
        def mix(g: jax.Array, m: jax.Array) -> jax.Array:
            mixed = decay * m.astype(jnp.float32) + (1.0 - decay) * (g * scale) ** power
            # Selected per element, which fuses with the update: no copy of the old state.
            return jnp.where(accept, mixed.astype(m.dtype), m)

        return jax.tree.map(mix, grads, old)

    def move(path: tuple, w: jax.Array, mu: jax.Array, nu: jax.Array) -> jax.Array:
        master = w.astype(jnp.float32)
        mu_hat = mu.astype(jnp.float32) / mu_correction
        step = mu_hat / (jnp.sqrt(nu / nu_correction) + section.eps)
        decay = section.weight_decay * master if section.weight_decay and _decays(path) else 0.0
        return jnp.where(accept, (master - learning_rate * (step + decay)).astype(w.dtype), w)

    def change(params: Tree, mu: Tree, nu: Tree, grads: Tree) -> tuple[Tree, Tree, Tree]:
        mu = moment(section.b1, 1, mu, grads)
        nu = moment(section.b2, 2, nu, grads)
        # First the moments, in place: without the barrier, XLA keeps copies of the old ones.
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        return jax.tree_util.tree_map_with_path(move, params, mu, nu), mu, nu

    params, mu, nu = offload.update_by_layer(change, (params, opt["mu"], opt["nu"]), grads)
    return params, {"count": count, "mu": mu, "nu": nu}


def _decays(path: tuple) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases and attention sinks."""
    return str(path[-1].key) in MATRICES


def global_norm(grads: Tree) -> jax.Array:
    """Square root of the sum of all squares; float32 scalar."""
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)
    return jnp.sqrt(jax.tree.reduce(jnp.add, squares))


def changed_share(old: Tree, new: Tree) -> jax.Array:
    """Share of the weights that an update has changed; float32 scalar.

    bfloat16 weights have 8 bits: an update below some 0.2% of a weight is rounded away.
    """
    changed = jax.tree.map(lambda a, b: jnp.sum(a != b, dtype=jnp.float32), old, new)
    size = sum(leaf.size for leaf in jax.tree.leaves(new))
    return jax.tree.reduce(jnp.add, changed) / size


def leaves_named(tree: Tree, name: str) -> list[jax.Array]:
    """The leaves of a nested dict that are stored under this key."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if path[-1].key == name]
