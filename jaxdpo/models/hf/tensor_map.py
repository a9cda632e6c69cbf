"""The table of weights: every parameter of a model, its shape, and the tensors of Hugging Face's files in which it lies.

Ours are stacked on leading axes (layers, then experts) and projections are [in, out] with heads apart. A tensor of the files is often
one layer's, has heads flat and is [out, in], and may hold several of our parameters side by side.

Capitals in shapes: L layers, E experts, D model, F mlp, N query heads, K kv heads, H head dim, V vocabulary, P positions.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf import mxfp4
from jaxdpo.models.hf.families import FAMILIES
from jaxdpo.models.hf.tensor_names import Tensor
from jaxdpo.models.params import Shape, param_shapes

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One parameter and its place: the outputs `cut` of the tensor (of each layer, of each expert) that `hf_name` names."""

    path: str
    hf_name: str
    """The tensor's name, with {layer} and {expert} where there is one for each."""
    full_shape: Sizes
    """Shape of our parameter."""
    hf_shape: Sizes
    """Shape of one tensor."""
    named: int
    """How many leading axes of ours the name counts."""
    cut: slice
    transposed: bool
    """Whether the tensor is [out, in]."""
    mxfp4: bool

    @property
    def stack(self) -> Sizes:
        """How many tensors there are, along the axes that the name counts."""
        return self.full_shape[: self.named]

    def name(self, index: Sizes) -> str:
        """The tensor of a layer (and expert)."""
        return self.hf_name.format(**dict(zip(("layer", "expert"), index, strict=False)))

    def names(self) -> list[str]:
        """The names of all its tensors, in the order of ours."""
        return [self.name(index) for index in np.ndindex(self.stack)]

    def matrix(self, tensor: np.ndarray) -> np.ndarray:
        """The part of a tensor that is this parameter's, [..., in, out], as a view."""
        return (
            tensor[..., self.cut, :].swapaxes(-1, -2) if self.transposed else tensor[..., self.cut]
        )

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """The same in the shape of ours, without the axes that the name counts."""
        return self.matrix(tensor).reshape(self.full_shape[self.named :])


def weight_table(config: ModelConfig) -> list[WeightRow]:
    """Every parameter of a model where it is written to; the product of the `full_shape`s is the parameter count."""
    return _table(FAMILIES[config.family].tensors, param_shapes(config))


def readable_tables(config: ModelConfig) -> list[list[WeightRow]]:
    """Every form in which files may hold the parameters; the first is that of `weight_table`."""
    family, shapes = FAMILIES[config.family], param_shapes(config)
    return [_table(tensors, shapes) for tensors in (family.tensors, *family.other_tensors)]


def _table(tensors: Iterable[Tensor], shapes: dict[str, Shape]) -> list[WeightRow]:
    rows = [
        row
        for tensor in tensors
        for row in _rows(tensor, {path: shapes[path] for path in tensor.holds if path in shapes})
    ]
    assert len(rows) == len(shapes), (
        f"parameters without a tensor: {shapes.keys() - {row.path for row in rows}}"
    )
    return rows


def _rows(tensor: Tensor, held: dict[str, Shape]) -> list[WeightRow]:
    """A row for each parameter that the tensor holds."""
    widths = [math.prod(shape.outputs) for shape in held.values()]
    named = tensor.name.count("{")
    rows, begin = [], 0
    for number, (path, shape) in enumerate(held.items()):
        transposed = bool(shape.inputs) and not tensor.inputs_first
        cut = (
            slice(number, None, len(held))
            if tensor.interleaved
            else slice(begin, begin + widths[number])
        )
        matrix = [math.prod(shape.inputs)] if shape.inputs else []
        matrix = [sum(widths), *matrix] if transposed else [*matrix, sum(widths)]
        full_shape = shape.full
        rows.append(
            WeightRow(
                path,
                tensor.name,
                full_shape,
                (*shape.stack[named:], *matrix),
                named,
                cut,
                transposed,
                tensor.mxfp4,
            )
        )
        begin += widths[number]
    return rows


def files_of(row: WeightRow) -> dict[str, Sizes]:
    """Name -> shape of the tensors in the files that hold a row: its own, or the two that MXFP4 makes of each."""
    if not row.mxfp4:
        return dict.fromkeys(row.names(), row.hf_shape)
    blocks, scales = mxfp4.stored_shapes(row.hf_shape)
    return {
        f"{name}{ending}": shape
        for name in row.names()
        for ending, shape in (("_blocks", blocks), ("_scales", scales))
    }
