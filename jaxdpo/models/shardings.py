"""Shardings of a model's weights, and of an adapter's, over a mesh."""

from jax.sharding import Mesh

from jaxdpo.distributed import sharding
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.lora import Lora, adapter_axes, adapter_shapes
from jaxdpo.models.params import Params, abstract_params, logical_axes


def axis_sizes(model: ModelConfig) -> dict[str, int]:
    """What a mesh must divide, as `sharding.make_mesh` takes it."""
    return sharding.axis_sizes(logical_axes(model), abstract_params(model, "float32"))


def trained_shardings(model: ModelConfig, mesh: Mesh, lora: Lora | None = None) -> Params:
    """Where all weights live, or an adapter.

    Raises:
        ValueError: the mesh does not divide the weights.
    """
    if lora is None:
        return sharding.param_shardings(
            mesh, logical_axes(model), abstract_params(model, "float32")
        )
    return sharding.param_shardings(mesh, adapter_axes(model, lora), adapter_shapes(model, lora))
