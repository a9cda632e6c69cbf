"""Tiny models of every family in transformers, with weights that make every part matter."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.config_json import from_hf, load_model_config
from jaxdpo.models.hf.folder import write_json
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.params import Params
from tests.families import TINY, raw_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# These models are too small for more, and waiting threads take turns with other tests.
torch.set_num_threads(1)

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama tied, llama3 rope": (
        "llama",
        {"tie_word_embeddings": True, "rope_theta": 500.0, "rope_scaling": _LLAMA3},
    ),
    "llama, linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    "mistral without window": ("mistral", {"sliding_window": None, "rope_theta": 1e6}),
    "qwen2 without window": ("qwen2", {"use_sliding_window": False, "rope_theta": 1e6}),
    "qwen3 with biases": (
        "qwen3",
        {"attention_bias": True, "tie_word_embeddings": True, "rope_scaling": _YARN},
    ),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0}),
    "gemma3 without window": ("gemma3", {"layer_types": ["full_attention"] * 4}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.75}),
    "phi3 long": (
        "phi3 long",
        {"original_max_position_embeddings": 112, "max_position_embeddings": 512},
    ),
    "qwen3_moe, plain weights": (
        "qwen3_moe",
        {"norm_topk_prob": False, "num_experts": 5, "num_experts_per_tok": 3},
    ),
    "gpt_oss": ("gpt_oss", {"swiglu_limit": 1.5}),
}
"""Name -> key of families.TINY and changes to it."""


@dataclasses.dataclass(frozen=True)
class Both:
    """One model on both sides."""

    folder: Path
    """Where transformers saved it, its config.json in transformers' form."""
    raw: dict[str, Any]
    """The config.json in the hub's form, from which it was made."""
    config: ModelConfig
    params: Params
    model: Any

    def logits(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What transformers computes of each row of ids alone: float32 [T, V]."""
        return logits_of(self.model, rows)


def padded(rows: Sequence[np.ndarray]) -> tuple[Any, Any]:
    """Rows of ids as int64 tensors [B, T], padded behind, and which of them are real."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def logits_of(model: Any, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits float32 [T, V] of each row; causal attention never sees the padding."""
    with torch.no_grad():
        batch = model(padded(rows)[0]).logits.numpy()
    return [logits[: len(row)] for logits, row in zip(batch, rows, strict=True)]


def read(folder: Path, **more: Any) -> Any:
    """The model in a folder, as transformers reads it (ready for evaluation)."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **more
    )


def raw_of(case: str) -> dict[str, Any]:
    """config.json of a case, in the hub's form."""
    name, changes = CASES[case]
    return raw_config(name, **changes)


def make(folder: Path, case: str) -> Both:
    """A random model, made and saved by transformers from a hub config.json, and read by us."""
    raw = raw_of(case)
    (folder / "hub").mkdir()
    write_json(folder / "hub" / "config.json", raw)
    kind = transformers.AutoConfig.from_pretrained(folder / "hub")
    model = transformers.AutoModelForCausalLM.from_config(
        kind, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = from_hf(raw)
    _randomise(model, config)
    model.save_pretrained(folder / "saved")
    assert load_model_config(folder / "saved") == config, (
        "the hub's form and transformers' own say different things"
    )
    return Both(
        folder / "saved", raw, config, load_params(folder / "saved", config, None, "float32"), model
    )


def _randomise(model: Any, config: ModelConfig) -> None:
    centre = 0.0 if config.norm == "rms_offset" else 1.0
    torch.manual_seed(1)  # with 0, a Mixtral token has two experts that are equal but for rounding
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                weight.normal_(0, 0.3)
            elif name in ("model.norm.weight", "transformer.ln_f.weight"):
                weight.normal_(
                    centre - 1, 1
                )  # signs of both kinds, lest a tied head repeats the last token for ever
            elif "norm" in name or ".ln_" in name:
                weight.uniform_(centre - 0.5, centre + 0.5)
            else:
                weight.normal_(0, 0.25)
