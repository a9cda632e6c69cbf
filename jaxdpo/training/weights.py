"""The weights of a run: what is trained, what stays as it is under it, and what the reference has of its own.

Full fine-tuning trains all weights. With LoRA an adapter is trained over a base, which is held once, perhaps in few bits, and which the
reference shares (reference=adapter_off).
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
from jaxdpo.training.step import FrozenState, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyWeights:
    """Shapes and places of a run's weights, and their values at its start; every method that loads does so anew."""

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
        """Shapes of what is trained: nested dict of jax.ShapeDtypeStruct."""
        return (
            abstract_params(self.model, self.config.model.param_dtype)
            if self.lora is None
            else adapter_shapes(self.model, self.lora)
        )

    @functools.cached_property
    def shardings(self) -> Params:
        """Where what is trained lives."""
        return trained_shardings(self.model, self.mesh, self.lora)

    @functools.cached_property
    def fixed_shapes(self) -> FrozenState:
        """Shapes of base and reference."""
        section = self.config.model
        base = None
        if self.lora is not None:
            base = base_shapes(self.model, section.compute_dtype, section.quantize)
        kind, own = self.reference_kind, {} if self.start is None else {"lora": self.trained}
        references = {
            "adapter_off": own,
            "frozen": self._full_shapes(self.reference_dtype) if base is None else base | own,
        }
        return FrozenState(base, references.get(kind))

    @functools.cached_property
    def fixed_shardings(self) -> FrozenState:
        """Where base and reference live; log-probs that were computed before, as the rows of a batch."""
        axes = base_axes(self.model, self.config.model.quantize)
        all_axes = (
            axes if self.lora is None else axes | {"lora": adapter_axes(self.model, self.lora)}
        )
        shapes = self.fixed_shapes

        def place(tree: Params | None) -> Params | None:
            return (
                None
                if tree is None
                else sharding.param_shardings(self.mesh, {key: all_axes[key] for key in tree}, tree)
            )

        cached: Any = sharding.rows(self.mesh, 1) if self.reference_kind == "cached" else None
        reference = place(shapes.reference)
        return FrozenState(
            place(shapes.base),
            offload.waiting(reference) if "reference" in self.config.train.offload else reference,
            cached,
        )

    @property
    def reference_kind(self) -> str:
        """config.reference, or none where the loss reads no reference."""
        return self.config.reference if needs_reference(self.config.loss) else "none"

    @property
    def reference_dtype(self) -> str:
        """Type of a frozen reference: what products take anyway, but for a reference that moves by small amounts (TR-DPO)."""
        return (
            self.config.model.param_dtype
            if self.config.loss.ref_sync_every
            else self.config.model.compute_dtype
        )

    def num_trained(self) -> int:
        """Number of weights that are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained))

    def num_all(self) -> int:
        """Number of weights of the model, adapters aside."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._full_shapes("float32")))

    def initial(self) -> Params:
        """What is trained, as it is before the first step.

        Raises:
            ValueError: the weights cannot be used.
        """
        if self.lora is None:
            return self._load_full(self.config.model.param_dtype)
        if self.start is not None:
            return self._put_start(self.start)
        key = jax.random.fold_in(
            jax.random.key(self.config.seed), 1
        )  # apart from that of random weights
        return jax.jit(lambda key: init_adapter(self.trained, key), out_shardings=self.shardings)(
            key
        )

    def base(self) -> Params | None:
        """The weights under the adapter; None without one.

        Raises:
            ValueError: as `initial`.
        """
        return (
            None
            if self.lora is None
            else self._load_full(self.config.model.compute_dtype, self.config.model.quantize)
        )

    def start_view(self, params: Params, base: Params | None) -> Params:
        """The model that the policy starts as, in the decoder's form, made of the weights given.

        Args:
            params: of `initial`; with LoRA not looked at, as the start is the base or the base with the adapter at lora.path.
            base: of `base`.
        """
        return params if base is None else base | self._own()

    def reference(self, params: Params, base: Params | None, *, shared: bool) -> Params | None:
        """FrozenState.reference, from what start_view takes; None where no reference runs.

        Args:
            shared: whether the policy goes on with `params`, so that a frozen reference must be a copy.
        """
        if self.reference_kind == "adapter_off":
            return self._own()
        if self.reference_kind != "frozen":
            return None
        if base is not None:
            return self._copy(base | self._own())
        stays = not shared and "reference" not in self.config.train.offload
        return (
            params
            if stays and self.config.model.param_dtype == self.reference_dtype
            else self._copy(params, self.reference_dtype)
        )

    def _own(self) -> Params:
        """What the reference has over LoRA's base."""
        return {} if self.start is None else {"lora": self._put_start(self.start)}

    def _copy(self, tree: Params, dtype: str | None = None) -> Params:
        """A copy where a frozen reference lives."""
        places = self.fixed_shardings.reference
        if (
            "reference" in self.config.train.offload
        ):  # one weight at a time, as the devices may not have room for all
            return jax.tree.map(
                lambda w, where: jax.block_until_ready(
                    jax.device_put(jnp.array(w, dtype or w.dtype, copy=True), where)
                ),
                tree,
                places,
            )
        return jax.jit(
            lambda tree: jax.tree.map(lambda w: jnp.array(w, dtype or w.dtype, copy=True), tree),
            out_shardings=places,
        )(tree)

    def _put_start(self, start: Params) -> Params:
        return sharding.put(start, self.shardings)

    def _full_shapes(self, dtype: str) -> Params:
        return abstract_params(self.model, dtype)

    def _load_full(self, dtype: str, kind: str = "none") -> Params:
        """All weights, from the files or from the seed, quantised as `kind` says."""
        if self.config.model.init == "pretrained":
            return load_weights(self.folder, self.model, self.mesh, dtype, kind)

        def draw(key: jax.Array) -> Params:
            params = init_params(self.model, key, dtype)
            return params if kind == "none" else quantize.quantised_tree(params, kind)

        shardings = base_shardings(self.model, self.mesh, dtype, kind)
        return jax.jit(draw, out_shardings=shardings)(jax.random.key(self.config.seed))


def state_shardings(
    model: ModelConfig, mesh: Mesh, lora: Lora | None = None, *, moments_wait: bool = False
) -> Any:
    """Where each part of the state lives; moments with their weights, or on the hosts of these devices.

    Raises:
        ValueError: the mesh does not divide the weights.
    """
    params, everywhere = trained_shardings(model, mesh, lora), sharding.replicated(mesh)
    moments = offload.waiting(params) if moments_wait else params
    leaves: Any = (
        params,
        {"count": everywhere, "mu": moments, "nu": moments},
        everywhere,
        everywhere,
    )
    return TrainState(*leaves)
