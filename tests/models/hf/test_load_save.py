"""Weights: round trips through files and meshes for every family, and peak memory."""

import dataclasses
import functools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxdpo.config.schema import MeshSection
from jaxdpo.distributed.sharding import make_mesh, param_shardings
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf import mxfp4
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.load_save import load_params, save_params
from jaxdpo.models.hf.tensor_map import files_of, readable_tables, weight_table
from jaxdpo.models.hf.weight_files import weights_fingerprint
from jaxdpo.models.params import abstract_params, logical_axes
from tests.families import PLAIN, TINY, tiny

FULL = dataclasses.replace(
    PLAIN, family="qwen3", qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm="head"
)
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


def random_files(folder: Path, config: ModelConfig, form: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under HF names, written to one file with the safetensors library."""
    rng = np.random.default_rng(1)
    tensors = {}
    for row in readable_tables(config)[form]:
        for name, shape in files_of(row).items():
            if row.mxfp4:
                low, high = (120, 133) if name.endswith("_scales") else (0, 256)
                tensors[name] = rng.integers(low, high, shape).astype(np.uint8)
            else:
                tensors[name] = rng.standard_normal(shape, dtype=np.float32)
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors


def shardings(config: ModelConfig, **mesh: int) -> dict[str, Any]:
    return param_shardings(
        make_mesh(MeshSection(**mesh)), logical_axes(config), abstract_params(config, "float32")
    )


def assert_equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [None, 5000, 1])
@pytest.mark.parametrize("config", [PLAIN, FULL, TIED], ids=["plain", "full", "tied"])
def test_saved_and_loaded_weights_are_equal(
    tmp_path: Path, config: ModelConfig, dtype: str, max_shard_bytes: int | None
) -> None:
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


@pytest.mark.parametrize("name", TINY)
def test_files_to_parameters_to_files(tmp_path: Path, name: str) -> None:
    """Every number of the files comes back, so the table is right in both directions."""
    tensors = random_files(tmp_path / "in", tiny(name))
    params = load_params(tmp_path / "in", tiny(name), None, "float32")
    (tmp_path / "out").mkdir()
    (file,) = save_params(tmp_path / "out", tiny(name), params, "float32")
    written = safetensors.numpy.load_file(file)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)


@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
@pytest.mark.parametrize("name", TINY)
def test_sharded_over_eight_devices_and_back(
    tmp_path: Path, name: str, mesh: dict[str, int]
) -> None:
    config = tiny(name)
    params = random_params(config)
    save_params(tmp_path, config, params, "float32")
    placed = shardings(config, **mesh)
    loaded = load_params(tmp_path, config, placed, "float32")
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == placed
    assert_equal(loaded, params)
    again = tmp_path / "again"
    again.mkdir()
    save_params(again, config, loaded, "float32", 50_000)
    assert_equal(load_params(again, config, None, "float32"), params)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_joint_experts_are_read_too(tmp_path: Path, name: str) -> None:
    """transformers 5's layout in memory: one tensor for all experts, gate and up side by side."""
    tensors = random_files(tmp_path, tiny(name), form=1)
    loaded = load_params(tmp_path, tiny(name), shardings(tiny(name), fsdp=4, tensor=2), "float32")[
        "layers"
    ]["moe"]
    gate_up, size = tensors["model.layers.3.mlp.experts.gate_up_proj"], tiny(name).mlp_size
    np.testing.assert_array_equal(loaded["gate"][3], gate_up[:, :size].swapaxes(1, 2))
    np.testing.assert_array_equal(loaded["up"][3], gate_up[:, size:].swapaxes(1, 2))


@pytest.mark.parametrize("mesh", [None, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_mxfp4_experts_are_dequantized_while_they_are_read(
    tmp_path: Path, mesh: dict[str, int] | None
) -> None:
    config = tiny("gpt_oss")
    tensors = random_files(tmp_path, config, form=1)
    loaded = load_params(tmp_path, config, shardings(config, **mesh) if mesh else None, "bfloat16")[
        "layers"
    ]["moe"]
    for name, first, step in (("gate", 0, 2), ("up", 1, 2)):
        packed = [
            tensors[f"model.layers.2.mlp.experts.gate_up_proj_{kind}"][:, first::step]
            for kind in ("blocks", "scales")
        ]
        expected = np.empty((4, 32, 64), ml_dtypes.bfloat16)
        mxfp4.read(expected, packed[0], packed[1], (slice(0, 4), slice(0, 32), slice(0, 64)))
        np.testing.assert_array_equal(np.asarray(loaded[name][2]), expected)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_files_of_a_bare_decoder_are_read(tmp_path: Path, name: str) -> None:
    """The hub's gpt2 leaves out `transformer.`, and holds buffers that are no weights."""
    tensors = random_files(tmp_path, tiny(name))
    params = load_params(tmp_path, tiny(name), None, "float32")
    bare = {key.split(".", 1)[1]: tensor for key, tensor in tensors.items()}
    buffers = (
        {
            "h.0.attn.bias": np.tri(8, dtype=np.float32),
            "h.3.attn.masked_bias": np.full((), -1e4, np.float32),
        }
        if name == "gpt2"
        else {}
    )
    safetensors.numpy.save_file({**bare, **buffers}, tmp_path / "model.safetensors")
    assert_equal(load_params(tmp_path, tiny(name), None, "float32"), params)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_loaded_arrays_can_be_donated(tmp_path: Path, mesh: dict[str, int]) -> None:
    """Replicas must not share memory: a donated update in place would show on the others."""
    config = dataclasses.replace(PLAIN, vocab_size=4096)
    params = random_params(config)
    save_params(tmp_path, config, params, "float32")
    loaded = load_params(tmp_path, config, shardings(config, **mesh), "float32")
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)(
        loaded
    )
    assert_equal(doubled, jax.tree.map(lambda leaf: leaf * 2, params))


def test_types_are_converted_with_correct_rounding(tmp_path: Path) -> None:
    params = random_params(PLAIN)
    save_params(tmp_path, PLAIN, params, "float32")
    halves = load_params(tmp_path, PLAIN, None, "bfloat16")
    assert_equal(halves, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))
    save_params(tmp_path, PLAIN, halves, "bfloat16")
    singles = load_params(tmp_path, PLAIN, None, "float32")
    assert_equal(singles, jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), halves))
    save_params(tmp_path, PLAIN, halves, "float32")
    assert_equal(load_params(tmp_path, PLAIN, None, "float32"), singles)


