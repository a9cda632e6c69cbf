"""Weights: round trips through files and meshes, and corrupt folders that are refused by name."""

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.config import MeshSection
from jaxdpo.models import tensorfile, weightfiles
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import abstract_params, logical_axes
from jaxdpo.models.hfconfig import load_model_config
from jaxdpo.models.weights import fold_layers, load_params, save_params, weight_table, weights_fingerprint
from jaxdpo.sharding import make_mesh, param_shardings

PLAIN = ModelConfig(
    family="llama", vocab_size=40, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=24, max_positions=64
)
FULL = dataclasses.replace(PLAIN, family="qwen3", qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm="head")
TIED = dataclasses.replace(PLAIN, family="qwen2", tied_head=True, qkv_bias=True)


def random_params(config: ModelConfig, dtype: Any = np.float32) -> dict[str, Any]:
    """Nested dict of random numpy arrays."""
    rng, params = np.random.default_rng(0), {}
    for row in weight_table(config):
        *parents, last = row.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = rng.standard_normal(row.full_shape, dtype=np.float32).astype(dtype)
    return params


def shardings(config: ModelConfig, **mesh: int) -> dict[str, Any]:
    return param_shardings(make_mesh(MeshSection(**mesh)), logical_axes(config), abstract_params(config, "float32"))


def assert_equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [None, 5000, 1])
@pytest.mark.parametrize("config", [PLAIN, FULL, TIED], ids=["plain", "full", "tied"])
def test_saved_and_loaded_weights_are_equal(tmp_path: Path, config: ModelConfig, dtype: str, max_shard_bytes: int | None) -> None:
    params = random_params(config, np.dtype(dtype))
    files = save_params(tmp_path, config, params, dtype, max_shard_bytes)
    loaded = load_params(tmp_path, config, None, dtype)
    assert_equal(loaded, params)
    assert all(leaf.dtype == jnp.dtype(dtype) for leaf in jax.tree.leaves(loaded))
    index = tmp_path / "model.safetensors.index.json"
    assert (len(files) > 1) == index.exists() == bool(max_shard_bytes)
    if max_shard_bytes == 5000:
        assert all(path.stat().st_size - 8 - header_bytes(path) <= 5000 for path in files)


def header_bytes(path: Path) -> int:
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_sharded_over_eight_devices_and_back(tmp_path: Path, config: ModelConfig, mesh: dict[str, int]) -> None:
    params = random_params(config)
    save_params(tmp_path, config, params, "float32")
    placed = shardings(config, **mesh)
    loaded = load_params(tmp_path, config, placed, "float32")
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == placed
    assert_equal(loaded, params)
    again = tmp_path / "again"
    again.mkdir()
    save_params(again, config, loaded, "float32", 5000)
    assert_equal(load_params(again, config, None, "float32"), params)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_loaded_arrays_can_be_donated(tmp_path: Path, mesh: dict[str, int]) -> None:
    """Copies on several devices must not share memory: an update in place on one would show on the others."""
    config = dataclasses.replace(PLAIN, vocab_size=4096)
    params = random_params(config)
    save_params(tmp_path, config, params, "float32")
    loaded = load_params(tmp_path, config, shardings(config, **mesh), "float32")
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)(loaded)
    assert_equal(doubled, jax.tree.map(lambda leaf: leaf * 2, params))


def test_types_are_converted_with_correct_rounding(tmp_path: Path) -> None:
    params = random_params(PLAIN)
    save_params(tmp_path, PLAIN, params, "float32")
    halves = load_params(tmp_path, PLAIN, None, "bfloat16")
    assert_equal(halves, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))
    save_params(tmp_path, PLAIN, halves, "bfloat16")
    assert_equal(load_params(tmp_path, PLAIN, None, "float32"), jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), halves))


def test_files_are_what_the_safetensors_library_reads_and_writes(tmp_path: Path) -> None:
    params = random_params(FULL, ml_dtypes.bfloat16)
    (file,) = save_params(tmp_path, FULL, params, "bfloat16")
    tensors = safetensors.numpy.load_file(file)
    assert set(tensors) == {name for row in weight_table(FULL) for name in row.names()}
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], params["layers"]["mlp"]["down"][1].T)
    np.testing.assert_array_equal(tensors["model.layers.2.self_attn.q_proj.weight"], params["layers"]["attn"]["q"][2].reshape(16, 24).T)
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.o_proj.weight"], params["layers"]["attn"]["o"][0].reshape(24, 16).T)
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    other = tmp_path / "other"
    other.mkdir()
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    assert_equal(load_params(other, FULL, None, "bfloat16"), params)


