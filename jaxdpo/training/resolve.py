"""The rules about options, in three steps.

validate(config)             without I/O: problems of the options among themselves
resolve(config, model, raw)  once the model is known: every `auto`, 0 and null gets its value
check(config, data)          once the data is read: losses that its columns rule out
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxdpo.config.cross_checks import cross_check
from jaxdpo.config.schema import DEFAULT_EVAL_EVERY, Config, LoraSection
from jaxdpo.data.prepare import NO_VALIDATION, Prepared
from jaxdpo.distributed import sharding
from jaxdpo.losses import registry, rules
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.lora_targets import find_targets, lora_of
from jaxdpo.models.hf.peft import PeftAdapter, read_peft
from jaxdpo.models.lora import Lora
from jaxdpo.models.shardings import axis_sizes


class ResolvedConfig(NamedTuple):
    """A config that leaves nothing open, and what it stands for."""

    config: Config
    mesh: Mesh
    lora: Lora | None
    """The adapter that is trained."""
    found: PeftAdapter | None
    """The adapter at lora.path."""

    @property
    def start(self) -> Any:
        """The weights of the adapter at lora.path."""
        return None if self.found is None else self.found.adapter


def validate(config: Config) -> list[str]:
    """Problems of the options among themselves, as messages; empty when there are none."""
    return cross_check(config) + rules.check(config.loss, config.reference)


def resolve(
    config: Config,
    model: ModelConfig,
    raw: Mapping[str, Any],
    devices: Sequence[Any] | None = None,
) -> ResolvedConfig:
    """The config with values in place of all that is automatic, for a model and for devices.

    The result is what config.yaml and checkpoints hold: a resume on another machine, or with
    another version whose defaults differ, cannot change it unseen.

    Args:
        raw: the model's config.json.
        devices: default: all that are here.

    Raises:
        ValueError: the mesh or an option does not fit the devices, the model, or the adapter at
            lora.path.
    """
    mesh = sharding.make_mesh(config.mesh, devices=devices, sizes=axis_sizes(model))
    config = resolve_options(config, mesh, model, raw)
    config, lora, found = resolve_lora(config, model)
    return ResolvedConfig(config, mesh, lora, found)


def resolve_options(
    config: Config, mesh: Mesh, model: ModelConfig, raw: Mapping[str, Any]
) -> Config:
    """`resolve` for a mesh that is there already, without lora.*.

    Raises:
        ValueError: an option does not fit the model.
    """
    config = resolve_dtype(config, mesh)
    config = _resolve_lengths(config, model)
    config = _resolve_evaluation(config)
    config = _resolve_reference(config)
    config = _resolve_router(config, model, raw)
    config = dataclasses.replace(config, loss=rules.resolve(config.loss))
    check_attention(config, mesh, model)
    _check_offload(config)
    if config.data.max_length > model.max_positions:
        raise ValueError(
            f"data.max_length={config.data.max_length}: the model knows {model.max_positions} "
            f"positions. Use data.max_length={model.max_positions} or less"
        )
    return config


def resolve_dtype(config: Config, mesh: Mesh) -> Config:
    """The config with the platform's dtype in place of an automatic one."""
    if config.model.compute_dtype != "auto":
        return config
    section = dataclasses.replace(config.model, compute_dtype=sharding.default_dtype(mesh))
    return dataclasses.replace(config, model=section)


def _resolve_lengths(config: Config, model: ModelConfig) -> Config:
    return dataclasses.replace(config, data=config.data.with_lengths(model.max_positions))


def _resolve_evaluation(config: Config) -> Config:
    if config.eval.every is not None:
        return config
    every = DEFAULT_EVAL_EVERY if config.data.has_eval else 0
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=every))


def _resolve_reference(config: Config) -> Config:
    if config.reference != "auto":
        return config
    kind = "none"
    if registry.needs_reference(config.loss):
        kind = "adapter_off" if config.lora.enabled else "frozen"
    return dataclasses.replace(config, reference=kind)


def _resolve_router(config: Config, model: ModelConfig, raw: Mapping[str, Any]) -> Config:
    """The weight of the load balancing loss; where the option is left alone, config.json decides.

    Raises:
        ValueError: the option is set, but the model has no experts.
    """
    coef = config.loss.router_aux_coef
    if not model.num_experts:
        if coef is not None:
            raise ValueError(f"loss.router_aux_coef={coef}: the model has no experts. Leave it out")
        return config
    if coef is None:
        # As transformers and TRL do: the loss only where the router's logits are asked for.
        coef = model.router_aux_coef if raw.get("output_router_logits") else 0.0
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, router_aux_coef=coef))


def _check_offload(config: Config) -> None:
    """Refuse to offload a reference that has no weights of its own.

    Raises:
        ValueError: train.offload names it.
    """
    if "reference" not in config.train.offload or config.reference == "frozen":
        return
    why = {
        "adapter_off": "is the policy's own base",
        "cached": "holds no weights",
        "none": "does not exist",
    }[config.reference]
    raise ValueError(
        f"train.offload={config.train.offload}: the reference ({config.reference}) {why}. "
        "Leave reference out"
    )


def attention_of(config: Config, mesh: Mesh, model: ModelConfig) -> str:
    """What model.attention=auto means for these devices and this model.

    It is not part of the resolved config: a resume on another platform may compute attention
    otherwise.
    """
    if config.model.attention != "auto":
        return config.model.attention
    if sharding.platform(mesh) == "tpu" and not _windows_in_shared_prefixes(config, model):
        return "splash"
    return "blocks"


