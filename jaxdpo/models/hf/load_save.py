"""Weights in and out of Hugging Face folders, by the table of weighttable.py.

Both directions are total: every tensor of the files has a place in the model, and every parameter of ours is in the files. Reading
goes piece by piece straight to the devices, writing tensor by tensor.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf import mxfp4
from jaxdpo.models.hf.safetensors_io import BYTES, DTYPES, TensorInfo
from jaxdpo.models.hf.tensor_map import Sizes, WeightRow, files_of, readable_tables, weight_table
from jaxdpo.models.hf.weight_files import read_headers, write_shards
from jaxdpo.models.hf.weight_files import (
    weights_fingerprint as weights_fingerprint,  # part of this module's interface
)

_IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
)
"""Buffers that old checkpoints hold: rotary frequencies, GPT-2's causal masks."""
_HEAD = "lm_head.weight"
_MAX_LINES = 200
_MANY_TENSORS = 20_000
"""A model of more tensors than this must have files that hold about as many; else config.json is not believed."""


# ---- reading ------------------------------------------------------------------------------------------------------------------


def load_params(
    folder: Path,
    config: ModelConfig,
    shardings: Mapping[str, Any] | None,
    dtype: Any,
    finish: Callable[[str, jax.Array], Any] = lambda _, array: array,
) -> dict[str, Any]:
    """Parameters of a Hugging Face folder, each read straight into its place on the devices.

    Only the slices that this process's devices hold are read, one stacked parameter at a time, so the host holds at most one device's
    piece of one parameter besides what the devices hold.

    Args:
        folder: has model.safetensors, or model.safetensors.index.json and its shards.
        config: the model, see `load_model_config`.
        shardings: nested dict of jax.sharding.Sharding, one for each parameter. None: everything on the default device.
        dtype: type of the parameters; the files may have any of float64, float32, float16, bfloat16, and MXFP4 where the family has it.
        finish: (path, parameter) -> what takes its place, before the next one is read.

    Returns:
        Nested dict of jax.Array, with the paths of `weight_table`.

    Raises:
        ValueError: lists every missing, surplus, misshapen or unreadable tensor, or says why the files cannot be read.
    """
    table, found = _located(folder, config)
    params: dict[str, Any] = {}
    for row in table:
        sharding = (
            jax.sharding.SingleDeviceSharding(jax.devices()[0])
            if shardings is None
            else _at(shardings, row.path)
        )
        _put(params, row.path, finish(row.path, _load_array(row, found, sharding, np.dtype(dtype))))
    return params


@dataclasses.dataclass(frozen=True)
class FileWeight:
    """A parameter in files; nothing of it is read before it is asked for."""

    row: WeightRow
    found: Mapping[str, TensorInfo]

    @property
    def shape(self) -> Sizes:
        """Shape of the parameter."""
        return self.row.full_shape

    def __getitem__(self, index: Sizes) -> np.ndarray:
        """weight[layer] or weight[layer, expert] in the type of its files; weight[()] is all of it."""
        first = self.found.get(self.row.name((*index, 0, 0)))
        dtype = (
            np.dtype(np.float32) if first is None else DTYPES[first.dtype]
        )  # None: MXFP4, which has other names
        rest = self.shape[len(index) :]
        parts = [slice(i, i + 1, 1) for i in index] + [slice(0, size, 1) for size in rest]
        return _read_piece(self.row, self.found, tuple(parts), dtype).reshape(rest)


