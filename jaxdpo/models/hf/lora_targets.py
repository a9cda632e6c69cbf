"""LoRA targets: the projections that lora.targets names, by our names or by those of transformers."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxdpo.config.schema import LoraSection
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.tensor_map import WeightRow, weight_table
from jaxdpo.models.lora import ALPHA, TARGETS, Lora
from jaxdpo.models.params import Shape, param_shapes

ALL_LINEAR = "all-linear"


class Projection(NamedTuple):
    """A weight that can have an adapter."""

    shape: Shape
    row: WeightRow
    """Its place in Hugging Face's files."""

    @property
    def module(self) -> str:
        """The module of transformers that holds it; {layer} stands for the layer."""
        return self.row.hf_name.removesuffix(".weight")


def projections(config: ModelConfig) -> dict[str, Projection]:
    """The weights of a model that can have an adapter."""
    shapes, rows = param_shapes(config), {row.path: row for row in weight_table(config)}
    return {
        target: Projection(shapes[path], rows[path])
        for target in TARGETS
        if (path := f"layers/{target}") in rows
    }


def lora_of(section: LoraSection, config: ModelConfig) -> Lora:
    """What the options ask for.

    Raises:
        ValueError: lora.targets names what the model does not have.
    """
    alpha = ALPHA if section.alpha is None else section.alpha
    targets = find_targets(config, section.targets or ALL_LINEAR)
    return Lora(rank=section.rank, alpha=alpha, rslora=section.rslora, targets=targets)


def find_targets(config: ModelConfig, names: str | Sequence[str]) -> tuple[str, ...]:
    """The projections that lora.targets names.

    Args:
        names: our names (q, gate, ...), those of modules in transformers (q_proj, mlp.c_proj, ...), or "all-linear".

    Raises:
        ValueError: names the model has no projection for.
    """
    known = projections(config)
    wanted = [names] if isinstance(names, str) else list(names)
    hits = {
        name: [target for target, weight in known.items() if _means(name, target, weight)]
        for name in wanted
    }
    if unknown := [name for name in wanted if not hits[name]]:
        modules = dict.fromkeys(weight.module.rsplit(".", 1)[1] for weight in known.values())
        choices = ", ".join([ALL_LINEAR, *(target.split("/")[1] for target in known), *modules])
        raise ValueError(
            "\n".join(
                f"lora.targets={name}: the model has no such projection. Choose from {choices}"
                for name in unknown
            )
        )
    return tuple(target for target in known if any(target in found for found in hits.values()))


def _means(name: str, target: str, weight: Projection) -> bool:
    return (
        name == ALL_LINEAR
        or name == target.split("/")[1]
        or f".{weight.module}".endswith(f".{name}")
    )