def check_attention(config: Config, mesh: Mesh, model: ModelConfig) -> None:
    """Refuse an attention that cannot do what it is asked for.

    Raises:
        ValueError: splash away from TPUs, or with windows that are no intervals of token positions.
    """
    if config.model.attention != "splash":
        return
    if sharding.platform(mesh) != "tpu":
        raise ValueError(
            "model.attention=splash: is a TPU's kernel, and these devices are none. "
            "Use model.attention=auto"
        )
    if _windows_in_shared_prefixes(config, model):
        raise ValueError(
            "model.attention=splash: the model has sliding windows, which a shared prefix cuts "
            "into more than one interval. Use model.attention=blocks, or data.share_prefix=false"
        )


def _windows_in_shared_prefixes(config: Config, model: ModelConfig) -> bool:
    """Whether a sliding window may cut what a token of the chosen answer sees into two intervals.

    With a shared prefix (reverse(chosen) | prompt | rejected) its own answer and the prompt are on
    two sides of it.
    """
    window = model.sliding_window
    return window is not None and config.data.share_prefix and window < config.data.max_length


def resolve_lora(
    config: Config, model: ModelConfig
) -> tuple[Config, Lora | None, PeftAdapter | None]:
    """The config with values for what lora.* leaves open, and the adapter that they mean.

    Returns:
        (config, the adapter that is trained, the adapter at lora.path with its weights).

    Raises:
        ValueError: the options do not fit the model, or the adapter at lora.path.
    """
    section = config.lora
    if not section.enabled:
        return config, None, None
    if section.path is None:
        found, lora = None, lora_of(section, model)
    else:
        found = read_peft(Path(section.path).expanduser(), model)
        lora = found.lora
        _check_agreement(section, lora, model)
    resolved = LoraSection(
        rank=lora.rank,
        alpha=lora.alpha,
        rslora=lora.rslora,
        targets=lora.names,
        path=section.path,
    )
    return dataclasses.replace(config, lora=resolved), lora, found


def _check_agreement(section: LoraSection, lora: Lora, model: ModelConfig) -> None:
    """Options that are given beside lora.path must say what the adapter there is."""
    problems = []

    def compare(name: str, given: Any, found: Any) -> None:
        if given != found:
            problems.append(
                f"lora.{name}={given}: the adapter in lora.path has {found}. Leave it out"
            )

    if section.rank:
        compare("rank", section.rank, lora.rank)
    if section.alpha is not None:
        compare("alpha", section.alpha, lora.alpha)
    if section.rslora:
        compare("rslora", section.rslora, lora.rslora)
    if section.targets is not None:
        compare("targets", find_targets(model, section.targets), lora.targets)
    if problems:
        raise ValueError("\n".join(problems))


def num_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: train.steps, or those of train.epochs, rounded up.

    Raises:
        ValueError: the warm-up would not end before them.
    """
    epochs = config.train.epochs or 1
    # Less a rounding error of the product, so that 0.1 epochs of 30 steps are 3.
    steps = config.train.steps or max(1, math.ceil(epochs * steps_per_epoch - 1e-6))
    warmup = config.optim.warmup_steps
    if warmup >= steps:
        raise ValueError(
            f"optim.warmup_steps={warmup}: must be fewer than the steps of the run, which are "
            f"{steps} (train.epochs={epochs:g} of {steps_per_epoch} steps each). Lower it, set "
            "optim.warmup_ratio instead, or train for longer"
        )
    return steps


def without_evaluation(config: Config, given_every: int | None, data: Prepared) -> Config:
    """The config with eval.every=0 where no pair was held out and nobody asked for evaluations.

    Args:
        config: resolved.
        given_every: eval.every before that: what the user asked for.

    Raises:
        ValueError: the user asked for evaluations.
    """
    if len(data.eval) or not config.eval.every:
        return config
    if given_every:
        raise ValueError(
            f"eval.every={given_every}: {NO_VALIDATION} "
            f"(data.eval_fraction={config.data.eval_fraction} of pairs that have one prompt). "
            "Set data.eval, or eval.every=0"
        )
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=0))


def check(config: Config, data: Prepared) -> None:
    """Refuse columns of the rows that the loss has no use for.

    Raises:
        ValueError: weights where the loss cannot weigh pairs, or margins where it has no logit.
    """
    weighted, with_margins = [], []
    for name, table in (("data.train", data.train), ("data.eval", data.eval)):
        if np.unique(table.weights).size > 1:
            weighted.append(name)
        if table.margins.any():
            with_margins.append(name)
    # A coupled loss compares every pair with every other: which of them a weight should count for
    # is not defined.
    if weighted and registry.coupled(config.loss):
        raise ValueError(
            f"loss.name={config.loss.name}: mixes the pairs of a step, so it cannot weigh them, "
            f"and the rows of {weighted[0]} differ in their column 'weight'. "
            "Remove that column, or use another loss"
        )
    if with_margins and not registry.takes_margins(config.loss):
        taking = ", ".join(
            name for name, row in registry.LOSSES.items() if "length_penalty" in row.options
        )
        raise ValueError(
            f"loss.name={config.loss.name}: has no logit to take a margin from, and rows of "
            f"{with_margins[0]} have one in their column 'margin'. "
            f"Remove that column, or use one of {taking}"
        )
