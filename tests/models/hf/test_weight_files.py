"""Corrupt files and folders are refused by name, in bounded memory; fingerprints."""

import dataclasses
import json
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf import safetensors_io, weight_files
from jaxdpo.models.hf.load_save import load_params, save_params
from jaxdpo.models.hf.tensor_map import files_of, readable_tables, weight_table
from jaxdpo.models.hf.weight_files import weights_fingerprint
from tests.families import PLAIN, tiny

SLACK = 4_000_000
"""Bytes that refusing may take beyond the size of the files: parsed JSON, text of the error."""


def write(folder: Path, max_shard_bytes: int | None = None, seed: int = 0) -> list[Path]:
    """Sound weights of PLAIN."""
    rng, params = np.random.default_rng(seed), {}
    for row in weight_table(PLAIN):
        *parents, last = row.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = rng.standard_normal(row.full_shape, dtype=np.float32)
    folder.mkdir(exist_ok=True)
    return save_params(folder, PLAIN, params, "float32", max_shard_bytes)


def refusal(folder: Path, config: ModelConfig = PLAIN) -> str:
    """The ValueError that refuses a folder, with no more memory than the folder's files."""
    files = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            load_params(folder, config, None, "float32")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < files + SLACK
    return str(error.value)


def test_fingerprint_names_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write(folder, 5000)
    assert weights_fingerprint(one) == weights_fingerprint(two)
    assert weights_fingerprint(one).startswith("sha256:")
    for limit in (2**31, 10):  # all bytes, and blocks
        monkeypatch.setattr(weight_files, "_FULL_HASH_BYTES", limit)
        before = weights_fingerprint(one)
        assert before == weights_fingerprint(one)
        shard = sorted(one.glob("*.safetensors"))[1]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        assert weights_fingerprint(one) != before
    assert before.startswith("sha256-blocks:")


# ---- corrupt folders: each is made from a sound one by one change ------------------------------


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def crafted(
    header: Any, data: bytes = b"\0" * 8, length: int | None = None
) -> Callable[[Path], Any]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda file: file.write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )


