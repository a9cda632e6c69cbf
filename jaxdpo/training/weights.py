"""The weights of a run: those that are trained, the frozen base under an adapter, and the
reference's own.

Full fine-tuning trains all weights. With LoRA an adapter is trained over a frozen base, which is
stored once, perhaps quantised, and which the reference shares (reference=adapter_off).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdpo.config.schema import Config
from jaxdpo.distributed import offload, sharding
from jaxdpo.losses.registry import needs_reference
from jaxdpo.models import quantize
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.load_weights import load_weights
from jaxdpo.models.lora import Lora, adapter_axes, adapter_shapes, init_adapter
from jaxdpo.models.params import Params, abstract_params, init_params
from jaxdpo.models.shardings import base_axes, base_shapes, base_shardings, trained_shardings
from jaxdpo.training.state import FrozenState, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyWeights:
    """Shapes and shardings of a run's weights, and their values at its start; every method that
    loads does so anew."""

    config: Config
    """Resolved: no `auto` in it."""
    model: ModelConfig
    folder: Path
    """The model's Hugging Face folder."""
    mesh: Mesh
    lora: Lora | None
    """None: all weights are trained."""
    start: Params | None
    """The adapter at lora.path, on the host."""

    @functools.cached_property
    def trained(self) -> Params:
        """Shapes of the trained weights: nested dict of jax.ShapeDtypeStruct."""
        if self.lora is None:
            return abstract_params(self.model, self.config.model.param_dtype)
        return adapter_shapes(self.model, self.lora)

    @functools.cached_property
    def shardings(self) -> Params:
        """Shardings of the trained weights."""
        return trained_shardings(self.model, self.mesh, self.lora)

    @functools.cached_property
    def fixed_shapes(self) -> FrozenState:
        """Shapes of base and reference."""
        section = self.config.model
        start = {} if self.start is None else {"lora": self.trained}
        base = None
        if self.lora is not None:
            base = base_shapes(self.model, section.compute_dtype, section.quantize)
        reference = None
        if self.reference_kind == "adapter_off":
            reference = start
        elif self.reference_kind == "frozen" and base is not None:
            reference = base | start
        elif self.reference_kind == "frozen":
            reference = abstract_params(self.model, self.reference_dtype)
        return FrozenState(base, reference)

    @functools.cached_property
    def fixed_shardings(self) -> FrozenState:
        """Shardings of base and reference; those of cached log-probs, which lie as the batch
        does."""
        axes = base_axes(self.model, self.config.model.quantize)
        if self.lora is not None:
            axes = axes | {"lora": adapter_axes(self.model, self.lora)}

        def shard(shapes: Params | None) -> Params | None:
            if shapes is None:
                return None
            return sharding.param_shardings(self.mesh, {key: axes[key] for key in shapes}, shapes)

        reference = shard(self.fixed_shapes.reference)
        if self.offloads_reference:
            reference = offload.on_host(reference)
        ref_logps: Any = None
        if self.reference_kind == "cached":
            ref_logps = sharding.rows(self.mesh, 1)
        return FrozenState(shard(self.fixed_shapes.base), reference, ref_logps)

    @property
    def reference_kind(self) -> str:
        """config.reference, or none where the loss reads no reference."""
        return self.config.reference if needs_reference(self.config.loss) else "none"

    @property
    def reference_dtype(self) -> str:
        """Dtype of a frozen reference: the compute dtype, to which its weights are cast anyway.

        A moving one (TR-DPO) is stored as the trained weights are: bfloat16 would lose small moves.
        """
        section = self.config.model
        return section.param_dtype if self.config.loss.ref_sync_every else section.compute_dtype

    @property
    def offloads_reference(self) -> bool:
        """Whether the reference is stored in the hosts' memory."""
        return "reference" in self.config.train.offload

    def num_trained(self) -> int:
        """Number of trained weights."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained))

    def num_all(self) -> int:
        """Number of weights of the model, adapters aside."""
        shapes = abstract_params(self.model, "float32")
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def initial(self) -> Params:
        """The trained weights before the first step.

        Raises:
            ValueError: the weights cannot be used.
        """
        if self.lora is None:
            return self._load_full(self.config.model.param_dtype)
        if self.start is not None:
            return sharding.put(self.start, self.shardings)
        # Another key than that of random weights, which are drawn from the seed itself.
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        init = jax.jit(lambda key: init_adapter(self.trained, key), out_shardings=self.shardings)
        return init(key)

    def base(self) -> Params | None:
        """The frozen weights under the adapter; None without one.

        Raises:
            ValueError: as `initial`.
        """
        if self.lora is None:
            return None
        return self._load_full(self.config.model.compute_dtype, self.config.model.quantize)

    def start_view(self, params: Params, base: Params | None) -> Params:
        """The model that the policy starts as, in the decoder's form, made of the weights given.

        Args:
            params: of `initial`; not read with LoRA, where the start is the base or the base with
                the adapter at lora.path.
            base: of `base`.
        """
        return params if base is None else base | self._start_adapter()

    def reference(self, params: Params, base: Params | None, *, shared: bool) -> Params | None:
        """FrozenState.reference, from what start_view takes; None where no reference runs.

        Args:
            shared: whether the policy goes on with `params`, so that a frozen reference must be a
                copy.
        """
        if self.reference_kind == "adapter_off":
            return self._start_adapter()
        if self.reference_kind != "frozen":
            return None
        if base is not None:
            return self._copy(base | self._start_adapter())
        has_right_dtype = self.config.model.param_dtype == self.reference_dtype
        if has_right_dtype and not shared and not self.offloads_reference:
            return params
        return self._copy(params, self.reference_dtype)

    def _start_adapter(self) -> Params:
        """What the reference has over LoRA's base: the adapter at lora.path, if there is one."""
        return {} if self.start is None else {"lora": sharding.put(self.start, self.shardings)}

    def _copy(self, tree: Params, dtype: str | None = None) -> Params:
        """A copy with the shardings of the reference."""
        shardings = self.fixed_shardings.reference

        def copy(weight: jax.Array) -> jax.Array:
            return jnp.array(weight, dtype or weight.dtype, copy=True)

        if not self.offloads_reference:
            return jax.jit(lambda tree: jax.tree.map(copy, tree), out_shardings=shardings)(tree)
        # One weight at a time: the devices may have no room for all of them.
        return jax.tree.map(
            lambda weight, target: jax.block_until_ready(jax.device_put(copy(weight), target)),
            tree,
            shardings,
        )

    def _load_full(self, dtype: str, kind: str = "none") -> Params:
        """All weights, from the files or from the seed, quantised as `kind` says."""
        if self.config.model.init == "pretrained":
            return load_weights(self.folder, self.model, self.mesh, dtype, kind)

        def draw(key: jax.Array) -> Params:
            params = init_params(self.model, key, dtype)
            return params if kind == "none" else quantize.quantize_params(params, kind)

        shardings = base_shardings(self.model, self.mesh, dtype, kind)
        return jax.jit(draw, out_shardings=shardings)(jax.random.key(self.config.seed))


def state_shardings(
    model: ModelConfig, mesh: Mesh, lora: Lora | None = None, *, offload_moments: bool = False
) -> Any:
    """Shardings of each part of the state, a TrainState of them.

    Args:
        offload_moments: whether AdamW's moments are offloaded to the hosts; else they lie with
            their weights.

    Raises:
        ValueError: the mesh does not divide the weights.
    """
    params = trained_shardings(model, mesh, lora)
    moments = offload.on_host(params) if offload_moments else params
    everywhere: Any = sharding.replicated(mesh)
    opt: Any = {"count": everywhere, "mu": moments, "nu": moments}
    return TrainState(params, opt, everywhere, everywhere)
