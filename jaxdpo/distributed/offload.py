"""Offload to host memory (train.offload): arrays that are stored there between their uses, and
fetched layer by layer.

Inside a compiled program an array's type says in which memory it is, so the same code serves
offloaded and other arrays. Not optax or flax because neither offloads: these are JAX's memory
kinds, and a scan over the stacked layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

Tree = Any

KIND = "pinned_host"
"""JAX's name for host memory that the devices read by themselves (DMA)."""


def on_host(shardings: Tree) -> Tree:
    """The same shardings in the memory of the devices' hosts.

    Vectors that are stacked over the layers (norms, most biases), which are small, stay on the
    devices: a TPU cannot fetch a single row of a matrix from its host.
    """

    def place(path: tuple, where: NamedSharding) -> NamedSharding:
        stacked = jax.tree_util.DictKey("layers") in path
        if stacked and len(where.spec) < 3:
            return where
        return where.with_memory_kind(KIND)

    return jax.tree_util.tree_map_with_path(place, shardings)


def is_on_host(tree: Tree) -> bool:
    """Whether some array is offloaded."""
    return any(jax.typeof(x).memory_space == jax.memory.Space.Host for x in jax.tree.leaves(tree))


def to_device(tree: Tree) -> Tree:
    """The arrays on the devices; those that are there already are left as they are."""

    def fetch(x: jax.Array) -> jax.Array:
        return jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x

    return jax.tree.map(fetch, tree)


def to_memory_of(tree: Tree, like: Tree) -> Tree:
    """The arrays in the memory in which their counterparts are; for compiled programs."""
    return jax.tree.map(lambda x, old: jax.device_put(x, jax.typeof(old).memory_space), tree, like)


def update_by_layer(
    change: Callable[..., tuple[Tree, ...]], moving: tuple[Tree, ...], reading: Tree
) -> tuple[Tree, ...]:
    """Update trees leaf by leaf: at once, or layer by layer where some are offloaded, so that one
    layer is on the devices.

    Args:
        change: the trees of `moving` and `reading`, or the same part of each -> the new ones of
            `moving`.
        moving: nested dicts like the model's weights; those of all layers are stacked, under
            "layers".
        reading: such a dict, which is only read.

    Returns:
        The new trees of `moving`, each in the memory in which it was.
    """
    if not is_on_host(moving):
        return change(*moving, reading)

    def update(now: tuple[Tree, ...], read: Tree) -> tuple[Tree, ...]:
        return to_memory_of(change(*to_device(now), read), now)

    def update_layer(
        stacked: tuple[Tree, ...], args: tuple[jax.Array, Tree]
    ) -> tuple[tuple[Tree, ...], None]:
        number, read = args
        now = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stacked
        )
        new = update(now, read)
        # Carried arrays are written in place, on the host too; outputs of the scan would be copies.
        written = jax.tree.map(
            lambda x, layer: jax.lax.dynamic_update_index_in_dim(x, layer, number, 0), stacked, new
        )
        return written, None

    num_layers = jax.tree.leaves(reading["layers"])[0].shape[0]
    stacked, _ = jax.lax.scan(
        update_layer,
        tuple(tree["layers"] for tree in moving),
        (jnp.arange(num_layers), reading["layers"]),
    )
    results: list[dict[str, Tree]] = [{"layers": layers} for layers in stacked]
    for name, read in reading.items():
        if name == "layers":
            continue
        new = update(tuple(tree[name] for tree in moving), read)
        for result, part in zip(results, new, strict=True):
            result[name] = part
    return tuple(results)
