"""The safetensors file format: a checked header, tensors as views of the file, streamed writing.

A file is 8 bytes (length of the header, little endian), a JSON header
{name: {dtype, shape, data_offsets}}, then the tensors end to end.

Not the safetensors package, because (measured with 0.8.0) its save_file takes all tensors at once:
four of 256 MiB raise the peak memory by 1024 MiB, where `write_file`, which takes an iterator, adds
512 MiB (the tensor being written and the next). Its reader slices as fast as ours, but accepts a
header that gives a name twice and names with escape codes, and says of a damaged file "incomplete
metadata" where `read_header` names tensor and byte.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of weights, under their names in the header."""
BYTES: dict[str, np.dtype] = {"U8": np.dtype("u1")}
"""Type of packed weights (MXFP4)."""
_READABLE = DTYPES | BYTES
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 2**24
"""About 100 bytes a tensor: enough for 160,000 of them. The safetensors package allows 100 MB."""
_MAX_DIMS = 8
"""Weights have at most 3."""
_MAX_NAME = 500
"""Characters; real names have less than 100."""
_LFS_POINTER = b"version "
"""The first 8 bytes of the text that git-lfs leaves in place of a file."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored."""

    path: Path
    dtype: str
    """The header's name of its type."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    num_bytes: int

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the memory-mapped file: a slice of it reads that slice
        only.

        Raises:
            ValueError: the type is none of DTYPES and BYTES (other integer weights are quantized
                models').
        """
        if self.dtype not in _READABLE:
            raise ValueError(
                f"has dtype {self.dtype}, which is not implemented ({', '.join(_READABLE)} are)"
            )
        if not self.num_bytes:  # an empty range cannot be mapped
            return np.zeros(self.shape, _READABLE[self.dtype])
        raw = np.memmap(self.path, np.uint8, "r", offset=self.start, shape=(self.num_bytes,))
        return raw.view(_READABLE[self.dtype]).reshape(self.shape)


# ---- reading ------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of every tensor of a safetensors file, checked against the file's size.

    Raises:
        ValueError: the file is truncated, is no safetensors file, or its header contradicts itself.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == _LFS_POINTER:
            raise ValueError(
                f"{path}: is a git-lfs pointer, not the weights. Run `git lfs pull` in the folder"
            )
        if len(start) < 8:
            raise ValueError(
                f"{path}: is truncated: {file_bytes} bytes are less than a safetensors file needs"
            )
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > file_bytes - 8:
            raise ValueError(
                f"{path}: is truncated or no safetensors file: it announces a header of "
                f"{header_bytes} bytes, but has {file_bytes} in all"
            )
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: announces a header of {header_bytes} bytes; "
                f"more than {_MAX_HEADER_BYTES} are not read"
            )
        content = file.read(header_bytes)
    try:
        header = json.loads(content, object_pairs_hook=_unique_keys)
        return _checked(path, header, 8 + header_bytes, file_bytes)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its safetensors header is malformed: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _checked(path: Path, header: Any, data_start: int, file_bytes: int) -> dict[str, TensorInfo]:
    if not isinstance(header, dict):
        raise ValueError(f"it is a {type(header).__name__}, not an object")
    entries = {}
    for name, entry in header.items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, entry, data_start)
    # the format wants tensors end to end, without gaps or overlaps
    position = data_start
    for name, info in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != position:
            raise ValueError(
                f"{name} begins at byte {info.start}, but the tensor before it ends at {position}"
            )
        position += info.num_bytes
    if position != file_bytes:
        raise ValueError(
            f"its tensors end at byte {position}, but the file at {file_bytes} "
            "(truncated, or something is appended)"
        )
    return entries


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(
            f"a tensor has a name that is empty, too long or not printable: {name[:80]!r}"
        )
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"{name} has the dtype {dtype!r}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise ValueError(f"{name} has a shape that is no list of at most {_MAX_DIMS} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has data_offsets that are no [begin, end]")
    num_bytes = offsets[1] - offsets[0]
    if dtype in _READABLE and math.prod(shape) * _READABLE[dtype].itemsize != num_bytes:
        raise ValueError(
            f"{name} of shape {shape} and type {dtype} does not take "
            f"the {num_bytes} bytes of its data_offsets"
        )
    return TensorInfo(path, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _are_counts(values: Any) -> bool:
    """Whether it is a list of ints from 0 up to the largest of 64 bits."""
    if not isinstance(values, list):
        return False
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            return False
    return True


# ---- writing ------------------------------------------------------------------------------------


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[np.ndarray],
) -> None:
    """Write a safetensors file of tensors that all have one dtype, tensor by tensor.

    Args:
        path: the file, overwritten if it exists.
        shapes: name -> shape, in the order in which `tensors` yields.
        dtype: one of DTYPES' values; the tensors are cast to it.
        tensors: as many arrays as `shapes` has names.
    """
    path.write_bytes(_header(shapes, dtype))
    with path.open("ab") as file:
        for (name, shape), array in zip(shapes.items(), tensors, strict=True):
            assert array.shape == shape, f"{name}: {array.shape} != {shape}"
            flat = np.ascontiguousarray(array.reshape(-1), dtype)
            file.write(flat.view(np.uint8).data)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    # transformers looks for "format" to see which library wrote the file; "pt" is what it writes
    # itself
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes, as the package does
    return struct.pack("<Q", len(text)) + text
