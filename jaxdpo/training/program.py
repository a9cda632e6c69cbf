"""The steps of a run with the shapes and places of all that they take: enough to compile them, without weights or data."""

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
from jaxdpo.training.step import FrozenState, TrainState, compile_steps, init_state
from jaxdpo.training.weights import PolicyWeights, state_shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is computed, on which devices, and where everything lives."""

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
            model, mesh, lora, moments_wait="moments" in config.train.offload
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
        """Shapes, types and shardings of what a checkpoint holds."""
        shapes = jax.eval_shape(
            lambda params: init_state(params, self.config.optim), self.weights.trained
        )
        tree = checkpoint_tree(shapes, shapes.params if with_reference else None)
        return _placed(
            tree,
            checkpoint_tree(
                self.shardings, self.weights.fixed_shardings.reference if with_reference else None
            ),
        )

    def abstract_fixed(self, batch: Batch) -> FrozenState:
        """Shapes, types and shardings of what a step on `batch` takes beside the state."""
        shapes = self.weights.fixed_shapes
        if self.weights.reference_kind == "cached":
            shapes = shapes._replace(
                ref_logps=jax.ShapeDtypeStruct(batch.lengths_MBP2.shape, np.float32)
            )
        return _placed(shapes, self.weights.fixed_shardings)

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The train step for batches of this shape, traced but not yet compiled.

        Args:
            batch: arrays, or only their shapes and types.
        """
        where = sharding.rows(self.mesh, 1)
        rows = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), batch
        )
        apply = jax.ShapeDtypeStruct((), np.bool_, sharding=sharding.replicated(self.mesh))
        return self.train_step.lower(
            TrainState(**self.abstract_state(with_reference=False)),
            self.abstract_fixed(batch),
            rows,
            apply,
        )


def checkpoint_tree(state: TrainState, moving_reference: Params | None) -> dict[str, Any]:
    """The state as nested dict; the reference is part of it only where it moves (TR-DPO)."""
    return state._asdict() | ({} if moving_reference is None else {"reference": moving_reference})


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
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
