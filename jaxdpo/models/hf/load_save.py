"""Weights in and out of Hugging Face folders, by the table of tensor_map.py.

Both directions are total: every tensor of the files belongs to a parameter, and every parameter of
ours is in the files. Reading copies slice by slice to the devices, writing goes tensor by tensor.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf import mxfp4
from jaxdpo.models.hf.safetensors_io import DTYPES, TensorInfo
from jaxdpo.models.hf.tensor_check import locate_tensors
from jaxdpo.models.hf.tensor_map import Sizes, WeightRow, weight_table
from jaxdpo.models.hf.weight_files import write_shards
from jaxdpo.utils.tree import flatten

# ---- reading ------------------------------------------------------------------------------------


def load_params(
    folder: Path,
    config: ModelConfig,
    shardings: Mapping[str, Any] | None,
    dtype: Any,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> dict[str, Any]:
    """Parameters of a Hugging Face folder, each read straight into its shards on the devices.

    Only the slices that this process's devices need are read, one stacked parameter at a time, so
    beside the loaded parameters the host holds at most one device's shard of one parameter.

    Args:
        folder: has model.safetensors, or model.safetensors.index.json and its shards.
        config: the model, see `load_model_config`.
        shardings: nested dict of jax.sharding.Sharding, one for each parameter. None: everything on
            the default device.
        dtype: type of the parameters; the files may have any of float64, float32, float16,
            bfloat16, and MXFP4 where the family has it.
        finish: (path, parameter) -> what is returned in its place; called before the next one is
            read.

    Returns:
        Nested dict of jax.Array, with the paths of `weight_table`.

    Raises:
        ValueError: as `locate_tensors`.
    """
    table, found = locate_tensors(folder, config)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: dict[str, Any] = {}
    for row in table:
        sharding = default
        if shardings is not None:
            sharding = _get(shardings, row.path)
        param = _load_array(row, found, sharding, np.dtype(dtype))
        if finish is not None:
            param = finish(row.path, param)
        _put(params, row.path, param)
    return params


@dataclasses.dataclass(frozen=True)
class FileWeight:
    """A parameter in files; nothing is read before it is indexed."""

    row: WeightRow
    found: Mapping[str, TensorInfo]

    @property
    def shape(self) -> Sizes:
        """Shape of the parameter."""
        return self.row.full_shape

    def __getitem__(self, index: Sizes) -> np.ndarray:
        """weight[layer] or weight[layer, expert] in the type of its files; weight[()] is all."""
        info = self.found.get(self.row.name((*index, 0, 0)))
        # MXFP4 tensors have other names, and become float32
        dtype = np.dtype(np.float32) if info is None else DTYPES[info.dtype]
        # One layer (and expert), and all of the other axes.
        inner_shape = self.shape[len(index) :]
        slices = []
        for i in index:
            slices.append(slice(i, i + 1, 1))
        for size in inner_shape:
            slices.append(slice(0, size, 1))
        return _read_slice(self.row, self.found, tuple(slices), dtype).reshape(inner_shape)


def open_weights(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of a Hugging Face folder, still in its files: nested dict of FileWeight.

    Raises:
        ValueError: as `locate_tensors`.
    """
    table, found = locate_tensors(folder, config)
    params: dict[str, Any] = {}
    for row in table:
        _put(params, row.path, FileWeight(row, found))
    return params