def open_weights(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of a Hugging Face folder as they lie there: nested dict of FileWeight.

    Raises:
        ValueError: as `load_params`.
    """
    table, found = _located(folder, config)
    params: dict[str, Any] = {}
    for row in table:
        _put(params, row.path, FileWeight(row, found))
    return params


def _located(folder: Path, config: ModelConfig) -> tuple[list[WeightRow], dict[str, TensorInfo]]:
    """The form of the table that a folder's files have, and their tensors."""
    found = _with_prefix(read_headers(folder), config)
    table, problems = _fitting_table(config, found)
    if problems:
        more = [f"  and {len(problems) - _MAX_LINES} more"] * (len(problems) > _MAX_LINES)
        lines = [f"  {line}" for line in problems[:_MAX_LINES]] + more
        raise ValueError(
            "\n".join([f"model.path={folder}: its weights do not fit its config.json:", *lines])
        )
    return table, found


def _with_prefix(found: dict[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """The tensors under their full names: files of a bare decoder, such as the hub's gpt2, leave out `model.` or `transformer.`."""
    prefix = weight_table(config)[0].hf_name.split(".")[0] + "."
    if any(name.startswith(prefix) for name in found):
        return found
    return {name if name == _HEAD else prefix + name: info for name, info in found.items()}


def _load_array(
    row: WeightRow,
    found: Mapping[str, TensorInfo],
    sharding: jax.sharding.Sharding,
    dtype: np.dtype,
) -> jax.Array:
    """The parameter of `row`; a piece that several devices hold is read once."""
    pieces: dict[tuple[tuple[int, ...], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(row.full_shape).items():
        key = tuple(
            part.indices(size) for part, size in zip(index or (), row.full_shape, strict=True)
        )
        pieces.setdefault(key, []).append(device)
    arrays = []
    for key, devices in pieces.items():
        piece = _read_piece(row, found, tuple(slice(*part) for part in key), dtype)
        arrays += [jax.device_put(piece, device) for device in devices]
    return jax.make_array_from_single_device_arrays(row.full_shape, sharding, arrays)


def _read_piece(
    row: WeightRow, found: Mapping[str, TensorInfo], index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    ranges = [range(part.start, part.stop, part.step) for part in index]
    piece = np.empty([len(part) for part in ranges], dtype)
    inner = index[row.named :]
    for place in np.ndindex(piece.shape[: row.named]):
        name = row.name(tuple(part[i] for part, i in zip(ranges, place, strict=False)))
        if row.mxfp4:
            blocks, scales = (
                found[f"{name}_{kind}"].view()[:, row.cut] for kind in ("blocks", "scales")
            )
            mxfp4.read(piece[place], blocks, scales, inner)  # type: ignore[arg-type]  # experts, inputs, outputs
        else:
            _copy(piece[place], row.ours(found[name].view())[inner])
    return piece


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source. bfloat16 -> float32 is a shift of the bits, many times faster than numpy's conversion."""
    if source.dtype == ml_dtypes.bfloat16 and target.dtype == np.float32:
        bits = target.view(np.uint32)
        bits[...] = source.view(np.uint16)
        bits <<= 16
    else:
        target[...] = source


# ---- do the files fit? --------------------------------------------------------------------------------------------------------


def _fitting_table(
    config: ModelConfig, found: Mapping[str, TensorInfo]
) -> tuple[list[WeightRow], list[str]]:
    """The form of the table that the files have, and every way in which they differ from it, one line each."""
    tables = readable_tables(config)
    sizes = [sum(math.prod(row.stack) for row in table) for table in tables]
    limit = _MANY_TENSORS + 10 * len(found)
    if min(sizes) > limit:
        return [], [
            f"config.json describes a model of {min(sizes)} tensors, but the files hold {len(found)}"
        ]
    files = {number: _files(tables[number]) for number, size in enumerate(sizes) if size <= limit}
    best = min(files, key=lambda number: len(files[number].keys() - found.keys()))
    return tables[best], _mismatches(files[best], found, tied=config.tied_head)


def _files(table: list[WeightRow]) -> dict[str, tuple[Sizes, Mapping[str, np.dtype]]]:
    """Name -> shape and possible types of every tensor that the files must hold."""
    return {
        name: (shape, BYTES if row.mxfp4 else DTYPES)
        for row in table
        for name, shape in files_of(row).items()
    }


def _mismatches(
    files: Mapping[str, tuple[Sizes, Mapping[str, np.dtype]]],
    found: Mapping[str, TensorInfo],
    tied: bool,
) -> list[str]:
    missing = [name for name in files if name not in found]
    surplus = [
        name
        for name in found
        if name not in files and not _IGNORED.fullmatch(name) and not (tied and name == _HEAD)
    ]
    problems = [f"missing: {line}" for line in fold_names(missing)]
    problems += [f"not a tensor of this model: {line}" for line in fold_names(surplus)]
    for name, (shape, types) in files.items():
        if name in found and found[name].shape != shape:
            problems.append(f"{name}: has shape {list(found[name].shape)}, must have {list(shape)}")
        elif name in found and found[name].dtype not in types:
            problems.append(
                f"{name}: has type {found[name].dtype}, which is not implemented ({', '.join(types)} are)"
            )
    embed = next(iter(files))
    if not problems and tied and _HEAD in found and not _equal(found[_HEAD], found[embed]):
        problems.append(f"{_HEAD}: differs from {embed}, although tie_word_embeddings=true")
    return problems


def _equal(one: TensorInfo, other: TensorInfo, rows: int = 4096) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = one.view(), other.view()
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def fold_names(names: Iterable[str]) -> list[str]:
    """Names with the experts and layers that share one folded: `model.layers.{0-3,5}.mlp.up_proj.weight`."""
    return _fold(_fold(names, "experts"), "layers|h")


def _fold(names: Iterable[str], word: str) -> list[str]:
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.fullmatch(rf"((?:.*?\.)?(?:{word})\.)(\d{{1,9}})(\..*)", name)
        before, number, after = match.groups() if match else (name, "", "")
        numbers.setdefault((before, after), []).extend([int(number)] if number else [])
    return [
        f"{before}{_ranges(sorted(found))}{after}" for (before, after), found in numbers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; [3] -> "3"."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return (
        "{"
        + ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
        + "}"
    )


# ---- writing ------------------------------------------------------------------------------------------------------------------


def save_params(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    dtype: Any,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Write parameters as safetensors under HF names: model.safetensors, or shards and an index.

    A tensor at a time goes to the file, so the host holds one of them and one layer of one parameter. A tied head is not written again.
    Where arrays are spread over several hosts, all of them call this: each layer is gathered by all, and process 0 writes.

    Args:
        folder: an existing folder.
        config: the model.
        params: nested dict of arrays with the paths of `weight_table`: jax arrays, sharded or not, numpy arrays, or anything that has a
            shape and gives a layer as array[layer,], and all of it as array[()].
        dtype: type in the files: float32, bfloat16 or float16.
        max_shard_bytes: no file gets larger, unless one tensor alone is. Default 5e9.

    Returns:
        The files that were written; none by processes other than 0.

    Raises:
        ValueError: `params` lacks a parameter, has one too many, or one of another shape.
    """
    table = weight_table(config)
    _check_params(table, params)
    holders = _holders(table)
    shapes = {name: parts[0][0].hf_shape for name, parts in holders.items()}
    tensors = _tensors(holders.values(), params, np.dtype(dtype))
    if jax.process_index() != 0:
        collections.deque(tensors, maxlen=0)  # takes its part in gathering them
        return []
    return write_shards(folder, shapes, np.dtype(dtype), tensors, max_shard_bytes)


def _check_params(table: list[WeightRow], params: Mapping[str, Any]) -> None:
    have = {path: tuple(np.shape(array)) for path, array in _flat(params)}
    want = {row.path: row.full_shape for row in table}
    problems = [f"{path}: is missing" for path in want if path not in have]
    problems += [f"{path}: is not a parameter of this model" for path in have if path not in want]
    problems += [
        f"{path}: has shape {have[path]}, must have {want[path]}"
        for path in want
        if path in have and have[path] != want[path]
    ]
    if problems:
        raise ValueError(
            "parameters that do not fit the model:\n" + "\n".join(f"  {line}" for line in problems)
        )


def _holders(table: list[WeightRow]) -> dict[str, list[tuple[WeightRow, Sizes]]]:
    """Tensor -> the parameters in it, layer after layer as the table's first and last rows enclose them."""
    stacked = [number for number, row in enumerate(table) if row.named]
    first, last = stacked[0], stacked[-1]
    order = [(row, ()) for row in table[:first]]
    for layer in range(table[first].stack[0]):
        order += [
            (row, (layer, *rest))
            for row in table[first : last + 1]
            for rest in np.ndindex(row.stack[1:])
        ]
    holders: dict[str, list[tuple[WeightRow, Sizes]]] = {}
    for row, index in [*order, *((row, ()) for row in table[last + 1 :])]:
        holders.setdefault(row.name(index), []).append((row, index))
    return holders


def _tensors(
    holders: Iterable[list[tuple[WeightRow, Sizes]]], params: Mapping[str, Any], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The tensors of the files, each put together from the parameters in it; a layer of a parameter is fetched once for all its experts."""
    fetched, held = None, np.empty(0)
    for parts in holders:
        tensor = np.empty(parts[0][0].hf_shape, dtype)
        for row, index in parts:
            if fetched != (row.path, index[:1]):
                held = np.empty(0)  # the one before is let go first
                fetched, held = (row.path, index[:1]), fetch(_at(params, row.path), index[:1])
            matrix = row.matrix(tensor)
            _copy(matrix, held[index[1:]].reshape(matrix.shape))
        yield tensor


@jax.jit
def _take_layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def fetch(array: Any, index: Sizes) -> np.ndarray:
    """A parameter, or one layer of it, on the host; nothing else of it is moved or read."""
    if not isinstance(array, jax.Array):
        return np.asarray(array[index])
    if index:
        array = _take_layer(array, np.int32(index[0]))
    return (
        np.asarray(array)
        if array.is_fully_addressable
        else multihost_utils.process_allgather(array, tiled=True)
    )


# ---- nested dicts -------------------------------------------------------------------------------------------------------------


def _at(tree: Mapping[str, Any], path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value
