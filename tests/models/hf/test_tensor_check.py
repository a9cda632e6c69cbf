"""Files whose tensors are not the model's are refused, with every difference listed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jaxdpo.models.hf.load_save import load_params, save_params
from jaxdpo.models.hf.tensor_check import fold_names
from tests.models.hf.test_load_save import PLAIN, TIED, assert_equal, random_params


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
    with pytest.raises(
        ValueError,
        match=r"lm_head\.weight: differs from model\.embed_tokens\.weight, although "
        "tie_word_embeddings=true",
    ):
        load_params(tmp_path, TIED, None, "float32")


def test_every_difference_is_listed_at_once_with_layers_folded(tmp_path: Path) -> None:
    save_params(tmp_path, TIED, random_params(TIED), "float32")
    wider = dataclasses.replace(PLAIN, mlp_size=32)
    with pytest.raises(ValueError) as error:
        load_params(tmp_path, wider, None, "float32")
    told = str(error.value)
    assert "missing: lm_head.weight" in told
    assert "not a tensor of this model: model.layers.{0-2}.self_attn.k_proj.bias" in told
    assert "model.layers.1.mlp.up_proj.weight: has shape [24, 16], must have [32, 16]" in told


def test_fold_names() -> None:
    names = [f"model.layers.{layer}.a" for layer in (0, 1, 2, 5)] + [
        "model.layers.3.b",
        "c",
        "layers.x.d",
        "layers.99999999999999.e",
    ]
    assert fold_names(names) == [
        "model.layers.{0-2,5}.a",
        "model.layers.3.b",
        "c",
        "layers.x.d",
        "layers.99999999999999.e",
    ]
    names = [f"layers.{layer}.experts.{expert}.w1" for layer in range(2) for expert in range(8)]
    assert fold_names([*names, "h.3.ln", "h.4.ln"]) == [
        "layers.{0-1}.experts.{0-7}.w1",
        "h.{3-4}.ln",
    ]
