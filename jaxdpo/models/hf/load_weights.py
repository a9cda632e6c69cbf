"""The weights of a Hugging Face folder onto a mesh, quantized one at a time while they are read."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdpo.models import quantize
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.params import Params
from jaxdpo.models.shardings import base_shardings, trained_shardings


def load_weights(
    folder: Path, model: ModelConfig, mesh: Mesh, dtype: str, kind: str = "none"
) -> Params:
    """All weights of a model, sharded over the mesh.

    Args:
        folder: a Hugging Face folder.
        model: its config.
        mesh: the devices.
        dtype: of the weights that are not quantized.
        kind: how the projections are quantized: none, int8 or nf4.

    Raises:
        ValueError: the files do not fit the model.
    """
    shardings = trained_shardings(model, mesh)
    if kind == "none":
        return load_params(folder, model, shardings, jnp.dtype(dtype))
    quantized_shardings: Any = base_shardings(model, mesh, dtype, kind)

    def convert(path: str, weight: jax.Array) -> Any:
        # Each weight is quantized before the next is read, so the unquantized model never exists.
        if not quantize.is_quantized(path):
            return weight
        sharding = quantized_shardings
        for key in path.split("/"):
            sharding = sharding[key]
        quantize_one = functools.partial(quantize.quantize, kind=kind)
        return jax.jit(quantize_one, out_shardings=sharding)(weight)

    return load_params(folder, model, shardings, jnp.dtype(dtype), convert)
