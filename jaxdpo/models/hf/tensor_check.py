"""Whether the tensors of a folder's files are those of the model: names, shapes and types."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.safetensors_io import BYTES, DTYPES, TensorInfo
from jaxdpo.models.hf.tensor_map import Sizes, WeightRow, files_of, readable_tables, weight_table
from jaxdpo.models.hf.weight_files import read_headers

_IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
)
"""Buffers in old checkpoints: rotary frequencies, GPT-2's causal masks."""
_HEAD = "lm_head.weight"
_MAX_LINES = 200
"""Problems that one error lists."""
_MANY_TENSORS = 20_000
"""A model of more tensors than this (the largest real ones have about as many) must have files with
a similar number. Otherwise config.json is wrong, and listing its tensors could exhaust the
memory."""
_ROWS_AT_ONCE = 4096
"""Rows of an embedding that are compared at once; bounds the memory of the comparison."""


def locate_tensors(
    folder: Path, config: ModelConfig
) -> tuple[list[WeightRow], dict[str, TensorInfo]]:
    """The weight table in the layout that a folder's files have, and their tensors by name.

    Raises:
        ValueError: lists every missing, surplus, misshapen or unreadable tensor, or says why the
            files cannot be read.
    """
    found = _with_prefix(read_headers(folder), config)
    table, problems = _fitting_table(config, found)
    if problems:
        lines = [f"model.path={folder}: its weights do not fit its config.json:"]
        lines += [f"  {line}" for line in problems[:_MAX_LINES]]
        if len(problems) > _MAX_LINES:
            lines.append(f"  and {len(problems) - _MAX_LINES} more")
        raise ValueError("\n".join(lines))
    return table, found


def _with_prefix(found: dict[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """The tensors under their full names.

    Files of a bare decoder, such as the hub's gpt2, leave out `model.` or `transformer.`.
    """
    prefix = weight_table(config)[0].hf_name.split(".")[0] + "."
    if any(name.startswith(prefix) for name in found):
        return found
    return {name if name == _HEAD else prefix + name: info for name, info in found.items()}


def _fitting_table(
    config: ModelConfig, found: Mapping[str, TensorInfo]
) -> tuple[list[WeightRow], list[str]]:
    """The table in the layout that misses the fewest tensors, and a line for each difference."""
    tables = readable_tables(config)
    sizes = [sum(math.prod(row.stack) for row in table) for table in tables]
    limit = _MANY_TENSORS + 10 * len(found)
    if min(sizes) > limit:
        problem = (
            f"config.json describes a model of {min(sizes)} tensors, "
            f"but the files hold {len(found)}"
        )
        return [], [problem]
    files = {number: _files(tables[number]) for number, size in enumerate(sizes) if size <= limit}
    best = min(files, key=lambda number: len(files[number].keys() - found.keys()))
    return tables[best], _mismatches(files[best], found, tied=config.tied_head)


def _files(table: list[WeightRow]) -> dict[str, tuple[Sizes, Mapping[str, np.dtype]]]:
    """Name -> shape and possible types of every tensor that the files must have."""
    files = {}
    for row in table:
        for name, shape in files_of(row).items():
            files[name] = (shape, BYTES if row.mxfp4 else DTYPES)
    return files


def _mismatches(
    files: Mapping[str, tuple[Sizes, Mapping[str, np.dtype]]],
    found: Mapping[str, TensorInfo],
    tied: bool,
) -> list[str]:
    missing = [name for name in files if name not in found]
    surplus = []
    for name in found:
        ignored = _IGNORED.fullmatch(name) or (tied and name == _HEAD)
        if name not in files and not ignored:
            surplus.append(name)
    problems = [f"missing: {line}" for line in fold_names(missing)]
    problems += [f"not a tensor of this model: {line}" for line in fold_names(surplus)]
    for name, (shape, types) in files.items():
        if name not in found:
            continue
        info = found[name]
        if info.shape != shape:
            problems.append(f"{name}: has shape {list(info.shape)}, must have {list(shape)}")
        elif info.dtype not in types:
            problems.append(
                f"{name}: has type {info.dtype}, which is not implemented ({', '.join(types)} are)"
            )
    embed = next(iter(files))
    if not problems and tied and _HEAD in found and not _equal(found[_HEAD], found[embed]):
        problems.append(f"{_HEAD}: differs from {embed}, although tie_word_embeddings=true")
    return problems


def _equal(one: TensorInfo, other: TensorInfo) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = one.view(), other.view()
    for start in range(0, len(a), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        if not np.array_equal(a[rows], b[rows]):
            return False
    return True


# ---- short lists of names -----------------------------------------------------------------------


def fold_names(names: Iterable[str]) -> list[str]:
    """Names with layers and experts folded: `model.layers.{0-3,5}.mlp.up_proj.weight`."""
    return _fold(_fold(names, "experts"), "layers|h")


def _fold(names: Iterable[str], word: str) -> list[str]:
    pattern = re.compile(rf"((?:.*?\.)?(?:{word})\.)(\d{{1,9}})(\..*)")
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            before, number, after = match.groups()
            numbers.setdefault((before, after), []).append(int(number))
        else:
            numbers.setdefault((name, ""), [])
    return [f"{before}{_ranges(sorted(some))}{after}" for (before, after), some in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; [3] -> "3"; [] -> ""."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    spans = []
    # consecutive numbers differ from their index by the same amount
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        first, last = members[0], members[-1]
        spans.append(str(first) if first == last else f"{first}-{last}")
    return "{" + ",".join(spans) + "}"
