"""Adapters in PEFT: ours load there, PEFT's load here, and both compute the same logits."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.schema import LoraSection
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward, logits
from jaxdpo.models.hf.config_json import to_hf
from jaxdpo.models.hf.folder import write_json
from jaxdpo.models.hf.load_save import save_params
from jaxdpo.models.hf.lora_targets import lora_of
from jaxdpo.models.hf.peft import read_peft, write_peft
from jaxdpo.models.params import Params
from tests.families import TINY, raw_config, tiny
from tests.models.test_lora import random_adapter
from tests.tiny import params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

TOKENS = np.random.default_rng(0).integers(1, 96, (2, 14)).astype(np.int32)


def base_model(folder: Path, name: str) -> Any:
    """The tiny model with our random weights, in transformers."""
    config = tiny(name)
    folder.mkdir()
    write_json(folder / "config.json", to_hf(config, raw_config(name)))
    save_params(folder, config, params(0, config), "float32")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def ours(weights: Params, config: ModelConfig, scale: float) -> np.ndarray:
    tokens, options = jnp.asarray(TOKENS), ForwardOptions(attention="dense", lora_scale=scale)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), tokens.shape)
    return np.asarray(
        logits(
            weights,
            config,
            forward(
                weights,
                config,
                tokens,
                positions,
                jnp.zeros_like(positions),
                positions + 1,
                options,
            ),
            options,
        )
    )


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True, "targets": ["q", "v"]}, {"targets": ["o"]}], ids=str
)
@pytest.mark.parametrize("name", TINY)
def test_our_adapter_computes_the_same_in_peft(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    config, base = tiny(name), base_model(tmp_path / "base", name)
    lora = lora_of(LoraSection(**{"rank": 3, "alpha": 2.0, **options}), config)
    adapter, plain = random_adapter(config, lora, 0.1), theirs(base)
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", config, adapter, lora, base=str(tmp_path / "base"))
    got = theirs(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    wanted = ours(params(0, config) | {"lora": adapter}, config, lora.scale)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(got - plain).max() > 0.01


PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama, all": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "llama, patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 9},
        },
    ),
    "llama, by layer": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"model.layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"model.layers.0.self_attn.v_proj": 9},
        },
    ),
    "gemma3": ("gemma3", {"target_modules": "all-linear"}),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "qwen3_moe": ("qwen3_moe", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
}


@pytest.mark.parametrize("case", PEFTS)
def test_pefts_own_adapter_computes_the_same_here(tmp_path: Path, case: str) -> None:
    name, options = PEFTS[case]
    config, base = tiny(name), base_model(tmp_path / "base", name)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    ).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    found = read_peft(tmp_path / "adapter", config)
    assert found.base == str(tmp_path / "base")
    got = ours(params(0, config) | {"lora": found.adapter}, config, found.lora.scale)
    np.testing.assert_allclose(got, theirs(model), rtol=1e-4, atol=1e-4)
    assert np.abs(got - ours(params(0, config), config, 1.0)).max() > 0.01


def test_pefts_dora_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama")
    peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="DoRA"):
        read_peft(tmp_path / "adapter", tiny("llama"))
