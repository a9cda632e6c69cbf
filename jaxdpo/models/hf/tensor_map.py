"""The weight table: every parameter of a model, its shape, and where it is in Hugging Face's files.

Our parameters are stacked on leading axes (layers, then experts), and projections are [in, out]
with heads as an axis of their own. A tensor of the files is often one layer's, has heads and head
dimensions in one axis, is [out, in], and may contain several of our parameters side by side.

Capitals in shapes: L layers, E experts, D model, F mlp, N query heads, K kv heads, H head dim, V
vocabulary, P positions.
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
    """One parameter and where it is stored.

    It is the outputs `cut` of the tensor `hf_name` (of the tensors of all layers and experts).
    """

    path: str
    hf_name: str
    """The tensor's name, with {layer} and {expert} where there is one for each."""
    full_shape: Sizes
    """Shape of our parameter."""
    hf_shape: Sizes
    """Shape of one tensor."""
    named: int
    """How many leading axes of ours the name numbers: 0, 1 (layers) or 2 (and experts)."""
    cut: slice
    """Along the outputs of the tensor."""
    transposed: bool
    """Whether the tensor is [out, in]."""
    mxfp4: bool
    """Whether it is stored as blocks and scales, see mxfp4.py."""

    @property
    def stack(self) -> Sizes:
        """How many tensors there are, along the axes that the name numbers."""
        return self.full_shape[: self.named]

    def name(self, index: Sizes) -> str:
        """The tensor of a layer (and expert)."""
        return self.hf_name.format(**dict(zip(("layer", "expert"), index, strict=False)))

    def names(self) -> list[str]:
        """The names of all its tensors, layer by layer, expert by expert."""
        return [self.name(index) for index in np.ndindex(self.stack)]

    def matrix(self, tensor: np.ndarray) -> np.ndarray:
        """The part of a tensor that is this parameter's, [..., in, out], as a view."""
        if self.transposed:
            return tensor[..., self.cut, :].swapaxes(-1, -2)
        return tensor[..., self.cut]

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """The same in the shape of ours, without the axes that the name numbers."""
        return self.matrix(tensor).reshape(self.full_shape[self.named :])


def weight_table(config: ModelConfig) -> list[WeightRow]:
    """Every parameter of a model, in the layout that is written."""
    return _table(FAMILIES[config.family].tensors, param_shapes(config))


def readable_tables(config: ModelConfig) -> list[list[WeightRow]]:
    """The table in every layout that is read; the first is that of `weight_table`."""
    family, shapes = FAMILIES[config.family], param_shapes(config)
    return [_table(tensors, shapes) for tensors in (family.tensors, *family.other_tensors)]


def _table(tensors: Iterable[Tensor], shapes: dict[str, Shape]) -> list[WeightRow]:
    rows = []
    for tensor in tensors:
        parts = {path: shapes[path] for path in tensor.holds if path in shapes}
        rows += _rows(tensor, parts)
    without = shapes.keys() - {row.path for row in rows}
    assert len(rows) == len(shapes), f"parameters without a tensor: {without}"
    return rows


def _rows(tensor: Tensor, parts: dict[str, Shape]) -> list[WeightRow]:
    """A row for each parameter in the tensor."""
    widths = [math.prod(shape.outputs) for shape in parts.values()]
    named = tensor.name.count("{")
    rows, begin = [], 0
    for number, (path, shape) in enumerate(parts.items()):
        end = begin + widths[number]
        cut = slice(begin, end)
        if tensor.interleaved:
            cut = slice(number, None, len(parts))
        begin = end
        transposed = bool(shape.inputs) and not tensor.inputs_first
        matrix = [sum(widths)]
        if shape.inputs:
            inputs = math.prod(shape.inputs)
            matrix = [*matrix, inputs] if transposed else [inputs, *matrix]
        row = WeightRow(
            path=path,
            hf_name=tensor.name,
            full_shape=shape.full,
            hf_shape=(*shape.stack[named:], *matrix),
            named=named,
            cut=cut,
            transposed=transposed,
            mxfp4=tensor.mxfp4,
        )
        rows.append(row)
    return rows


def files_of(row: WeightRow) -> dict[str, Sizes]:
    """Name -> shape of the tensors in the files that a row is read from."""
    if not row.mxfp4:
        return dict.fromkeys(row.names(), row.hf_shape)
    blocks, scales = mxfp4.stored_shapes(row.hf_shape)
    files = {}
    for name in row.names():
        files[f"{name}_blocks"] = blocks
        files[f"{name}_scales"] = scales
    return files
