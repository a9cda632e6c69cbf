"""Logits equal to transformers' (torch, float32), from a folder and back into one, for every family."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.export import Card, export_model
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions, Params, forward, head_weight
from jaxdpo.models.hfconfig import from_hf, load_model_config, read_config_json
from jaxdpo.models.weights import load_params
from jaxdpo.sampling import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama3 scaled, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 tied, window": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 20, "tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"head_dim": 10, "attention_bias": True}),
}


def tiny_model(name: str) -> Any:
    """A random torch model in float32, with every weight far from its neutral value."""
    model_type, changes = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 0.5 if key.endswith("bias") else 0.15)
    return model


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def our_logits(folder: Path, params: Params, tokens: np.ndarray, attention: str = "dense") -> np.ndarray:
    """Logits of plain causal rows: a slot sees all slots up to itself."""
    return np.asarray(_logits(params, jnp.asarray(tokens), config=load_model_config(folder), options=ForwardOptions(attention=attention)))


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _logits(params: Params, tokens_BT: jax.Array, config: ModelConfig, options: ForwardOptions) -> jax.Array:
    slots_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    hidden_BTD = forward(params, config, tokens_BT, slots_BT, jnp.zeros_like(slots_BT), slots_BT + 1, options)
    return jnp.einsum("BTD,VD->BTV", hidden_BTD, head_weight(params))


@pytest.mark.parametrize("attention", ["dense", "blocks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(tmp_path: Path, name: str, attention: str) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 99, (3, 150)).astype(np.int32)
    params = load_params(tmp_path, load_model_config(tmp_path), None, "float32")
    ours, theirs = our_logits(tmp_path, params, tokens, attention=attention), their_logits(model, tokens)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_folder_gives_transformers_the_same_logits(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "in")
    raw = read_config_json(tmp_path / "in")
    params = load_params(tmp_path / "in", from_hf(raw), None, "float32")
    tokens = np.random.default_rng(2).integers(0, 99, (2, 60)).astype(np.int32)
    for label, raw_config in {"with": raw, "without": None}.items():
        out = tmp_path / label
        export_model(out, from_hf(raw), params, card=Card(base_model="tiny"), raw_config=raw_config, max_shard_bytes=100_000)
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype="auto", output_loading_info=True, attn_implementation="eager"
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert again.dtype == torch.float32 and again.config.tie_word_embeddings == model.config.tie_word_embeddings
        np.testing.assert_allclose(their_logits(again, tokens), their_logits(model, tokens), atol=1e-6, rtol=0)
        assert load_model_config(out) == from_hf(raw)


def test_bfloat16_folder_is_read_exactly(tmp_path: Path) -> None:
    tiny_model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    params = load_params(tmp_path, load_model_config(tmp_path), None, "float32")
    tokens = np.random.default_rng(3).integers(0, 99, (2, 40)).astype(np.int32)
    np.testing.assert_allclose(our_logits(tmp_path, params, tokens), their_logits(model, tokens), atol=2e-5, rtol=0)


def test_stories260k_continues_as_transformers_does(real_data: Path) -> None:
    folder = real_data / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = load_model_config(folder)
    params = load_params(folder, config, None, "float32")
    model.generation_config.eos_token_id = None  # go on for 64 tokens, whatever they are
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "Lily and Ben went to the park. They saw", "The dog said")]
    theirs = [model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)[0, len(ids) :].tolist() for ids in prompts]
    ours = generate(
        params, config, [np.asarray(ids, np.int32) for ids in prompts], max_new_tokens=64, options=ForwardOptions(attention="blocks")
    )
    assert [ids.tolist() for ids in ours] == theirs


def test_exported_real_model_generates_with_tokenizer_and_template(real_data: Path, tmp_path: Path) -> None:
    source, out = real_data / "models" / "stories260K", tmp_path / "out"
    config, template = load_model_config(source), "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    params = load_params(source, config, None, "float32")
    raw = read_config_json(source)
    export_model(out, config, params, card=Card(base_model="stories"), raw_config=raw, tokenizer=source, chat_template=template)
    texts = []
    for folder in (source, out):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
        texts.append(tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)[0]))
    assert texts[0] == texts[1] and model.generation_config.eos_token_id == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"


def test_every_family_is_compared() -> None:
    assert {model_type for model_type, _ in FAMILIES.values()} == {"llama", "mistral", "qwen2", "qwen3"}
