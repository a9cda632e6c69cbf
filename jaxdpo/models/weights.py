"""Weights in and out of Hugging Face folders: one two-way table, our path <-> HF name, for every family.

Our layers are stacked on a leading axis L, projections are [in, out] with heads apart; HF has a tensor for each layer and projections
[out, in] with heads flat. Both directions are total: every tensor of the files has a place here, and every parameter of ours is
in the files.

Capitals in shapes: L layers, D model, F mlp, N query heads, K kv heads, H head dim, V vocab.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.tensorfile import DTYPES, TensorInfo
from jaxdpo.models.weightfiles import read_headers, write_shards
from jaxdpo.models.weightfiles import weights_fingerprint as weights_fingerprint  # part of this module's interface

_IGNORED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_MAX_LINES = 200


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One parameter. `shape` is ours without the layer axis, `hf_shape` that of the HF tensor (of one layer).

    `transposed`: reshaping the transpose of the HF tensor gives ours; otherwise reshaping the tensor itself does.
    """

    path: str
    hf_name: str
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]
    transposed: bool
    num_layers: int | None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of our parameter, the layer axis included."""
        return self.shape if self.num_layers is None else (self.num_layers, *self.shape)

    def names(self) -> list[str]:
        """HF names, one for each layer."""
        return [self.hf_name] if self.num_layers is None else [self.hf_name.format(layer=layer) for layer in range(self.num_layers)]

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """HF tensor -> ours, as a view."""
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Ours (of one layer) -> HF tensor, as a view."""
        return array.reshape(self.hf_shape[::-1]).T if self.transposed else array.reshape(self.hf_shape)


def weight_table(config: ModelConfig) -> list[WeightRow]:
    """Every parameter of a model, in HF's customary order. The product of the `full_shape`s is the parameter count."""
    D, F, V, H = config.hidden_size, config.mlp_size, config.vocab_size, config.head_dim
    heads, kv_heads = (config.num_heads, H), (config.num_kv_heads, H)
    attention, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    layers = [
        _vector("attn_norm/scale", "model.layers.{layer}.input_layernorm.weight", (D,)),
        _matrix("attn/q", attention + "q_proj.weight", (D,), heads),
        _matrix("attn/k", attention + "k_proj.weight", (D,), kv_heads),
        _matrix("attn/v", attention + "v_proj.weight", (D,), kv_heads),
        _matrix("attn/o", attention + "o_proj.weight", heads, (D,)),
        _vector("mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", (D,)),
        _matrix("mlp/gate", mlp + "gate_proj.weight", (D,), (F,)),
        _matrix("mlp/up", mlp + "up_proj.weight", (D,), (F,)),
        _matrix("mlp/down", mlp + "down_proj.weight", (F,), (D,)),
    ]
    if config.qkv_bias:
        layers += [_vector(f"attn/{name}_bias", f"{attention}{name}_proj.bias", heads if name == "q" else kv_heads) for name in "qkv"]
    if config.o_bias:
        layers += [_vector("attn/o_bias", attention + "o_proj.bias", (D,))]
    if config.qk_norm != "none":
        layers += [_vector(f"attn/{name}_norm", f"{attention}{name}_norm.weight", (H,)) for name in "qk"]
    if config.mlp_bias:
        sizes = {"gate": F, "up": F, "down": D}
        layers += [_vector(f"mlp/{name}_bias", f"{mlp}{name}_proj.bias", (size,)) for name, size in sizes.items()]
    stacked = [dataclasses.replace(row, path="layers/" + row.path, num_layers=config.num_layers) for row in layers]
    embed, head = (WeightRow(path, name, (V, D), (V, D), False, None) for path, name in (("embed/weight", _EMBED), ("head/weight", _HEAD)))
    return [embed, *stacked, _vector("norm/scale", "model.norm.weight", (D,)), *([] if config.tied_head else [head])]


def _vector(path: str, hf_name: str, shape: tuple[int, ...]) -> WeightRow:
    return WeightRow(path, hf_name, shape, (math.prod(shape),), False, None)


