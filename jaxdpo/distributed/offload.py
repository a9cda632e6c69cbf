"""What waits in the memory of the hosts between its uses: its place there, its way to the devices and back.

Inside a compiled program an array knows in which memory it is, so that the same code serves what waits and what does not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

Tree = Any

KIND = "pinned_host"
"""The memory of hosts that devices read by themselves, as JAX calls it."""


def waiting(shardings: Tree) -> Tree:
    """The same places, in the memory of the devices' hosts.

    Stacked vectors of all layers (norms, most biases), which are small, stay on the devices: a TPU cannot take one row of packed rows from
    its host.
    """

    def place(path: tuple, where: NamedSharding) -> NamedSharding:
        stacked = jax.tree_util.DictKey("layers") in path
        return where if stacked and len(where.spec) < 3 else where.with_memory_kind(KIND)

    return jax.tree_util.tree_map_with_path(place, shardings)


def waits(tree: Tree) -> bool:
    """Whether some array is in the memory of the hosts."""
    return any(jax.typeof(x).memory_space == jax.memory.Space.Host for x in jax.tree.leaves(tree))


def fetched(tree: Tree) -> Tree:
    """The arrays on the devices; those that are there already are left as they are."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if waits(x) else x, tree
    )


def returned(tree: Tree, like: Tree) -> Tree:
    """The arrays in the memory in which their counterparts are; for compiled programs."""
    return jax.tree.map(lambda x, old: jax.device_put(x, jax.typeof(old).memory_space), tree, like)


def changed(
    change: Callable[..., tuple[Tree, ...]], moving: tuple[Tree, ...], reading: Tree
) -> tuple[Tree, ...]:
    """Change trees, leaf by leaf alike: at once, or where some of them wait, layer by layer, so that little of them is on the devices.

    Args:
        change: the trees of `moving` and `reading`, or the same part of each -> the new ones of `moving`.
        moving: nested dicts like the model's weights; those of all layers are stacked, under "layers".
        reading: such a dict, which is only read.

    Returns:
        The new trees of `moving`, each in the memory in which it was.
    """
    if not waits(moving):
        return change(*moving, reading)

    def part(now: tuple[Tree, ...], read: Tree) -> tuple[Tree, ...]:
        return returned(change(*fetched(now), read), now)

    def layer(
        stacked: tuple[Tree, ...], args: tuple[jax.Array, Tree]
    ) -> tuple[tuple[Tree, ...], None]:
        number, read = args
        now = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stacked
        )
        # In place, on the hosts too: what is carried is written to, what a scan stacks would be a second copy.
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, number, 0),
            stacked,
            part(now, read),
        ), None

    num_layers = jax.tree.leaves(reading["layers"])[0].shape[0]
    stacked, _ = jax.lax.scan(
        layer, tuple(tree["layers"] for tree in moving), (jnp.arange(num_layers), reading["layers"])
    )
    parts = {
        name: part(tuple(tree[name] for tree in moving), read)
        for name, read in reading.items()
        if name != "layers"
    }
    return tuple(
        {"layers": stacked[i]} | {name: new[i] for name, new in parts.items()}
        for i in range(len(moving))
    )
