"""The decoder's weights as a nested dict of arrays: their shapes, logical axes and random values.

The shapes are declared once, by the modules in decoder.py, and read from there.

Shape suffixes: none; a weight's dimensions are its logical axes (`logical_axes`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import Decoder

Params = dict[str, Any]


@functools.cache
def _abstract_module(
    config: ModelConfig, dtype: str, part: str | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder, or its attribute `part`, with shapes instead of arrays. Cached: it is traced."""

    def make() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(params=0), dtype=jnp.dtype(dtype))

    decoder = nnx.eval_shape(make)
    return nnx.split(decoder if part is None else getattr(decoder, part))


def abstract_params(config: ModelConfig, dtype: str) -> Params:
    """The weights' shapes: nested dict of jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(_abstract_module(config, dtype)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The weights' logical axes: nested dict of tuples, as sharding.param_shardings takes them."""
    axes = jax.tree.map(
        lambda variable: variable.axes,
        _abstract_module(config, "float32")[1],
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return nnx.to_pure_dict(axes)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a parameter in three parts."""

    stack: tuple[int, ...]
    """Stacked axes: layers, then experts."""
    inputs: tuple[int, ...]
    """What a matmul contracts; empty for a vector."""
    outputs: tuple[int, ...]

    @property
    def full(self) -> tuple[int, ...]:
        """The shape of the array."""
        return (*self.stack, *self.inputs, *self.outputs)


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Path (layers/attn/q) -> shape of every parameter, as the decoder's modules declare them."""
    shapes = {}
    for path, variable in nnx.to_flat_state(_abstract_module(config, "float32")[1]):
        num_stacked = sum(axis in ("layer", "expert") for axis in variable.axes)
        stack, rest = variable.shape[:num_stacked], variable.shape[num_stacked:]
        inputs, outputs = rest[: variable.num_inputs], rest[variable.num_inputs :]
        shapes["/".join(map(str, path))] = Shape(stack, inputs, outputs)
    return shapes


def init_params(config: ModelConfig, key: jax.Array, dtype: str) -> Params:
    """Random weights: normal with standard deviation initializer_range; norms 1, biases 0.

    Call it under jit with out_shardings, so that no device ever holds all weights.
    """
    decoder = Decoder(config, rngs=nnx.Rngs(params=key), dtype=jnp.dtype(dtype))
    return nnx.to_pure_dict(nnx.split(decoder)[1])


def bind(config: ModelConfig, part: str, weights: Params) -> Any:
    """The decoder's module `part` with these weights, as flax.linen's Module.bind does it."""
    graph, abstract = _abstract_module(config, "float32", part)
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the next line writes into it
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)
