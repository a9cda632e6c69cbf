"""LoRA (2106.09685): which weights get a low-rank update, how it starts, and adding it to them.

An adapter is a nested dict like params with the projections alone, each {"a": [L, *inputs, R], "b": [L, R, *outputs]} in float32: the
weight W counts as W + scale A B. Its files: peft.py.

Capitals in shapes: L layers, R rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.params import Params, Shape, logical_axes, param_shapes

TARGETS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
"""The projections that can have an adapter; never experts, routers, embeddings or the LM head."""
ALPHA = 16.0
"""lora.alpha where it was left alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """What an adapter is, its weights aside."""

    rank: int
    alpha: float
    rslora: bool
    """scale alpha / sqrt(R) (2312.03732) instead of alpha / R."""
    targets: tuple[str, ...]
    """Of TARGETS, in their order."""

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def names(self) -> list[str]:
        """The targets as options name them: q, k, v, ..."""
        return [target.split("/")[1] for target in self.targets]


def adapter_shapes(config: ModelConfig, lora: Lora) -> Params:
    """An adapter's shapes: nested dict of jax.ShapeDtypeStruct."""
    shapes = param_shapes(config)

    def update(shape: Shape) -> Params:
        sizes = {
            "a": (*shape.stack, *shape.inputs, lora.rank),
            "b": (*shape.stack, lora.rank, *shape.outputs),
        }
        return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}

    return nested({target: update(shapes[f"layers/{target}"]) for target in lora.targets})


def adapter_axes(config: ModelConfig, lora: Lora) -> Params:
    """An adapter's logical axes: each dimension lies as it does in the weight, the rank whole everywhere."""
    shapes, weights = param_shapes(config), logical_axes(config)["layers"]

    def update(target: str) -> Params:
        part, name = target.split("/")
        layer, *rest = weights[part][name]
        inputs = len(shapes[f"layers/{target}"].inputs)
        return {"a": (layer, *rest[:inputs], "rank"), "b": (layer, "rank", *rest[inputs:])}

    return nested({target: update(target) for target in lora.targets})


def nested(updates: Mapping[str, Any]) -> Params:
    """By target -> by part and name, as in params."""
    layers: Params = {}
    for target, update in updates.items():
        part, name = target.split("/")
        layers.setdefault(part, {})[name] = update
    return {"layers": layers}


def by_target(adapter: Params) -> dict[str, Any]:
    """An adapter's {"a", "b"} by target; the inverse of `nested`."""
    return {
        f"{part}/{name}": update
        for part, updates in adapter["layers"].items()
        for name, update in updates.items()
    }


def init_adapter(shapes: Params, key: jax.Array) -> Params:
    """The start: A uniform within plus or minus 1 / sqrt(inputs), as PEFT draws it, B zero, so that nothing changes at first."""

    def draw(target: str, a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct) -> Params:
        own_key = jax.random.fold_in(
            key, TARGETS.index(target)
        )  # the same whatever other targets there are
        bound = 1.0 / math.sqrt(math.prod(a.shape[1:-1]))
        return {
            "a": jax.random.uniform(own_key, a.shape, jnp.float32, -bound, bound),
            "b": jnp.zeros(b.shape, jnp.float32),
        }

    return nested({target: draw(target, **update) for target, update in by_target(shapes).items()})


@dataclasses.dataclass(frozen=True)
class MergedWeight:
    """A weight W with its adapter, W + scale A B; nothing is computed before it is asked for."""

    weight: Any
    """An array that is read one layer at a time: weight[layer,]."""
    update: Params
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    def __getitem__(self, index: tuple[int]) -> np.ndarray:
        """merged[layer,], in float32."""
        weight = np.asarray(self.weight[index]).astype(np.float32)
        change = np.tensordot(
            np.asarray(self.update["a"][index]), np.asarray(self.update["b"][index]), axes=1
        )
        change *= np.float32(self.scale)
        weight += change
        return weight


def merge(params: Params, adapter: Params, scale: float) -> Params:
    """All weights, with a MergedWeight where there is an adapter.

    Args:
        params: weights, not quantised ones, in any form that MergedWeight takes. What has no adapter is shared with the result.
        adapter: arrays.
    """
    layers = dict(params["layers"])
    for target, update in by_target(adapter).items():
        part, name = target.split("/")
        layers[part] = layers[part] | {name: MergedWeight(layers[part][name], update, scale)}
    return {**params, "layers": layers}