def test_only_the_slices_of_a_device_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_params(tmp_path, PLAIN, random_params(PLAIN), "float32")
    placed = shardings(PLAIN, fsdp=8)
    sizes: list[int] = []
    monkeypatch.setattr(jax, "device_put", lambda piece, device, put=jax.device_put: sizes.append(piece.nbytes) or put(piece, device))
    loaded = load_params(tmp_path, PLAIN, placed, "float32")
    norms = 8 * 4 * (2 * 3 * 16 + 16)  # norm scales are whole on each of the 8 devices
    assert sum(sizes) - norms == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) - norms // 8


def test_a_tied_head_is_not_written_and_an_equal_copy_is_accepted(tmp_path: Path) -> None:
    params = random_params(TIED)
    (file,) = save_params(tmp_path, TIED, params, "float32")
    tensors = safetensors.numpy.load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(tensors, file)
    assert_equal(load_params(tmp_path, TIED, None, "float32"), params)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight, although tie_word_embeddings=true"):
        load_params(tmp_path, TIED, None, "float32")


def test_every_difference_is_told_at_once_with_layers_folded(tmp_path: Path) -> None:
    save_params(tmp_path, TIED, random_params(TIED), "float32")
    wider = dataclasses.replace(PLAIN, mlp_size=32)
    with pytest.raises(ValueError) as error:
        load_params(tmp_path, wider, None, "float32")
    told = str(error.value)
    assert "missing: lm_head.weight" in told
    assert "not a tensor of this model: model.layers.{0-2}.self_attn.k_proj.bias" in told
    assert "model.layers.1.mlp.up_proj.weight: has shape [24, 16], must have [32, 16]" in told


def test_fold_layers() -> None:
    names = [f"model.layers.{layer}.a" for layer in (0, 1, 2, 5)] + ["model.layers.3.b", "c", "layers.x.d", "layers.99999999999999.e"]
    assert fold_layers(names) == ["model.layers.{0-2,5}.a", "model.layers.3.b", "c", "layers.x.d", "layers.99999999999999.e"]


def test_parameters_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    params = random_params(PLAIN)
    params["extra"] = np.zeros(3)
    params["norm"]["scale"] = np.zeros(5)
    del params["layers"]["mlp"]["up"]
    with pytest.raises(ValueError) as error:
        save_params(tmp_path, PLAIN, params, "float32")
    assert "layers/mlp/up: is missing" in str(error.value)
    assert "extra: is not a parameter" in str(error.value) and "norm/scale: has shape (5,), must have (16,)" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_fingerprint_names_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    params = random_params(PLAIN)
    for folder in (one, two):
        folder.mkdir()
        save_params(folder, PLAIN, params, "float32", 5000)
    assert weights_fingerprint(one) == weights_fingerprint(two)
    assert weights_fingerprint(one).startswith("sha256:")
    for limit in (2**31, 10):  # all bytes, and blocks
        monkeypatch.setattr(weightfiles, "_FULL_HASH_BYTES", limit)
        before = weights_fingerprint(one)
        assert before == weights_fingerprint(one)
        shard = sorted(one.glob("*.safetensors"))[1]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        assert weights_fingerprint(one) != before
    assert before.startswith("sha256-blocks:")