def _load_array(
    row: WeightRow,
    found: Mapping[str, TensorInfo],
    sharding: jax.sharding.Sharding,
    dtype: np.dtype,
) -> jax.Array:
    """The parameter of `row`; a shard that several devices hold (replicas) is read once."""
    # Not jax.make_array_from_callback, because it calls once for each device (jax 0.10): replicas
    # of a shard would be read again and again.
    replicas: dict[tuple[tuple[int, ...], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(row.full_shape).items():
        # (start, stop, step) of each axis, with numbers where a slice leaves them open.
        bounds = []
        for part, size in zip(index or (), row.full_shape, strict=True):
            bounds.append(part.indices(size))
        replicas.setdefault(tuple(bounds), []).append(device)

    arrays = []
    for bounds, devices in replicas.items():
        index = tuple(slice(*start_stop_step) for start_stop_step in bounds)
        shard = _read_slice(row, found, index, dtype)
        for device in devices:
            arrays.append(jax.device_put(shard, device))
    return jax.make_array_from_single_device_arrays(row.full_shape, sharding, arrays)


def _read_slice(
    row: WeightRow, found: Mapping[str, TensorInfo], index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """A slice of a parameter. All slices have start, stop and step, one for each axis."""
    ranges = [range(part.start, part.stop, part.step) for part in index]
    result = np.empty([len(part) for part in ranges], dtype)
    # The first axes, of layers (and experts), say which tensors; the others what is read of each.
    within_tensor = index[row.named :]
    for position in np.ndindex(result.shape[: row.named]):
        numbers = tuple(ranges[axis][i] for axis, i in enumerate(position))
        name = row.name(numbers)
        if row.mxfp4:
            blocks = found[f"{name}_blocks"].view()[:, row.cut]
            scales = found[f"{name}_scales"].view()[:, row.cut]
            experts, inputs, outputs = within_tensor
            mxfp4.read(result[position], blocks, scales, (experts, inputs, outputs))
        else:
            # Only what is sliced of the view is read from disk; it is converted to dtype here.
            result[position][...] = row.ours(found[name].view())[within_tensor]
    return result


# ---- writing ------------------------------------------------------------------------------------


def save_params(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    dtype: Any,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Write parameters as safetensors under HF names: model.safetensors, or shards and an index.

    Tensors are written one at a time, so the host holds one of them and one layer of one parameter.
    A tied head is not written again. Where arrays are sharded over several processes, all of them
    call this: each layer is gathered by all, and process 0 writes.

    Args:
        folder: an existing folder.
        config: the model.
        params: nested dict of arrays with the paths of `weight_table`: jax arrays, sharded or not,
            numpy arrays, or anything that has a shape and gives a layer as array[layer,], and all
            of it as array[()].
        dtype: type in the files: float32, bfloat16 or float16.
        max_shard_bytes: no file gets larger, unless one tensor alone is. Default 5e9.

    Returns:
        The files that were written; none by processes other than 0.

    Raises:
        ValueError: `params` lacks a parameter, has one too many, or one of another shape.
    """
    table = weight_table(config)
    _check_params(table, params)
    contents = _contents(table)
    shapes = {}
    for name, parts in contents.items():
        row, _ = parts[0]
        shapes[name] = row.hf_shape
    tensors = _tensors(contents.values(), params, np.dtype(dtype))
    if jax.process_index() != 0:
        collections.deque(tensors, maxlen=0)  # takes part in gathering them, keeps none
        return []
    return write_shards(folder, shapes, np.dtype(dtype), tensors, max_shard_bytes)


def _check_params(table: list[WeightRow], params: Mapping[str, Any]) -> None:
    have = {path: tuple(np.shape(array)) for path, array in flatten(params, "/").items()}
    want = {row.path: row.full_shape for row in table}
    problems = []
    for path in want:
        if path not in have:
            problems.append(f"{path}: is missing")
    for path, shape in have.items():
        if path not in want:
            problems.append(f"{path}: is not a parameter of this model")
        elif shape != want[path]:
            problems.append(f"{path}: has shape {shape}, must have {want[path]}")
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise ValueError(f"parameters that do not fit the model:\n{lines}")


Contents = dict[str, list[tuple[WeightRow, Sizes]]]
"""Tensor -> the parameters in it, each with the layer (and expert) that the tensor has of it."""


def _contents(table: list[WeightRow]) -> Contents:
    """Tensors in the order of the files: before the layers, layer by layer, after them."""
    stacked = [number for number, row in enumerate(table) if row.named]
    first, last = stacked[0], stacked[-1]
    before, layers, after = table[:first], table[first : last + 1], table[last + 1 :]
    order: list[tuple[WeightRow, Sizes]] = []
    for row in before:
        order.append((row, ()))
    for layer in range(layers[0].stack[0]):
        for row in layers:
            for expert in np.ndindex(row.stack[1:]):
                order.append((row, (layer, *expert)))
    for row in after:
        order.append((row, ()))

    contents: Contents = {}
    for row, index in order:
        contents.setdefault(row.name(index), []).append((row, index))
    return contents


def _tensors(
    contents: Iterable[list[tuple[WeightRow, Sizes]]], params: Mapping[str, Any], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The tensors of the files, each put together from the parameters in it.

    One layer of a parameter is fetched at a time, once for all its experts.
    """
    fetched = None
    layer = np.empty(0)
    for parts in contents:
        tensor = np.empty(parts[0][0].hf_shape, dtype)
        for row, index in parts:
            layer_index, expert_index = index[:1], index[1:]
            if fetched != (row.path, layer_index):
                layer = np.empty(0)  # frees the previous one before the next is fetched
                layer = fetch(_get(params, row.path), layer_index)
                fetched = (row.path, layer_index)
            # A view of the tensor: what is assigned to it is the tensor's.
            matrix = row.matrix(tensor)
            matrix[...] = layer[expert_index].reshape(matrix.shape)
        yield tensor


@jax.jit
def _take_layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def fetch(array: Any, index: Sizes) -> np.ndarray:
    """A parameter (index ()) or one layer of it, on the host; nothing else is transferred."""
    if not isinstance(array, jax.Array):
        return np.asarray(array[index])
    if index:
        array = _take_layer(array, np.int32(index[0]))
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


# ---- nested dicts -------------------------------------------------------------------------------


def _get(tree: Mapping[str, Any], path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
