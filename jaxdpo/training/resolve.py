"""A run's config with values in place of all that is left open, once the model is known."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxdpo.config.schema import Config, LoraSection
from jaxdpo.distributed import sharding
from jaxdpo.losses.registry import needs_reference
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


def settle_for(
    config: Config, model: ModelConfig, raw: Mapping[str, Any], devices: Sequence[Any] | None = None
) -> ResolvedConfig:
    """The config settled for a model and for devices; by default, for all that are here.

    Args:
        raw: the model's config.json.

    Raises:
        ValueError: the mesh or an option does not fit the devices, the model, or the adapter at lora.path.
    """
    mesh = sharding.make_mesh(config.mesh, devices=devices, sizes=axis_sizes(model))
    config, lora, found = settle_lora(settle(config, mesh, model, raw), model)
    return ResolvedConfig(config, mesh, lora, found)


def settle(config: Config, mesh: Mesh, model: ModelConfig, raw: Mapping[str, Any]) -> Config:
    """The config with values in place of all that is automatic, so that a resume elsewhere cannot change them unseen.

    Args:
        raw: the model's config.json.

    Raises:
        ValueError: an option does not fit the model.
    """
    config = settle_router(
        settle_reference(settle_lengths(settle_dtype(config, mesh), model)), model, raw
    )
    check_attention(config, mesh, model)
    check_offload(config)
    if config.data.max_length > model.max_positions:
        raise ValueError(
            f"data.max_length={config.data.max_length}: the model knows {model.max_positions} positions. "
            f"Use data.max_length={model.max_positions} or less"
        )
    return config


def settle_dtype(config: Config, mesh: Mesh) -> Config:
    """The config with the platform's type in place of an automatic one."""
    if config.model.compute_dtype != "auto":
        return config
    dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))


def attention_of(config: Config, mesh: Mesh, model: ModelConfig) -> str:
    """What model.attention=auto means for these devices and this model. A resume elsewhere may compute otherwise."""
    if config.model.attention != "auto":
        return config.model.attention
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return "splash" if on_tpu and not _windows_in_shared_rows(config, model) else "blocks"


def check_attention(config: Config, mesh: Mesh, model: ModelConfig) -> None:
    """Refuse an attention that cannot do what it is asked for.

    Raises:
        ValueError: splash away from TPUs, or with windows that are no intervals of slots.
    """
    if config.model.attention != "splash":
        return
    if mesh.devices.flat[0].platform != "tpu":
        raise ValueError(
            "model.attention=splash: is a TPU's kernel, and these devices are none. Use model.attention=auto"
        )
    if _windows_in_shared_rows(config, model):
        raise ValueError(
            "model.attention=splash: the model has sliding windows, which shared rows cut into more than one interval. "
            "Use model.attention=blocks, or data.share_prefix=false"
        )


def _windows_in_shared_rows(config: Config, model: ModelConfig) -> bool:
    """Whether a window may cut what a chosen answer's token sees, which lies in two runs of slots then."""
    return (
        model.sliding_window is not None
        and config.data.share_prefix
        and model.sliding_window < config.data.max_length
    )


def settle_lengths(config: Config, model: ModelConfig) -> Config:
    """The config with numbers in place of automatic lengths."""
    data = config.data
    max_length = data.max_length or min(1024, model.max_positions)
    max_prompt_length = data.max_prompt_length or max_length // 2
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, max_length=max_length, max_prompt_length=max_prompt_length),
    )


def settle_reference(config: Config) -> Config:
    """The config with the reference's kind in place of `auto`."""
    if config.reference != "auto":
        return config
    kind = "adapter_off" if config.lora.enabled else "frozen"
    return dataclasses.replace(config, reference=kind if needs_reference(config.loss) else "none")


def check_offload(config: Config) -> None:
    """Refuse to let wait what is not there.

    Args:
        config: with the reference settled.

    Raises:
        ValueError: no reference of its own would wait.
    """
    if "reference" in config.train.offload and config.reference != "frozen":
        why = {"adapter_off": "is the policy's own base", "cached": "holds no weights"}.get(
            config.reference, "does not exist"
        )
        raise ValueError(
            f"train.offload={config.train.offload}: the reference ({config.reference}) {why}. Leave reference out"
        )


def settle_router(config: Config, model: ModelConfig, raw: Mapping[str, Any]) -> Config:
    """The config with a number for the router's loss where there is a router; config.json speaks for itself where the option is left alone.

    Raises:
        ValueError: there is no router.
    """
    coef = config.loss.router_aux_coef
    if not model.num_experts:
        if coef is not None:
            raise ValueError(f"loss.router_aux_coef={coef}: the model has no experts. Leave it out")
        return config
    if coef is None:
        coef = model.router_aux_coef if raw.get("output_router_logits") else 0.0
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, router_aux_coef=coef))


def settle_lora(
    config: Config, model: ModelConfig
) -> tuple[Config, Lora | None, PeftAdapter | None]:
    """The config with numbers in place of what lora.* leaves open, the adapter that they mean, and the one to start from.

    Raises:
        ValueError: the options do not fit the model, or the adapter at lora.path.
    """
    section = config.lora
    if not section.enabled:
        return config, None, None
    found = None if section.path is None else read_peft(Path(section.path).expanduser(), model)
    if found is None:
        lora = lora_of(section, model)
    else:
        lora = found.lora
        _check_agreement(section, lora, model)
    settled = LoraSection(
        rank=lora.rank, alpha=lora.alpha, rslora=lora.rslora, targets=lora.names, path=section.path
    )
    return dataclasses.replace(config, lora=settled), lora, found


def _check_agreement(section: LoraSection, lora: Lora, model: ModelConfig) -> None:
    """Options that were given beside lora.path must say what the adapter there is."""
    targets = None if section.targets is None else find_targets(model, section.targets)
    given = {
        "rank": (section.rank or lora.rank, lora.rank),
        "alpha": (lora.alpha if section.alpha is None else section.alpha, lora.alpha),
        "rslora": (section.rslora or lora.rslora, lora.rslora),
        "targets": (lora.targets if targets is None else targets, lora.targets),
    }
    wrong = {name: values for name, values in given.items() if values[0] != values[1]}
    lines = [
        f"lora.{name}={mine}: the adapter in lora.path has {theirs}. Leave it out"
        for name, (mine, theirs) in wrong.items()
    ]
    if lines:
        raise ValueError("\n".join(lines))
