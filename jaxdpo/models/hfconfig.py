"""A Hugging Face config.json to a ModelConfig and back.

What is not implemented is refused by name, because a feature that is silently skipped gives a model that runs and is wrong.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxdpo.models.config import ModelConfig, RopeScaling
from jaxdpo.models.families import FAMILIES, Family
from jaxdpo.models.hf_folder import read_json

_FULL, _SLIDING = "full_attention", "sliding_attention"
_REQUIRED = object()


class _Reader:
    """Reads typed values of config.json and collects every problem, so that all are told at once."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.raw = {**defaults, **raw}
        self.problems: list[str] = []

    def refuse(self, key: str, why: str) -> None:
        self.problems.append(f"{key}={json.dumps(self.raw.get(key), default=str)}: {why}")

    def _value(self, key: str, default: Any, accept: Callable[[Any], bool], wanted: str, fallback: Any) -> Any:
        value = self.raw.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if value is None:
            self.problems.append(f"{key}: is missing. It must be {wanted}")
        elif accept(value):
            return value
        else:
            self.refuse(key, f"must be {wanted}")
        return fallback

    def size(self, key: str, default: Any = None) -> int:
        return self._value(key, _REQUIRED if default is None else default, _is_size, "a whole number of at least 1", 1)

    def number(self, key: str, default: float) -> float:
        return float(self._value(key, default, _is_positive, "a number above 0", 1.0))

    def flag(self, key: str | bool) -> bool:
        return key if isinstance(key, bool) else self._value(key, False, lambda v: isinstance(v, bool), "true or false", False)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**40


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json, in the hub's form (rope_theta, rope_scaling) or transformers 5's (rope_parameters).

    Keys that do not change what the model computes are passed over; attention_dropout is one of them (training uses none).

    Raises:
        ValueError: names every key that is missing, malformed, or asks for something that is not implemented.
    """
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(name, str):
        raise ValueError(f"model_type={json.dumps(name, default=str)}: is not implemented. Implemented are: {', '.join(FAMILIES)}")
    reader = _Reader(raw, family.defaults)
    _refuse_unsupported(reader)
    heads = reader.size("num_attention_heads")
    hidden_size, num_layers = reader.size("hidden_size"), reader.size("num_hidden_layers")
    max_positions = reader.size("max_position_embeddings")
    theta, scaling = _rope(reader, max_positions)
    window = _window(reader, family, num_layers)
    config = ModelConfig(
        family=name,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=reader.size("num_key_value_heads", heads),
        head_dim=_head_dim(reader, family, hidden_size, heads),
        mlp_size=reader.size("intermediate_size"),
        max_positions=max_positions,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        window_layers=() if window is None else (True,) * num_layers,
        tied_head=reader.flag("tie_word_embeddings"),
        qkv_bias=reader.flag(family.qkv_bias),
        o_bias=reader.flag(family.o_bias),
        mlp_bias=reader.flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        initializer_range=reader.number("initializer_range", 0.02),
    )
    if config.num_heads % config.num_kv_heads:
        reader.refuse("num_key_value_heads", f"must divide num_attention_heads={heads}")
    if config.head_dim % 2:
        reader.problems.append(f"head_dim={config.head_dim}: must be even, since rope turns pairs of numbers")
    if reader.problems:
        raise ValueError("\n".join(reader.problems))
    return config


def _refuse_unsupported(reader: _Reader) -> None:
    """Keys that change the computation in ways that no supported family has."""
    raw = reader.raw
    if raw.get("hidden_act", "silu") != "silu":
        reader.refuse("hidden_act", 'only "silu" is implemented')
    if raw.get("quantization_config"):
        reader.refuse("quantization_config", "quantised weights are not implemented. Use the unquantised model")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if raw.get(key) is not None:
            reader.refuse(key, "soft-capped logits are not implemented for this model_type")
    architectures = raw.get("architectures")
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        reader.refuse("architectures", "is not a causal language model (...ForCausalLM)")


def _head_dim(reader: _Reader, family: Family, hidden_size: int, heads: int) -> int:
    if reader.raw.get("head_dim") is None and family.head_dim is None and hidden_size % heads:
        reader.refuse("hidden_size", f"is not a multiple of num_attention_heads={heads}, and head_dim is not given")
    return reader.size("head_dim", family.head_dim or max(hidden_size // heads, 1))


def _rope(reader: _Reader, max_positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either form, or both if they agree."""
    rope = _merged_rope(reader)
    inner = _Reader(rope, {})
    theta = inner.number("rope_theta", 10000.0)
    factor, partial = inner.number("factor", 1.0), rope.get("partial_rotary_factor")
    low, high = inner.number("low_freq_factor", 1.0), inner.number("high_freq_factor", 4.0)
    kind = rope.get("rope_type", "default")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling(kind="linear", factor=factor)
    elif kind == "llama3":
        missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in rope]
        inner.problems += [f"{key}: is missing; rope type llama3 needs it" for key in missing]
        if low >= high:
            inner.refuse("high_freq_factor", f"must exceed low_freq_factor={low}")
        original = inner.size("original_max_position_embeddings", max_positions)
        scaling = RopeScaling(kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_positions=original)
    elif kind != "default":
        inner.problems.append(f"rope_type={json.dumps(kind, default=str)}: is not implemented. Implemented are: default, linear, llama3")
    if partial not in (None, 1):
        inner.refuse("partial_rotary_factor", "rotary embedding of a part of each head is not implemented")
    reader.problems += [f"rope: {problem}" for problem in inner.problems]
    return theta, scaling


