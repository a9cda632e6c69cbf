"""LoRA targets: the projections that lora.targets names, by our names or transformers'."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxdpo.config.schema import LoraSection
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.tensor_map import WeightRow, weight_table
from jaxdpo.models.lora import ALPHA, TARGETS, Lora
from jaxdpo.models.params import Shape, param_shapes

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear layer but the LM head."""


class Projection(NamedTuple):
    """A weight that can have an adapter."""

    shape: Shape
    row: WeightRow
    """Its tensors in Hugging Face's files."""

    @property
    def module(self) -> str:
        """The module of transformers that it belongs to, with {layer} for the layer."""
        return self.row.hf_name.removesuffix(".weight")


def projections(config: ModelConfig) -> dict[str, Projection]:
    """The weights of a model that can have an adapter, by target."""
    shapes = param_shapes(config)
    rows = {row.path: row for row in weight_table(config)}
    found = {}
    for target in TARGETS:
        path = f"layers/{target}"
        if path in rows:  # a model of experts has no mlp
            found[target] = Projection(shapes[path], rows[path])
    return found


def lora_of(section: LoraSection, config: ModelConfig) -> Lora:
    """The adapter that the options ask for.

    Raises:
        ValueError: lora.targets names what the model does not have.
    """
    return Lora(
        rank=section.rank,
        alpha=ALPHA if section.alpha is None else section.alpha,
        rslora=section.rslora,
        targets=find_targets(config, section.targets or ALL_LINEAR),
    )


def find_targets(config: ModelConfig, names: str | Sequence[str]) -> tuple[str, ...]:
    """The projections that lora.targets names, in the order of the model.

    Args:
        config: the model.
        names: our names (q, gate, ...), those of modules in transformers (q_proj, mlp.c_proj, ...),
            or "all-linear".

    Raises:
        ValueError: names the model has no projection for.
    """
    known = projections(config)
    wanted = [names] if isinstance(names, str) else list(names)
    found: set[str] = set()
    unknown = []
    for name in wanted:
        hits = {target for target, weight in known.items() if _matches(name, target, weight)}
        found |= hits
        if not hits:
            unknown.append(name)
    if unknown:
        choices = ", ".join(_choices(known))
        lines = [
            f"lora.targets={name}: the model has no such projection. Choose from {choices}"
            for name in unknown
        ]
        raise ValueError("\n".join(lines))
    return tuple(target for target in known if target in found)


def _matches(name: str, target: str, weight: Projection) -> bool:
    if name in (ALL_LINEAR, target.split("/")[1]):
        return True
    return f".{weight.module}".endswith(f".{name}")


def _choices(known: dict[str, Projection]) -> list[str]:
    ours = [target.split("/")[1] for target in known]
    theirs = dict.fromkeys(weight.module.rsplit(".", 1)[1] for weight in known.values())
    return [ALL_LINEAR, *ours, *theirs]
