"""Shardings of a model's weights, and of an adapter's, over a mesh."""

import jax
from jax.sharding import Mesh

from jaxdpo.distributed import sharding
from jaxdpo.models import quantize
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.lora import Lora, adapter_axes, adapter_shapes
from jaxdpo.models.params import Params, abstract_params, logical_axes


def axis_sizes(model: ModelConfig) -> dict[str, int]:
    """Sizes of the logical axes that a mesh must divide, as sharding.make_mesh takes them."""
    return sharding.axis_sizes(logical_axes(model), abstract_params(model, "float32"))


def trained_shardings(model: ModelConfig, mesh: Mesh, lora: Lora | None = None) -> Params:
    """Shardings of all weights or, with `lora`, of the adapter alone.

    Raises:
        ValueError: the mesh does not divide the weights.
    """
    if lora is None:
        shapes = abstract_params(model, "float32")
        return sharding.param_shardings(mesh, logical_axes(model), shapes)
    return sharding.param_shardings(mesh, adapter_axes(model, lora), adapter_shapes(model, lora))


def base_shapes(model: ModelConfig, dtype: str, kind: str) -> Params:
    """Shapes of all weights as LoRA's frozen base stores them.

    Args:
        dtype: of the weights that are not quantized.
        kind: none, int8 or nf4.
    """
    shapes = abstract_params(model, dtype)
    if kind == "none":
        return shapes
    return jax.eval_shape(lambda params: quantize.quantize_params(params, kind), shapes)


def base_axes(model: ModelConfig, kind: str) -> Params:
    """Logical axes of `base_shapes`."""
    axes = logical_axes(model)
    return axes if kind == "none" else quantize.quantized_axes(axes)


def base_shardings(model: ModelConfig, mesh: Mesh, dtype: str, kind: str) -> Params:
    """Shardings of `base_shapes`."""
    return sharding.param_shardings(mesh, base_axes(model, kind), base_shapes(model, dtype, kind))