def _merged_rope(reader: _Reader) -> dict[str, Any]:
    """One flat dict from rope_parameters, rope_scaling and the keys beside them; a key that two of them give differently is refused."""
    raw, merged = reader.raw, {}
    beside = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None}
    for key in ("rope_parameters", "rope_scaling"):
        part = raw.get(key)
        if part is not None and not isinstance(part, dict):
            reader.refuse(key, "must be an object or null")
        elif part and any(isinstance(value, dict) for value in part.values()):
            reader.refuse(key, "rope that differs between layers is not implemented")
        elif part:
            part = {"rope_type": part.get("type", "default"), **part}
            part.pop("type", None)
            clash = [name for name in part if merged.get(name, part[name]) != part[name]]
            reader.problems += [f"{key}.{name}={part[name]}: rope_parameters.{name}={merged[name]} says otherwise" for name in clash]
            merged |= part
    clash = [name for name in beside if merged.get(name, beside[name]) != beside[name]]
    reader.problems += [f"{name}={beside[name]}: the rope parameters say {merged[name]}" for name in clash]
    return {**beside, **merged}


def _window(reader: _Reader, family: Family, num_layers: int) -> int | None:
    """The window that every layer has; a model that mixes layers with and without one is refused."""
    raw = reader.raw
    flagged = family.window == "always" or (family.window == "flag" and reader.flag("use_sliding_window"))
    window = reader.size("sliding_window") if flagged and raw.get("sliding_window") is not None else None
    full_layers = raw.get("max_window_layers", 0) if family.window == "flag" else 0
    if not isinstance(full_layers, int):
        reader.refuse("max_window_layers", "must be a whole number")
        return None
    types = raw.get("layer_types")
    if types is None:
        types = [_SLIDING if window is not None and layer >= full_layers else _FULL for layer in range(min(num_layers, 2**16))]
    if not isinstance(types, list) or not types or any(kind not in (_FULL, _SLIDING) for kind in types):
        reader.refuse("layer_types", f'must be a list of "{_FULL}" or "{_SLIDING}"; other kinds of layer are not implemented')
    elif len(set(types)) > 1:
        count = types.count(_SLIDING)
        reader.problems.append(
            f"sliding_window={window}: {count} of {len(types)} layers (layer_types, max_window_layers={full_layers}) have the window "
            "and the others not; such a mixture is not implemented"
        )
    elif types[0] == _SLIDING and window is None:
        reader.refuse(
            "layer_types", "asks for a sliding window in every layer, but none is switched on (sliding_window, use_sliding_window)"
        )
    elif types[0] == _FULL and window is not None and family.window == "always":
        reader.refuse("layer_types", f"says that no layer has a window, but sliding_window={window}. Set one of them to null")
    return window if types and types[0] == _SLIDING else None


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face folder.

    Raises:
        ValueError: the file is missing or holds something else than a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.path={folder}: has no config.json. Name a Hugging Face model folder")
    return read_json(path)


def load_model_config(folder: Path) -> ModelConfig:
    """ModelConfig of the Hugging Face folder `folder`.

    Raises:
        ValueError: as `read_config_json` and `from_hf`, with the folder named.
    """
    raw = read_config_json(folder)
    try:
        return from_hf(raw)
    except ValueError as error:
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        raise ValueError(f"model.path={folder}: its config.json cannot be used:\n{lines}") from None


def to_hf(config: ModelConfig, raw: Mapping[str, Any] | None = None, *, dtype: str = "float32") -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read, for weights stored as `dtype`.

    Args:
        config: the model.
        raw: the config.json that the model came from; keys that say nothing about its computation are kept from it.
        dtype: "float32", "bfloat16" or "float16"; written under the old and the new name.
    """
    family = FAMILIES[config.family]
    theta, scaling = config.rope_theta, _scaling_to_hf(config.rope_scaling)
    values = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.initializer_range,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    flags = {"qkv_bias": config.qkv_bias, "o_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    values |= {key: flags[field] for field in flags if isinstance(key := getattr(family, field), str)}
    kept = {key: value for key, value in (raw or {}).items() if key != "_name_or_path"}  # a path on the machine that wrote it
    return {**kept, **values, **_window_to_hf(config, family)}


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _window_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.window == "never":
        return {}
    values: dict[str, Any] = {"sliding_window": config.sliding_window}
    if family.window == "flag":
        values |= {"use_sliding_window": config.sliding_window is not None}
        values |= {"max_window_layers": 0 if config.sliding_window else config.num_layers}
        values |= {"layer_types": [_SLIDING if config.sliding_window else _FULL] * config.num_layers}
    return values