# ---- corrupt folders: each is made from a sound one by one change --------------------------------------------------------------


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def crafted(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Callable[[Path], Any]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda file: file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


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
    "git-lfs pointer": (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a pickle in disguise": (lambda file: file.write_bytes(b"PK\3\4" + b"\0" * 500), "header of .* bytes, but has 504|malformed"),
    "cut in the header": (lambda file: os.truncate(file, 100), "announces a header of .* bytes, but has 100"),
    "cut in the data": (lambda file: os.truncate(file, file.stat().st_size - 4), "end at byte .* but the file at"),
    "bytes appended": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "something is appended"),
    "header longer than memory": (crafted({}, length=2**63), "announces a header of 9223372036854775808 bytes"),
    "header is no JSON": (crafted(b"{" * 50), "header is malformed"),
    "header nests too deep": (crafted(b"[" * 200_000), "header is malformed"),
    "header is no text": (crafted(b"\xff\xfe" * 20), "header is malformed"),
    "header is a list": (crafted([]), "it is a list, not an object"),
    "a name twice": (crafted(b'{"a":{},"a":{}}'), "a key is given twice"),
    "a name with an escape code": (crafted({"\x1b[2J": entry()}), "not printable"),
    "an entry without offsets": (crafted({"a": {"dtype": "F32"}}), "a has no dtype, shape and data_offsets"),
    "dtype is no text": (crafted({"a": entry(dtype=7)}), "a has the dtype 7"),  # type: ignore[arg-type]
    "negative shape": (crafted({"a": entry(shape=[-1, -2])}), "a has a shape that is no list"),
    "astronomic shape": (crafted({"a": entry(shape=[2**62] * 8)}), "does not take the 8 bytes"),
    "infinite shape": (crafted(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'), "a has a shape that is no list"),
    "too many dimensions": (crafted({"a": entry(shape=[1] * 1000)}), "a has a shape that is no list of at most 8"),
    "offsets backwards": (crafted({"a": entry(offsets=[8, 0])}), "data_offsets that are no"),
    "offsets past the end": (crafted({"a": entry(shape=[2**40], offsets=[0, 2**42])}), "end at byte .* but the file at"),
    "offsets overlap": (crafted({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}), "b begins at byte"),
    "a gap": (crafted({"a": entry(shape=[1], offsets=[4, 8])}), "a begins at byte"),
    "size and shape differ": (crafted({"a": entry(shape=[3])}), "does not take the 8 bytes"),
    "8-bit weights": (edited(lambda t: t.update({NORM: np.ones(16, np.int8)})), f"{NORM}: has type I8, which is not implemented"),
    "missing tensor": (edited(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
    "unmapped tensor": (edited(lambda t: t.update({"score.weight": t[NORM]})), r"not a tensor of this model: score\.weight"),
    "wrong shape": (edited(lambda t: t.update({NORM: np.ones(17, np.float32)})), rf"{NORM}: has shape \[17\], must have \[16\]"),
    "transposed": (
        edited(lambda t: t.update({"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)})),
        r"lm_head\.weight: has shape \[16, 40\], must have \[40, 16\]",
    ),
}


@pytest.mark.parametrize("case", CORRUPT_FILES)
def test_corrupt_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    corrupt, message = CORRUPT_FILES[case]
    folder = tmp_path / "model"
    folder.mkdir()
    (file,) = save_params(folder, PLAIN, random_params(PLAIN), "float32")
    corrupt(file)
    with pytest.raises(ValueError, match=message) as error:
        load_params(folder, PLAIN, None, "float32")
    assert str(folder) in str(error.value)


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
    "missing shard": (lambda folder: first_shard(folder).unlink(), r"names files that are missing: model-00001-of-"),
    "truncated shard": (lambda folder: os.truncate(first_shard(folder), 50), r"model-00001-of-.* is truncated"),
    "index without a tensor": (reindexed(lambda weights: weights.pop(NORM)), rf"holds {NORM}, which {INDEX} does not name"),
    "index with a tensor too many": (reindexed(lambda weights: weights.update({"z": weights[NORM]})), "holds z, but it does not"),
    "index names another shard": (
        reindexed(lambda weights: weights.update({NORM: weights["model.embed_tokens.weight"]})),
        rf"holds {NORM}, but it does not",
    ),
    "index leads out of the folder": (
        reindexed(lambda weights: weights.update(z="../../etc/x.safetensors")),
        "no .*file of the same folder",
    ),
    "index leads to a pickle": (reindexed(lambda weights: weights.update(z="x.bin")), "no .*file of the same folder"),
    "index of numbers": (reindexed(lambda weights: weights.update(z=3)), "no .*file of the same folder"),
    "index with an escape code": (reindexed(lambda weights: weights.update({"\x1b[2J": "model-1.safetensors"})), "cannot be printed"),
    "empty index": (reindexed(lambda weights: weights.clear()), "not an object of names and files"),
    "index is no JSON": (lambda folder: (folder / INDEX).write_text("{"), "is not a JSON object with a weight_map"),
    "index nests too deep": (lambda folder: (folder / INDEX).write_text("[" * 100_000), "is not a JSON object with a weight_map"),
    "index is a list": (lambda folder: (folder / INDEX).write_text("[]"), "is not a JSON object with a weight_map"),
    "two generations": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "Remove the one that is out of date"),
    "a tensor in two shards": (
        lambda folder: last_shard(folder).write_bytes(first_shard(folder).read_bytes()),
        "holds .* which model-00001-of-.* holds too",
    ),
}


@pytest.mark.parametrize("case", CORRUPT_FOLDERS)
def test_corrupt_folder_is_refused_by_name(tmp_path: Path, case: str) -> None:
    corrupt, message = CORRUPT_FOLDERS[case]
    save_params(tmp_path, PLAIN, random_params(PLAIN), "float32", 5000)
    corrupt(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path, PLAIN, None, "float32")


@given(position=st.integers(0, 4000), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_in_the_header_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    """Whatever the header says: either ValueError, or every tensor lies within the file."""
    folder = tmp_path_factory.mktemp("flipped")
    (file,) = save_params(folder, PLAIN, random_params(PLAIN), "float32")
    content = bytearray(file.read_bytes())
    content[position % (8 + header_bytes(file))] ^= 1 << bit
    file.write_bytes(content)
    try:
        header = tensorfile.read_header(file)
    except ValueError:
        return
    assert all(info.start + info.num_bytes <= len(content) for info in header.values())


def test_the_real_model_loads_and_its_fingerprint_is_stable(real_data: Path) -> None:
    folder = real_data / "models" / "stories260K"
    config = load_model_config(folder)
    params = load_params(folder, config, None, "float32")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    assert weights_fingerprint(folder) == "sha256:9faac197c1db9294620ea6cd39086a460d495977164dad4a18be39d700d744f9"
