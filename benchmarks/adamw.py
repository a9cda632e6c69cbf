"""AdamW of jaxdpo.training.optim beside optax: memory and time of one guarded update.

    python -m benchmarks.adamw

A guarded update leaves weights and moments as they are after a NaN. Each is compiled alone, its
weights and moments donated. "Temporary" is what the compiler allocates in addition to arguments and
results; it does not depend on the load of the machine, seconds do.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdpo.config.schema import OptimSection
from jaxdpo.training import optim

LAYERS, WIDTH, HIDDEN, VOCAB = 8, 512, 2048, 32000
RATE = 1e-3
ROUNDS = 8

Update = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]


def weights() -> Any:
    """37M weights like those of a small model: float32, layers stacked."""
    shapes = {
        "embed": {"weight": (VOCAB, WIDTH)},
        "layers": {
            "q": (LAYERS, WIDTH, WIDTH),
            "k": (LAYERS, WIDTH, WIDTH),
            "up": (LAYERS, WIDTH, HIDDEN),
            "down": (LAYERS, HIDDEN, WIDTH),
            "attn_norm": (LAYERS, WIDTH),
        },
    }
    return jax.tree.map(
        lambda shape: jnp.full(shape, 0.01, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def ours(section: OptimSection) -> tuple[Callable[[Any], Any], Update]:
    """(init, update) of this package."""

    def update(grads: Any, opt: Any, params: Any, accept: jax.Array) -> tuple[Any, Any]:
        norm = optim.global_norm(grads)
        return optim.update(grads, norm, opt, params, jnp.float32(RATE), section, accept)

    return lambda params: optim.init(params, section), update


def theirs(section: OptimSection, guard: str) -> tuple[Callable[[Any], Any], Update]:
    """(init, update) of optax, guarded by `where`, by apply_if_finite, or by nothing."""
    adamw = optax.adamw(
        RATE,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: optim._decays(path), params
        ),
        mu_dtype=section.mu_dtype,
    )
    rule = optax.chain(optax.clip_by_global_norm(section.max_grad_norm), adamw)
    if guard == "apply_if_finite":
        rule = optax.apply_if_finite(rule, 3)

    def update(grads: Any, opt: Any, params: Any, accept: jax.Array) -> tuple[Any, Any]:
        updates, new_opt = rule.update(grads, opt, params)
        new_params = optax.apply_updates(params, updates)
        if guard == "where":
            new_params, new_opt = jax.tree.map(
                lambda new, old: jnp.where(accept, new, old), (new_params, new_opt), (params, opt)
            )
        return new_params, new_opt

    return rule.init, update


def measure(init: Callable[[Any], Any], update: Update) -> dict[str, float]:
    """Temporary MiB, the same in float32 copies of the weights, and seconds of the best update."""
    params, accept = weights(), jnp.bool_(True)
    grads, opt = jax.tree.map(lambda w: w * 0.3, params), init(params)
    num_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    program = jax.jit(update, donate_argnums=(1, 2)).lower(grads, opt, params, accept).compile()
    analysis: Any = program.memory_analysis()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        params, opt = jax.block_until_ready(program(grads, opt, params, accept))
        seconds.append(time.perf_counter() - began)
    temporary = analysis.temp_size_in_bytes
    return {
        "temporary_mib": round(temporary / 2**20, 1),
        "copies_of_weights": round(temporary / num_bytes, 2),
        "best_seconds": round(min(seconds), 4),
    }


def main() -> None:
    """Print all as JSON."""
    results: dict[str, Any] = {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    for mu_dtype in ("float32", "bfloat16"):
        section = OptimSection(weight_decay=0.1, max_grad_norm=1.0, mu_dtype=mu_dtype)
        results[f"jaxdpo, mu {mu_dtype}"] = measure(*ours(section))
        for guard in ("where", "apply_if_finite", "none"):
            results[f"optax, guard {guard}, mu {mu_dtype}"] = measure(*theirs(section, guard))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