def test_files_are_what_the_safetensors_library_reads_and_writes(tmp_path: Path) -> None:
    params = random_params(FULL, ml_dtypes.bfloat16)
    (file,) = save_params(tmp_path, FULL, params, "bfloat16")
    tensors = safetensors.numpy.load_file(file)
    assert set(tensors) == {name for row in weight_table(FULL) for name in row.names()}
    np.testing.assert_array_equal(
        tensors["model.layers.1.mlp.down_proj.weight"], params["layers"]["mlp"]["down"][1].T
    )
    np.testing.assert_array_equal(
        tensors["model.layers.2.self_attn.q_proj.weight"],
        params["layers"]["attn"]["q"][2].reshape(16, 24).T,
    )
    np.testing.assert_array_equal(
        tensors["model.layers.0.self_attn.o_proj.weight"],
        params["layers"]["attn"]["o"][0].reshape(24, 16).T,
    )
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert list(opened.offset_keys())[:2] == [
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
        ]
    other = tmp_path / "other"
    other.mkdir()
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    assert_equal(load_params(other, FULL, None, "bfloat16"), params)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "gpt_oss"])
def test_only_the_slices_of_a_device_are_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(name)
    save_params(tmp_path, config, random_params(config), "float32")
    placed = shardings(config, fsdp=8)
    sizes: list[int] = []
    monkeypatch.setattr(
        jax,
        "device_put",
        lambda piece, device, put=jax.device_put: sizes.append(piece.nbytes) or put(piece, device),
    )
    loaded = load_params(tmp_path, config, placed, "float32")
    whole = [leaf.nbytes for leaf in jax.tree.leaves(loaded) if leaf.is_fully_replicated]
    assert sum(sizes) - 8 * sum(whole) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(loaded)
    ) - sum(whole)


# ---- memory -------------------------------------------------------------------------------------


def peak_of(function: Any) -> int:
    """Bytes that Python and numpy held at most during a call, beyond what they held before it."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", [0, 1])
def test_reading_holds_one_shard_of_one_parameter(
    tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("gpt_oss", hidden_size=128, intermediate_size=256)
    random_files(tmp_path, config, form)
    placed = shardings(config, fsdp=4, tensor=2)
    copy = jax.device_put  # a piece that became a device's array is not the host's any more
    monkeypatch.setattr(
        jax, "device_put", lambda piece, device: copy(jnp.zeros(piece.shape, piece.dtype), device)
    )
    load = functools.partial(load_params, tmp_path, config, placed, "float32")
    load()  # what is compiled and cached is not counted
    largest = max(int(np.prod(row.full_shape)) * 4 for row in weight_table(config))
    one_expert = 4 * 128 * 256
    assert largest // 8 < peak_of(load) < largest // 8 + 3 * one_expert + 300_000


def test_writing_holds_one_tensor(tmp_path: Path) -> None:
    config = tiny("gpt_oss", hidden_size=128, intermediate_size=256)
    params = random_params(config)
    largest = max(int(np.prod(row.hf_shape)) * 4 for row in weight_table(config))
    assert peak_of(lambda: save_params(tmp_path, config, params, "float32")) < 2 * largest + 300_000


def test_parameters_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    params = random_params(PLAIN)
    params["extra"] = np.zeros(3)
    params["norm"]["scale"] = np.zeros(5)
    del params["layers"]["mlp"]["up"]
    with pytest.raises(ValueError) as error:
        save_params(tmp_path, PLAIN, params, "float32")
    assert "layers/mlp/up: is missing" in str(error.value)
    assert "extra: is not a parameter" in str(
        error.value
    ) and "norm/scale: has shape (5,), must have (16,)" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_real_model_loads_and_its_fingerprint_is_stable(real_data: Path) -> None:
    folder = real_data / "models" / "stories260K"
    config = load_model_config(folder)
    params = load_params(folder, config, None, "float32")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    assert (
        weights_fingerprint(folder)
        == "sha256:9faac197c1db9294620ea6cd39086a460d495977164dad4a18be39d700d744f9"
    )
