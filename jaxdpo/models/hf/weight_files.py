"""The safetensors files of a Hugging Face folder: which they are, what they hold, their fingerprint, and writing them in shards."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxdpo.models.hf.safetensors_io import TensorInfo, read_header, write_file

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FULL_HASH_BYTES = 2 * 2**30
_BLOCK_BYTES, _BLOCKS = 2**20, 64
_SHARD_BYTES = 5_000_000_000


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """HF name -> place of every tensor in a folder's safetensors files.

    Raises:
        ValueError: no safetensors file, a missing or damaged one, or an index that contradicts the files.
    """
    found: dict[str, TensorInfo] = {}
    problems = []
    for path in weight_files(folder):
        try:
            header = read_header(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{path}: holds {name}, which {found[name].path.name} holds too"
            for name in header
            if name in found
        ]
        found |= header
    if not problems:
        problems += _index_mismatches(folder, found)
    if problems:
        raise ValueError("\n".join(problems))
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in order of name.

    Raises:
        ValueError: there is none, a shard of the index is missing, or the index is malformed or ambiguous.
    """
    folder = Path(folder)
    index, single = folder / _INDEX, folder / _SINGLE
    if not index.is_file():
        if not single.is_file():
            raise ValueError(f"model.path={folder}: {_why_no_weights(folder)}")
        return [single]
    names = sorted(set(_weight_map(index).values()))
    if single.is_file() and names != [_SINGLE]:
        raise ValueError(
            f"model.path={folder}: has both {_SINGLE} and {_INDEX} with other files. Remove the one that is out of date"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"model.path={folder}: {_INDEX} names files that are missing: {', '.join(missing)}. Download the folder again"
        )
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
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
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ValueError(
                f"{index}: {name} lies in {file!r}, which is no *.safetensors file of the same folder"
            )
    return weight_map


def _index_mismatches(folder: Path, found: Mapping[str, TensorInfo]) -> list[str]:
    index = Path(folder) / _INDEX
    weight_map = (
        _weight_map(index)
        if index.is_file()
        else {name: info.path.name for name, info in found.items()}
    )
    absent = [
        name
        for name, file in weight_map.items()
        if name not in found or found[name].path.name != file
    ]
    surplus = [name for name in found if name not in weight_map]
    problems = [
        f"{index}: says {weight_map[name]} holds {name}, but it does not" for name in absent
    ]
    return problems + [
        f"{found[name].path}: holds {name}, which {_INDEX} does not name" for name in surplus
    ]


def _why_no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return "is not a folder"
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_model.safetensors" in names:
        return "holds a LoRA adapter, not a model. Merge it into its base model first"
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return f"holds its weights as pickle files only ({', '.join(pickles)}), which may run code when opened. Convert them to safetensors"
    return f"has neither {_SINGLE} nor {_INDEX}"


def weights_fingerprint(folder: Path) -> str:
    """A string that names the weights of a folder: equal for equal files, different when a weight was trained.

    Up to 2 GiB it is the sha256 of all bytes ("sha256:..."). Of larger weights it covers the headers, the sizes and 64 blocks of 1 MiB
    spread over each file ("sha256-blocks:..."), which any training changes but a deliberate edit of single weights may not.

    Raises:
        ValueError: as `weight_files`.
    """
    files = weight_files(folder)
    full = sum(path.stat().st_size for path in files) <= _FULL_HASH_BYTES
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for block in _all_blocks(file) if full else _sampled_blocks(file, path.stat().st_size):
                digest.update(block)
    return f"{'sha256' if full else 'sha256-blocks'}:{digest.hexdigest()}"


def _all_blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _sampled_blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    header = file.read(8)
    yield header + file.read(min(int.from_bytes(header, "little"), size))
    for number in range(_BLOCKS):
        file.seek(max(size - _BLOCK_BYTES, 0) * number // (_BLOCKS - 1))
        yield file.read(_BLOCK_BYTES)


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[np.ndarray],
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Write tensors as model.safetensors, or as numbered shards with an index when they exceed `max_shard_bytes` (default 5e9).

    Args:
        folder: an existing folder.
        shapes: HF name -> shape, in the order in which `tensors` yields.
        dtype: type in the files.
        tensors: the arrays; each is asked for when its place in the file is reached.
        max_shard_bytes: no file's tensors exceed it, unless one alone does.

    Returns:
        The safetensors files.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    groups = _grouped(sizes, max_shard_bytes or _SHARD_BYTES)
    count = len(groups)
    paths = [
        folder / (_SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
        for number in range(1, count + 1)
    ]
    stream = iter(tensors)
    for path, names in zip(paths, groups, strict=True):
        write_file(path, {name: shapes[name] for name in names}, dtype, islice(stream, len(names)))
    if count > 1:
        weight_map = {
            name: path.name for path, names in zip(paths, groups, strict=True) for name in names
        }
        metadata = {
            "total_size": sum(sizes.values()),
            "total_parameters": sum(sizes.values()) // dtype.itemsize,
        }
        (folder / _INDEX).write_text(
            json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n",
            encoding="utf-8",
        )
    return paths


def _grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
