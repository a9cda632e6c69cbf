"""LoRA (2106.09685): which weights have an adapter, its initial values, and merging it.

An adapter is a nested dict like params, with the adapted projections only, each
{"a": [L, *inputs, R], "b": [L, R, *outputs]} in float32. The weight W then acts as W + scale A B.
Its files: hf/peft.py.

Shape suffixes: L layers, R rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.params import Params, logical_axes, param_shapes

TARGETS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
"""Projections that can have an adapter; never experts, routers, embeddings or the LM head."""
ALPHA = 16.0
"""Default of lora.alpha: a scale of 2 at rank 8 and of 1 at rank 16 (the common choices)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """An adapter's hyperparameters."""

    rank: int
    alpha: float
    rslora: bool
    """scale alpha / sqrt(R) (2312.03732) instead of alpha / R."""
    targets: tuple[str, ...]
    """Some of TARGETS, in their order."""

    @property
    def scale(self) -> float:
        """Factor of A B."""
        if self.rslora:
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank

    @property
    def names(self) -> list[str]:
        """The targets as options name them: q, k, v, ..."""
        return [target.split("/")[1] for target in self.targets]


def adapter_shapes(config: ModelConfig, lora: Lora) -> Params:
    """An adapter's shapes: nested dict of jax.ShapeDtypeStruct."""
    shapes = param_shapes(config)
    updates = {}
    for target in lora.targets:
        shape = shapes[f"layers/{target}"]
        a = (*shape.stack, *shape.inputs, lora.rank)
        b = (*shape.stack, lora.rank, *shape.outputs)
        updates[target] = {
            "a": jax.ShapeDtypeStruct(a, jnp.float32),
            "b": jax.ShapeDtypeStruct(b, jnp.float32),
        }
    return nested(updates)


def adapter_axes(config: ModelConfig, lora: Lora) -> Params:
    """An adapter's logical axes: those of the weight's dimensions, and the rank, never sharded."""
    shapes, weight_axes = param_shapes(config), logical_axes(config)["layers"]
    updates = {}
    for target in lora.targets:
        part, name = target.split("/")
        layer, *rest = weight_axes[part][name]
        num_inputs = len(shapes[f"layers/{target}"].inputs)
        updates[target] = {
            "a": (layer, *rest[:num_inputs], "rank"),
            "b": (layer, "rank", *rest[num_inputs:]),
        }
    return nested(updates)


def nested(updates: Mapping[str, Any]) -> Params:
    """An adapter from its {"a", "b"} by target."""
    layers: Params = {}
    for target, update in updates.items():
        part, name = target.split("/")
        layers.setdefault(part, {})[name] = update
    return {"layers": layers}


def by_target(adapter: Params) -> dict[str, Any]:
    """An adapter's {"a", "b"} by target; the inverse of `nested`."""
    targets = {}
    for part, updates in adapter["layers"].items():
        for name, update in updates.items():
            targets[f"{part}/{name}"] = update
    return targets


def init_adapter(shapes: Params, key: jax.Array) -> Params:
    """Initial values: A uniform within plus or minus 1 / sqrt(inputs), B zero.

    PEFT draws A from the same distribution (its Kaiming-uniform with a = sqrt(5)). With B zero, the
    adapter changes nothing at first.
    """
    updates = {}
    for target, update in by_target(shapes).items():
        # A key by target, so that its values do not depend on which other targets there are.
        target_key = jax.random.fold_in(key, TARGETS.index(target))
        shape = update["a"].shape
        bound = 1.0 / math.sqrt(math.prod(shape[1:-1]))
        updates[target] = {
            "a": jax.random.uniform(target_key, shape, jnp.float32, -bound, bound),
            "b": jnp.zeros(update["b"].shape, jnp.float32),
        }
    return nested(updates)


@dataclasses.dataclass(frozen=True)
class MergedWeight:
    """A weight W with its adapter, W + scale A B, computed one layer at a time when it is read.

    So that an export needs no second copy of the model in memory.
    """

    weight: Any
    """An array, read as weight[layer,]."""
    update: Params
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    def __getitem__(self, index: tuple[int]) -> np.ndarray:
        """merged[layer,], in float32."""
        weight = np.asarray(self.weight[index]).astype(np.float32)
        a, b = np.asarray(self.update["a"][index]), np.asarray(self.update["b"][index])
        change = np.tensordot(a, b, axes=1)
        change *= np.float32(self.scale)
        weight += change
        return weight


def merge(params: Params, adapter: Params, scale: float) -> Params:
    """All weights, with a MergedWeight where there is an adapter.

    Args:
        params: weights, not quantized, in any form that MergedWeight takes. Those without an
            adapter are shared with the result.
        adapter: arrays.
    """
    layers = dict(params["layers"])
    for target, update in by_target(adapter).items():
        part, name = target.split("/")
        layers[part] = layers[part] | {name: MergedWeight(layers[part][name], update, scale)}
    return {**params, "layers": layers}
