"""The safetensors files of a Hugging Face folder: single or sharded, the index, and their
fingerprint.

What a file contains is safetensors_io.py's.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxdpo.models.hf.folder import write_json
from jaxdpo.models.hf.peft_config import CONFIG as ADAPTER_CONFIG
from jaxdpo.models.hf.safetensors_io import TensorInfo, read_header, write_file

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FULL_HASH_BYTES = 2 * 2**30
"""Weights up to this size are hashed in full: 4 s at 0.55 GB/s, measured on one core."""
_BLOCK_BYTES, _NUM_BLOCKS = 2**20, 64
"""What is hashed of each larger file."""
_SHARD_BYTES = 5_000_000_000
"""max_shard_size of transformers 4."""


# ---- reading ------------------------------------------------------------------------------------


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """HF name -> TensorInfo of every tensor in a folder's safetensors files.

    Raises:
        ValueError: no safetensors file, a missing or damaged one, or an index that contradicts the
            files.
    """
    found: dict[str, TensorInfo] = {}
    problems = []
    for path in weight_files(folder):
        try:
            header = read_header(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for name in header:
            if name in found:
                problems.append(f"{path}: holds {name}, which {found[name].path.name} holds too")
        found |= header
    if not problems:
        problems = _index_mismatches(folder, found)
    if problems:
        raise ValueError("\n".join(problems))
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in order of name.

    Raises:
        ValueError: there is none, a shard of the index is missing, or the index is malformed or
            ambiguous.
    """
    folder = Path(folder)
    refuse_two_models(folder)
    index, single = folder / _INDEX, folder / _SINGLE
    if not index.is_file():
        if not single.is_file():
            raise ValueError(f"model.path={folder}: {_why_no_weights(folder)}")
        return [single]
    names = sorted(set(_weight_map(index).values()))
    if single.is_file() and names != [_SINGLE]:
        raise ValueError(
            f"model.path={folder}: has both {_SINGLE} and {_INDEX} with other files. "
            "Remove the one that is out of date"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"model.path={folder}: {_INDEX} names files that are missing: {', '.join(missing)}. "
            "Download the folder again"
        )
    return [folder / name for name in names]


def refuse_two_models(folder: Path) -> None:
    """Refuse a folder that is two models: full weights, and an adapter over some base.

    Which of them is meant is not known: transformers would load base and adapter, others the full
    weights. Such folders are left by a merge that was written over its adapter.

    Raises:
        ValueError: the folder has the files of both.
    """
    found = [name for name in (_SINGLE, _INDEX) if (folder / name).is_file()]
    if found and (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"model.path={folder}: has full weights ({found[0]}) and an adapter "
            f"({ADAPTER_CONFIG}), which are two models. If the weights are what you mean, such as "
            "a base into which the adapter was merged, move the adapter_* files out of the folder; "
            "if the adapter is, move its files into a folder of their own"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as the index says; no file outside the folder, and no other kind."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index}: is not a JSON object with a weight_map ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: its weight_map is not an object of names and files")
    for name, file in weight_map.items():
        if not name.isprintable():
            raise ValueError(
                f"{index}: names a tensor with characters that cannot be printed: {name[:80]!r}"
            )
        is_name = isinstance(file, str) and Path(file).name == file
        if not is_name or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {name} is in {file!r}, which is no *.safetensors file of the same folder"
            )
    return weight_map


def _index_mismatches(folder: Path, found: Mapping[str, TensorInfo]) -> list[str]:
    index = Path(folder) / _INDEX
    if not index.is_file():
        return []
    weight_map = _weight_map(index)
    problems = []
    for name, file in weight_map.items():
        if name not in found or found[name].path.name != file:
            problems.append(f"{index}: says {file} holds {name}, but it does not")
    for name, info in found.items():
        if name not in weight_map:
            problems.append(f"{info.path}: holds {name}, which {_INDEX} does not name")
    return problems


def _why_no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return "is not a folder"
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_model.safetensors" in names:
        return "holds a LoRA adapter, not a model. Merge it into its base model first"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"holds its weights as pickle files only ({', '.join(pickles)}), "
            "which may run code when opened. Convert them to safetensors"
        )
    return f"has neither {_SINGLE} nor {_INDEX}"


# ---- fingerprint --------------------------------------------------------------------------------


def weights_fingerprint(folder: Path) -> str:
    """A string that identifies the weights of a folder: equal for equal files.

    Up to 2 GiB it is the sha256 of all bytes ("sha256:..."). Of larger weights it covers the
    headers, the sizes and 64 blocks of 1 MiB spread over each file ("sha256-blocks:..."), which any
    training changes but a deliberate edit of single weights may not.

    Raises:
        ValueError: as `weight_files`.
    """
    files = weight_files(folder)
    full = sum(path.stat().st_size for path in files) <= _FULL_HASH_BYTES
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for block in _all_blocks(file) if full else _sampled_blocks(file, size):
                digest.update(block)
    kind = "sha256" if full else "sha256-blocks"
    return f"{kind}:{digest.hexdigest()}"


def _all_blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _sampled_blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    header = file.read(8)
    yield header + file.read(min(int.from_bytes(header, "little"), size))
    for number in range(_NUM_BLOCKS):
        file.seek(max(size - _BLOCK_BYTES, 0) * number // (_NUM_BLOCKS - 1))
        yield file.read(_BLOCK_BYTES)


# ---- writing ------------------------------------------------------------------------------------


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[np.ndarray],
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Write tensors as model.safetensors, or sharded with an index when they exceed
    `max_shard_bytes`.

    Args:
        folder: an existing folder.
        shapes: HF name -> shape, in the order in which `tensors` yields.
        dtype: type in the files.
        tensors: the arrays; each is taken when it is written.
        max_shard_bytes: no file's tensors exceed it, unless one alone does. Default 5e9.

    Returns:
        The safetensors files.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _grouped(sizes, max_shard_bytes or _SHARD_BYTES)
    count = len(shards)
    paths = [folder / _SINGLE]
    if count > 1:
        numbers = range(1, count + 1)
        paths = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in numbers]
    stream = iter(tensors)
    weight_map = {}
    for path, names in zip(paths, shards, strict=True):
        write_file(path, {name: shapes[name] for name in names}, dtype, islice(stream, len(names)))
        weight_map |= dict.fromkeys(names, path.name)
    if count > 1:
        total = sum(sizes.values())
        metadata = {"total_size": total, "total_parameters": total // dtype.itemsize}
        write_json(folder / _INDEX, {"metadata": metadata, "weight_map": weight_map})
    return paths


def _grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups that each stay within the limit."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
