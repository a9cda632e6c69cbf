"""The train and evaluation steps of a run, with shapes and shardings of their arguments.

Enough to compile them (for another machine, too) without weights or data.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdpo.config.schema import Config
from jaxdpo.data.packing import Batch
from jaxdpo.distributed import sharding
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.params import Params
from jaxdpo.training.completion_logps import StepOptions
from jaxdpo.training.resolve import ResolvedConfig, attention_of
from jaxdpo.training.state import FrozenState, TrainState, init_state
from jaxdpo.training.step import compile_steps
from jaxdpo.training.weights import PolicyWeights, state_shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The jitted steps of a run, their devices, and the shardings of their arguments."""

    config: Config
    """Resolved: no `auto` in it but for what depends on the platform alone."""
    mesh: Mesh
    """Its devices may be those of another machine, for which the steps are then compiled."""
    model: ModelConfig
    folder: Path
    """The model's Hugging Face folder."""
    options: StepOptions
    weights: PolicyWeights
    shardings: Any
    """A TrainState of NamedShardings, leaf for leaf."""
    train_step: Callable
    eval_step: Callable

    @classmethod
    def of(
        cls, resolved: ResolvedConfig, model: ModelConfig, folder: Path, *, total_steps: int
    ) -> "Program":
        """The program of a resolved config.

        Args:
            total_steps: length of the learning rate's schedule.

        Raises:
            ValueError: the mesh does not divide the model.
        """
        config, mesh, lora = resolved.config, resolved.mesh, resolved.lora
        forward = _forward(config, mesh, model, 1.0 if lora is None else lora.scale)
        options = StepOptions(
            model=model,
            loss=config.loss,
            optim=config.optim,
            forward=forward,
            total_steps=total_steps,
        )
        weights = PolicyWeights(
            config=config, model=model, folder=folder, mesh=mesh, lora=lora, start=resolved.start
        )
        shardings = state_shardings(
            model, mesh, lora, offload_moments="moments" in config.train.offload
        )
        train_step, eval_step = compile_steps(options, mesh, shardings, weights.fixed_shardings)
        return cls(
            config=config,
            mesh=mesh,
            model=model,
            folder=folder,
            options=options,
            weights=weights,
            shardings=shardings,
            train_step=train_step,
            eval_step=eval_step,
        )

    def abstract_state(self, with_reference: bool) -> dict[str, Any]:
        """Shapes, dtypes and shardings of what a checkpoint holds."""
        shapes = jax.eval_shape(
            lambda params: init_state(params, self.config.optim), self.weights.trained
        )
        if not with_reference:
            return _abstract(checkpoint_tree(shapes), checkpoint_tree(self.shardings))
        reference_shardings = self.weights.fixed_shardings.reference
        return _abstract(
            checkpoint_tree(shapes, shapes.params),
            checkpoint_tree(self.shardings, reference_shardings),
        )

    def abstract_fixed(self, batch: Batch) -> FrozenState:
        """Shapes, dtypes and shardings of what a step on `batch` takes beside the state."""
        shapes = self.weights.fixed_shapes
        if self.weights.reference_kind == "cached":
            ref_logps: Any = jax.ShapeDtypeStruct(batch.lengths_MBP2.shape, np.float32)
            shapes = shapes._replace(ref_logps=ref_logps)
        return _abstract(shapes, self.weights.fixed_shardings)

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The train step for batches of this shape, traced but not yet compiled.

        Args:
            batch: arrays, or only their shapes and dtypes.
        """
        by_sequence, everywhere = sharding.rows(self.mesh, 1), sharding.replicated(self.mesh)
        return self.train_step.lower(
            TrainState(**self.abstract_state(with_reference=False)),
            self.abstract_fixed(batch),
            _abstract(batch, jax.tree.map(lambda _: by_sequence, batch)),
            jax.ShapeDtypeStruct((), np.bool_, sharding=everywhere),
        )


def checkpoint_tree(state: TrainState, moving_reference: Params | None = None) -> dict[str, Any]:
    """The state as nested dict; the reference is part of it only where it moves (TR-DPO)."""
    tree = state._asdict()
    if moving_reference is not None:
        tree["reference"] = moving_reference
    return tree


def _abstract(arrays: Any, shardings: Any) -> Any:
    """Shapes and dtypes of arrays (or of such shapes), with shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        arrays,
        shardings,
    )


def _forward(config: Config, mesh: Mesh, model: ModelConfig, lora_scale: float) -> ForwardOptions:
    """The forward options, with each `auto` resolved for this platform."""
    section = config.model
    return ForwardOptions(
        compute_dtype=section.compute_dtype,
        attention=attention_of(config, mesh, model),
        remat="full" if section.remat == "auto" else section.remat,
        lora_scale=lora_scale,
        mesh=mesh,
    )