def _matrix(path: str, hf_name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> WeightRow:
    return WeightRow(path, hf_name, (*inputs, *outputs), (math.prod(outputs), math.prod(inputs)), True, None)


# ---- reading ------------------------------------------------------------------------------------------------------------------


def load_params(folder: Path, config: ModelConfig, shardings: Mapping[str, Any] | None, dtype: Any) -> dict[str, Any]:
    """Parameters of a Hugging Face folder, each read straight into its place on the devices.

    Only the slices that this process's devices hold are read, one stacked parameter at a time, so the host holds at most one device's
    piece of one parameter besides what the devices hold.

    Args:
        folder: has model.safetensors, or model.safetensors.index.json and its shards.
        config: the model, see `load_model_config`.
        shardings: nested dict of jax.sharding.Sharding, one for each parameter. None: everything on the default device.
        dtype: type of the parameters; the files may have any of float64, float32, float16, bfloat16.

    Returns:
        Nested dict of jax.Array, with the paths of `weight_table`.

    Raises:
        ValueError: lists every missing, surplus, misshapen or unreadable tensor, or says why the files cannot be read.
    """
    table = weight_table(config)
    found = read_headers(folder)
    if problems := _mismatches(table, found, config.tied_head):
        lines = [f"  {line}" for line in problems[:_MAX_LINES]] + [f"  and {len(problems) - _MAX_LINES} more"] * (
            len(problems) > _MAX_LINES
        )
        raise ValueError("\n".join([f"model.path={folder}: its weights do not fit its config.json:", *lines]))
    params: dict[str, Any] = {}
    for row in table:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if shardings is None else _at(shardings, row.path)
        _put(params, row.path, _load_array(row, [found[name] for name in row.names()], sharding, np.dtype(dtype)))
    return params


def _load_array(row: WeightRow, infos: list[TensorInfo], sharding: jax.sharding.Sharding, dtype: np.dtype) -> jax.Array:
    """The stacked parameter of `row`; a piece that several devices hold is read once."""
    pieces: dict[tuple[tuple[int, ...], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(row.full_shape).items():
        key = tuple(part.indices(size) for part, size in zip(index or (), row.full_shape, strict=True))
        pieces.setdefault(key, []).append(device)
    arrays = []
    for key, devices in pieces.items():
        piece = _read_piece(row, infos, [slice(*part) for part in key], dtype)
        arrays += [jax.device_put(piece, device) for device in devices]
    return jax.make_array_from_single_device_arrays(row.full_shape, sharding, arrays)


def _read_piece(row: WeightRow, infos: list[TensorInfo], index: list[slice], dtype: np.dtype) -> np.ndarray:
    if row.num_layers is None:
        return cast(row.ours(infos[0].view())[tuple(index)], dtype)
    wanted = infos[index[0]]
    first = row.ours(wanted[0].view())[tuple(index[1:])]
    out = np.empty((len(wanted), *first.shape), dtype)
    for layer, info in enumerate(wanted):
        out[layer] = cast(row.ours(info.view())[tuple(index[1:])], dtype)
    return out


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy as `dtype`. bfloat16 -> float32 is a shift of the bits, many times faster than numpy's conversion."""
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        bits = array.view(np.uint16).astype(np.uint32, order="C")
        bits <<= 16
        return bits.view(np.float32)
    return array.astype(dtype, order="C")


def _mismatches(table: list[WeightRow], found: Mapping[str, TensorInfo], tied: bool) -> list[str]:
    """Every way in which the files and the table differ, one line each, layers folded together."""
    shapes = {name: row.hf_shape for row in table for name in row.names()}
    missing = [name for name in shapes if name not in found]
    surplus = [name for name in found if name not in shapes and not _IGNORED.fullmatch(name) and not (tied and name == _HEAD)]
    problems = [f"missing: {line}" for line in fold_layers(missing)]
    problems += [f"not a tensor of this model: {line}" for line in fold_layers(surplus)]
    for name, shape in shapes.items():
        if name in found and found[name].shape != shape:
            problems.append(f"{name}: has shape {list(found[name].shape)}, must have {list(shape)}")
        elif name in found and found[name].dtype not in DTYPES:
            problems.append(f"{name}: has type {found[name].dtype}, which is not implemented ({', '.join(DTYPES)} are)")
    if not problems and tied and _HEAD in found and not _equal(found[_HEAD], found[_EMBED]):
        problems.append(f"{_HEAD}: differs from {_EMBED}, although tie_word_embeddings=true")
    return problems


def _equal(one: TensorInfo, other: TensorInfo, rows: int = 4096) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = one.view(), other.view()
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def fold_layers(names: Iterable[str]) -> list[str]:
    """Names with the layers that share one folded: `model.layers.{0-3,5}.mlp.up_proj.weight`."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?layers\.)(\d{1,9})(\..*)", name)
        before, number, after = match.groups() if match else (name, "", "")
        layers.setdefault((before, after), []).extend([int(number)] if number else [])
    return [f"{before}{_ranges(sorted(numbers))}{after}" for (before, after), numbers in layers.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; [3] -> "3"."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return "{" + ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans) + "}"


# ---- writing ------------------------------------------------------------------------------------------------------------------


def save_params(folder: Path, config: ModelConfig, params: Mapping[str, Any], dtype: Any, max_shard_bytes: int | None = None) -> list[Path]:
    """Write parameters as safetensors under HF names: model.safetensors, or shards and an index.

    A tensor at a time goes from the devices to the file, so the host holds one of them. A tied head is not written again.

    Args:
        folder: an existing folder.
        config: the model.
        params: nested dict of arrays (jax, sharded or not, or numpy) with the paths of `weight_table`.
        dtype: type in the files: float32, bfloat16 or float16.
        max_shard_bytes: no file gets larger, unless one tensor alone is. Default 5e9.

    Returns:
        The files that were written.

    Raises:
        ValueError: `params` lacks a parameter, has one too many, or one of another shape.
    """
    table = weight_table(config)
    _check_params(table, params)
    order = [(name, row, layer) for row in table for layer, name in enumerate(row.names())]
    order.sort(key=lambda item: (item[1].num_layers is not None or item[0] != _EMBED, item[1].num_layers is None, item[2]))
    shapes = {name: row.hf_shape for name, row, _ in order}
    tensors = (cast(row.theirs(_layer(_at(params, row.path), row, layer)), np.dtype(dtype)) for _, row, layer in order)
    return write_shards(folder, shapes, np.dtype(dtype), tensors, max_shard_bytes)


def _check_params(table: list[WeightRow], params: Mapping[str, Any]) -> None:
    have = {path: tuple(np.shape(array)) for path, array in _flat(params)}
    want = {row.path: row.full_shape for row in table}
    problems = [f"{path}: is missing" for path in want if path not in have]
    problems += [f"{path}: is not a parameter of this model" for path in have if path not in want]
    problems += [f"{path}: has shape {have[path]}, must have {want[path]}" for path in want if path in have and have[path] != want[path]]
    if problems:
        raise ValueError("parameters that do not fit the model:\n" + "\n".join(f"  {line}" for line in problems))


@jax.jit
def _take_layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _layer(array: Any, row: WeightRow, layer: int) -> np.ndarray:
    """One layer of a stacked parameter on the host; of a jax array only that layer is fetched."""
    if row.num_layers is None:
        return np.asarray(array)
    return np.asarray(_take_layer(array, np.int32(layer)) if isinstance(array, jax.Array) else array[layer])


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
