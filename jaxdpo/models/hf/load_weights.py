"""The weights of a Hugging Face folder onto a mesh, quantised one at a time as they are read."""

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
    """All weights of a model, each device's share on it.

    Args:
        folder: a Hugging Face folder.
        dtype: of the weights that are not quantised.
        kind: none, int8 or nf4: how the projections are quantised.

    Raises:
        ValueError: the files do not hold the model's weights.
    """
    shardings = trained_shardings(model, mesh)
    if kind == "none":
        return load_params(folder, model, shardings, jnp.dtype(dtype))
    quantised_shardings: Any = base_shardings(model, mesh, dtype, kind)

    def convert(path: str, weight: jax.Array) -> Any:
        """A weight that was just read, in the form in which it is stored."""
        if not quantize.is_quantized(path):
            return weight
        target = quantised_shardings
        for name in path.split("/"):
            target = target[name]
        quantise = functools.partial(quantize.quantize, kind=kind)
        return jax.jit(quantise, out_shardings=target)(weight)

    return load_params(folder, model, shardings, jnp.dtype(dtype), convert)