def edited(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def corrupt(file: Path) -> None:
        tensors = safetensors.numpy.load_file(file)
        change(tensors)
        safetensors.numpy.save_file(tensors, file)

    return corrupt


def renamed(name: str) -> Callable[[Path], Any]:
    return lambda file: file.rename(file.with_name(name))


NORM = "model.norm.weight"
CORRUPT_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda file: file.unlink() or file.parent.rmdir(), "is not a folder"),
    "empty folder": (lambda file: file.unlink(), "has neither model.safetensors nor"),
    "pickle only": (renamed("pytorch_model.bin"), r"pickle files only \(pytorch_model.bin\)"),
    "adapter": (renamed("adapter_model.safetensors"), "LoRA adapter"),
    "empty file": (lambda file: file.write_bytes(b""), "is truncated: 0 bytes"),
    "seven bytes": (lambda file: file.write_bytes(b"\1" * 7), "is truncated: 7 bytes"),
    "git-lfs pointer": (
        lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "a pickle in disguise": (
        lambda file: file.write_bytes(b"PK\3\4" + b"\0" * 500),
        "header of .* bytes, but has 504|malformed",
    ),
    "cut in the header": (
        lambda file: os.truncate(file, 100),
        "announces a header of .* bytes, but has 100",
    ),
    "cut in the data": (
        lambda file: os.truncate(file, file.stat().st_size - 4),
        "end at byte .* but the file at",
    ),
    "bytes appended": (
        lambda file: file.write_bytes(file.read_bytes() + b"x"),
        "something is appended",
    ),
    "header longer than memory": (
        crafted({}, length=2**63),
        "announces a header of 9223372036854775808 bytes",
    ),
    "header larger than any": (
        crafted(b" " * 2**24 + b"{}"),
        "announces a header of 16777218 bytes; more than 16777216 are not read",
    ),
    "header is no JSON": (crafted(b"{" * 50), "header is malformed"),
    "header nests too deep": (crafted(b"[" * 200_000), "header is malformed"),
    "header is no text": (crafted(b"\xff\xfe" * 20), "header is malformed"),
    "header is a list": (crafted([]), "it is a list, not an object"),
    "a name twice": (crafted(b'{"a":{},"a":{}}'), "a key is given twice"),
    "a key of an entry twice": (
        crafted(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'),
        "a key is given twice",
    ),
    "a number of a million digits": (
        crafted(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b"]}}"),
        "header is malformed",
    ),
    "a name of a million letters": (crafted({"a" * 10**6: entry()}), "too long or not printable"),
    "a name with an escape code": (crafted({"\x1b[2J": entry()}), "not printable"),
    "an entry without offsets": (
        crafted({"a": {"dtype": "F32"}}),
        "a has no dtype, shape and data_offsets",
    ),
    "dtype is no text": (crafted({"a": entry(dtype=7)}), "a has the dtype 7"),  # type: ignore[arg-type]
    "negative shape": (crafted({"a": entry(shape=[-1, -2])}), "a has a shape that is no list"),
    "astronomic shape": (crafted({"a": entry(shape=[2**62] * 8)}), "does not take the 8 bytes"),
    "infinite shape": (
        crafted(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'),
        "a has a shape that is no list",
    ),
    "too many dimensions": (
        crafted({"a": entry(shape=[1] * 1000)}),
        "a has a shape that is no list of at most 8",
    ),
    "offsets backwards": (crafted({"a": entry(offsets=[8, 0])}), "data_offsets that are no"),
    "offsets beyond 64 bits": (
        crafted({"a": entry(offsets=[0, 2**70])}),
        "data_offsets that are no",
    ),
    "offsets past the end": (
        crafted({"a": entry(shape=[2**40], offsets=[0, 2**42])}),
        "end at byte .* but the file at",
    ),
    "offsets overlap": (
        crafted({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}),
        "b begins at byte",
    ),
    "a gap": (crafted({"a": entry(shape=[1], offsets=[4, 8])}), "a begins at byte"),
    "size and shape differ": (crafted({"a": entry(shape=[3])}), "does not take the 8 bytes"),
    "8-bit weights": (
        edited(lambda t: t.update({NORM: np.ones(16, np.int8)})),
        f"{NORM}: has type I8, which is not implemented",
    ),
    "a type of the wrong size": (
        crafted({"a": entry(dtype="F16")}),
        r"a of shape \[2\] and type F16 does not take the 8 bytes",
    ),
    "whole numbers": (
        edited(lambda t: t.update({NORM: np.ones(16, np.int64)})),
        f"{NORM}: has type I64, which is not implemented",
    ),
    "missing tensor": (
        edited(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"missing: model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "unmapped tensor": (
        edited(lambda t: t.update({"score.weight": t[NORM]})),
        r"not a tensor of this model: score\.weight",
    ),
    "wrong shape": (
        edited(lambda t: t.update({NORM: np.ones(17, np.float32)})),
        rf"{NORM}: has shape \[17\], must have \[16\]",
    ),
    "transposed": (
        edited(lambda t: t.update({"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)})),
        r"lm_head\.weight: has shape \[16, 40\], must have \[40, 16\]",
    ),
}


@pytest.mark.parametrize("case", CORRUPT_FILES)
def test_corrupt_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    corrupt, message = CORRUPT_FILES[case]
    folder = tmp_path / "model"
    (file,) = write(folder)
    corrupt(file)
    told = refusal(folder)
    assert re.search(message, told), told
    assert str(folder) in told


EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
INDEX = "model.safetensors.index.json"


def reindexed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return corrupt


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-00001-of-*.safetensors"))


def last_shard(folder: Path) -> Path:
    return max(folder.glob("model-*.safetensors"))


CORRUPT_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (
        lambda folder: first_shard(folder).unlink(),
        r"names files that are missing: model-00001-of-",
    ),
    "truncated shard": (
        lambda folder: os.truncate(first_shard(folder), 50),
        r"model-00001-of-.* is truncated",
    ),
    "index without a tensor": (
        reindexed(lambda weights: weights.pop(NORM)),
        rf"holds {NORM}, which {INDEX} does not name",
    ),
    "index with a tensor too many": (
        reindexed(lambda weights: weights.update({"z": weights[NORM]})),
        "holds z, but it does not",
    ),
    "index names another shard": (
        reindexed(lambda weights: weights.update({NORM: weights["model.embed_tokens.weight"]})),
        rf"holds {NORM}, but it does not",
    ),
    "index leads out of the folder": (
        reindexed(lambda weights: weights.update(z="../../etc/x.safetensors")),
        "no .*file of the same folder",
    ),
    "index leads to a pickle": (
        reindexed(lambda weights: weights.update(z="x.bin")),
        "no .*file of the same folder",
    ),
    "index of numbers": (
        reindexed(lambda weights: weights.update(z=3)),
        "no .*file of the same folder",
    ),
    "index with an escape code": (
        reindexed(lambda weights: weights.update({"\x1b[2J": "model-1.safetensors"})),
        "cannot be printed",
    ),
    "empty index": (reindexed(lambda weights: weights.clear()), "not an object of names and files"),
    "index is no JSON": (
        lambda folder: (folder / INDEX).write_text("{"),
        "is not a JSON object with a weight_map",
    ),
    "index nests too deep": (
        lambda folder: (folder / INDEX).write_text("[" * 100_000),
        "is not a JSON object with a weight_map",
    ),
    "index is a list": (
        lambda folder: (folder / INDEX).write_text("[]"),
        "is not a JSON object with a weight_map",
    ),
    "two generations": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "Remove the one that is out of date",
    ),
    "a tensor in two shards": (
        lambda folder: last_shard(folder).write_bytes(first_shard(folder).read_bytes()),
        "holds .* which model-00001-of-.* holds too",
    ),
}


@pytest.mark.parametrize("case", CORRUPT_FOLDERS)
def test_corrupt_folder_is_refused_by_name(tmp_path: Path, case: str) -> None:
    corrupt, message = CORRUPT_FOLDERS[case]
    write(tmp_path, 5000)
    corrupt(tmp_path)
    told = refusal(tmp_path)
    assert re.search(message, told), told


CORRUPT_PACKED: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "scales are missing": (lambda t: t.pop(f"{EXPERTS}_scales"), rf"missing: {EXPERTS}_scales"),
    "blocks are floats": (
        lambda t: t.update({f"{EXPERTS}_blocks": t[f"{EXPERTS}_blocks"].astype(np.float32)}),
        rf"{EXPERTS}_blocks: has type F32, which is not implemented \(U8 are\)",
    ),
    "blocks of other sizes": (
        lambda t: t.update({f"{EXPERTS}_blocks": t[f"{EXPERTS}_blocks"][:, :64].copy()}),
        rf"{EXPERTS}_blocks: has shape \[4, 64, 1, 16\], must have \[4, 128, 1, 16\]",
    ),
    "packed and unpacked": (
        lambda t: t.update({EXPERTS: np.zeros((4, 32, 128), np.float32)}),
        rf"not a tensor of this model: {EXPERTS}",
    ),
}


@pytest.mark.parametrize("case", CORRUPT_PACKED)
def test_corrupt_packed_experts_are_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = CORRUPT_PACKED[case]
    config = tiny("gpt_oss")
    kinds = {
        name: (shape, "u1" if row.mxfp4 else "f4")
        for row in readable_tables(config)[1]
        for name, shape in files_of(row).items()
    }
    tensors = {name: np.ones(shape, dtype) for name, (shape, dtype) in kinds.items()}
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    told = refusal(tmp_path, config)
    assert re.search(message, told), told


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(PLAIN, num_layers=10**11),
        dataclasses.replace(tiny("mixtral"), num_experts=10**11),
        dataclasses.replace(tiny("mixtral"), num_experts=10**6, num_layers=10**6),
    ],
)
def test_a_config_of_absurd_sizes_is_not_believed(tmp_path: Path, config: ModelConfig) -> None:
    write(tmp_path)
    assert re.search(
        r"config\.json describes a model of \d+ tensors, but the files hold 30|missing: |has shape",
        refusal(tmp_path, config),
    )


@given(position=st.integers(0, 4000), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_in_the_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    """Whatever the header says: either ValueError, or every tensor lies within the file."""
    folder = tmp_path_factory.mktemp("flipped")
    (file,) = write(folder)
    content = bytearray(file.read_bytes())
    content[position % (8 + struct.unpack("<Q", content[:8])[0])] ^= 1 << bit
    file.write_bytes(content)
    try:
        header = safetensors_io.read_header(file)
    except ValueError:
        return
    assert all(info.start + info.num_bytes <= len(content) for info in header.values())
