"""Paths in nested dicts and JAX pytrees, written as text."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax


def path_name(path: tuple[Any, ...], separator: str = "/") -> str:
    """A path of jax.tree_util as text.

    >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"layers": {"q": 1}})
    >>> path_name(path)
    'layers/q'
    """
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths.

    >>> named_leaves({"layers": {"q": 1}})
    {'layers/q': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def flatten(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Nested dicts as one dict from paths to values; values that are no dicts are leaves.

    Not jax.tree, because it takes lists and None apart, which are values in a config.

    >>> flatten({"model": {"path": "m"}, "offload": ["moments"]})
    {'model.path': 'm', 'offload': ['moments']}
    """
    return dict(_items(tree, "", separator))


def _items(tree: Mapping[str, Any], prefix: str, separator: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}{separator}", separator)
        else:
            yield f"{prefix}{key}", value
