"""Rotary position embedding (rope) and rope scaling in config.json.

Two forms are read and written: the hub's (rope_theta, rope_scaling) and transformers 5's
(rope_parameters).
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxdpo.models.config import ModelConfig, RopeScaling
from jaxdpo.models.hf.families import Family
from jaxdpo.models.hf.json_reader import Reader, shown

_THETA = 10000.0
"""transformers' default, and that of RoFormer (2104.09864)."""
_ORIGINAL = "original_max_position_embeddings"
_OUTSIDE = ("rope_theta", "partial_rotary_factor", _ORIGINAL)
"""Keys that may be at the top level of config.json instead of among the rope parameters."""


# ---- reading ------------------------------------------------------------------------------------


def read_rope(reader: Reader, family: Family, head_dim: int, max_positions: int) -> dict[str, Any]:
    """The ModelConfig fields that rope sets, read from either form, or from both if they agree.

    `max_positions` is one of them: of longrope only the short factors are implemented, which hold
    within the original context.
    """
    if not family.rope_kinds:
        return {"max_positions": max_positions}
    parameters, local = _merged(reader, family)
    defaults = {key: family.defaults[key] for key in _OUTSIDE if key in family.defaults}
    rope = Reader(parameters, defaults)
    fraction = rope.number("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * fraction)
    if fraction != 1 and not family.partial_rope:
        rope.refuse(
            "partial_rotary_factor",
            "rope on a part of each head is not implemented for this model_type",
        )
    elif rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        rope.refuse(
            "partial_rotary_factor",
            f"rotates {rotary_dim} of {head_dim} dimensions, must be an even part of them",
        )
    scaling = _scaling(rope, family, rotary_dim, max_positions)
    if scaling and scaling.kind == "longrope":
        max_positions = min(max_positions, scaling.original_max_positions)
    fields = {
        "rope_theta": rope.number("rope_theta", _THETA),
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "local_rope_theta": _local_theta(reader, local) if family.local_rope else None,
        "max_positions": max_positions,
    }
    reader.problems += [f"rope: {problem}" for problem in rope.problems]
    return fields


def _merged(reader: Reader, family: Family) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rope parameters, and those of the layers with a sliding window, each as one flat dict.

    Where two keys of config.json contradict each other, both values are refused: transformers 4 and
    5 let different ones win.
    """
    rope: dict[str, Any] = {}
    parameters, local = _by_layer_type(reader, family)
    parts = {
        "rope_parameters": parameters,
        "rope_scaling": reader.given.get("rope_scaling"),
    }
    for key, part in parts.items():
        if part is not None and not isinstance(part, dict):
            reader.refuse(key, "must be an object or null")
        elif part:
            part = _with_rope_type(part, family)
            for name, value in part.items():
                if rope.get(name, value) != value:
                    reader.problems.append(
                        f"{key}.{name}={shown(value)}: "
                        f"rope_parameters.{name}={shown(rope[name])} says otherwise"
                    )
            rope |= part
    if not rope:
        rope = dict(family.rope_default)
    for key in _OUTSIDE:
        value = reader.given.get(key)
        if value is None:
            continue
        if rope.setdefault(key, value) != value:
            reader.problems.append(f"{key}={value}: the rope parameters say {rope[key]}")
    return rope, local


def _by_layer_type(reader: Reader, family: Family) -> tuple[Any, dict[str, Any]]:
    """rope_parameters of layers with full attention, and of those with a sliding window."""
    given = reader.given.get("rope_parameters")
    if not isinstance(given, dict) or not given:
        return given, {}
    nested = any(isinstance(value, dict) for value in given.values())
    if not family.local_rope:
        if not nested:
            return given, {}
        reader.refuse(
            "rope_parameters",
            "rope that differs between layers is not implemented for this model_type",
        )
        return None, {}
    if not nested or not all(isinstance(part, dict | None) for part in given.values()):
        reader.refuse("rope_parameters", "must hold objects: full_attention and sliding_attention")
        return None, {}
    local = _with_rope_type(given.get("sliding_attention") or {}, family)
    return given.get("full_attention"), local


def _with_rope_type(part: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Rope parameters with their kind under rope_type, whatever key and alias it had."""
    kind = part.get("rope_type", part.get("type", "default"))
    if isinstance(kind, str):
        kind = family.rope_aliases.get(kind, kind)
    renamed = {key: value for key, value in part.items() if key != "type"}
    renamed["rope_type"] = kind
    return renamed


def _local_theta(reader: Reader, local: Mapping[str, Any]) -> float:
    """rope_theta of the layers with a sliding window."""
    kind = local.get("rope_type", "default")
    if kind != "default":
        reader.problems.append(
            f"rope_parameters.sliding_attention.rope_type={shown(kind)}: "
            "only default is implemented there"
        )
    given, nested = reader.given.get("rope_local_base_freq"), local.get("rope_theta")
    if None not in (given, nested) and given != nested:
        reader.problems.append(
            f"rope_local_base_freq={given}: "
            f"rope_parameters.sliding_attention.rope_theta={nested} says otherwise"
        )
    if nested is None:
        nested = reader.raw.get("rope_local_base_freq")
    theta = Reader({"rope_local_base_freq": nested}, {})
    value = theta.number("rope_local_base_freq", _THETA)
    reader.problems += theta.problems
    return value


# ---- rope scaling -------------------------------------------------------------------------------


def _scaling(
    rope: Reader, family: Family, rotary_dim: int, max_positions: int
) -> RopeScaling | None:
    kind = rope.raw.get("rope_type", "default")
    if kind not in family.rope_kinds:
        rope.problems.append(
            f"rope_type={shown(kind)}: is not implemented for this model_type. "
            f"Implemented are: {', '.join(family.rope_kinds)}"
        )
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope.number("factor"))
    if kind == "llama3":
        return _llama3(rope, max_positions)
    if kind == "yarn":
        return _yarn(rope, max_positions)
    if kind == "longrope":
        return _longrope(rope, rotary_dim, max_positions)
    return None


def _llama3(rope: Reader, max_positions: int) -> RopeScaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high and {"low_freq_factor", "high_freq_factor"} <= rope.given.keys():
        rope.refuse("high_freq_factor", f"must exceed low_freq_factor={low}")
    return RopeScaling(
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=rope.size(_ORIGINAL, max_positions),
    )


def _yarn(rope: Reader, max_positions: int) -> RopeScaling:
    factor = rope.number("factor")
    # DeepSeek's configs have a pair of scales instead of attention_factor; transformers takes the
    # ratio
    scale, scale_all = rope.optional("mscale"), rope.optional("mscale_all_dim")
    attention_factor = _yarn_attention_factor(factor)
    if scale and scale_all:
        attention_factor = _yarn_attention_factor(factor, scale)
        attention_factor /= _yarn_attention_factor(factor, scale_all)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=rope.size(_ORIGINAL, max_positions),
        beta_fast=rope.number("beta_fast", 32.0),  # the paper's values for Llama, and transformers'
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", attention_factor),
    )


def _yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """What cosines and sines are multiplied by (2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Reader, rotary_dim: int, max_positions: int) -> RopeScaling:
    original = rope.size(_ORIGINAL, max_positions)
    factor = rope.number("factor", max_positions / original)
    attention_factor = _longrope_attention_factor(factor, original)
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", attention_factor),
        short_factor=rope.numbers("short_factor", rotary_dim // 2),
        long_factor=rope.numbers("long_factor", rotary_dim // 2),
    )


def _longrope_attention_factor(factor: float, original: int) -> float:
    """What cosines and sines are multiplied by (2402.13753, section 3.2)."""
    if factor <= 1 or original <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


# ---- writing ------------------------------------------------------------------------------------


def rope_to_hf(config: ModelConfig, family: Family, max_positions: int | None) -> dict[str, Any]:
    """The rope keys of config.json, in both forms.

    Args:
        config: the model.
        family: its family.
        max_positions: what config.json said, where ModelConfig has the original context only.
    """
    if not family.rope_kinds:
        return {}
    scaling = config.rope_scaling
    scaling_values = _scaling_to_hf(scaling)
    parameters: dict[str, Any] = {"rope_theta": config.rope_theta}
    parameters |= scaling_values or {"rope_type": "default"}
    values: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": scaling_values}
    if scaling is not None and scaling.kind == "longrope":
        values |= _longrope_to_hf(config, scaling, max_positions)
    if family.partial_rope:
        values["partial_rotary_factor"] = config.rotary_fraction
        parameters["partial_rotary_factor"] = config.rotary_fraction
    if family.local_rope:
        values["rope_local_base_freq"] = config.local_rope_theta
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    values["rope_parameters"] = parameters
    return values


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        values["type"] = "linear"  # the key that old versions of transformers read
        return values
    values[_ORIGINAL] = scaling.original_max_positions
    if scaling.kind == "llama3":
        values["low_freq_factor"] = scaling.low_freq_factor
        values["high_freq_factor"] = scaling.high_freq_factor
    elif scaling.kind == "longrope":
        values["short_factor"] = list(scaling.short_factor)
        values["long_factor"] = list(scaling.long_factor)
        values["attention_factor"] = scaling.attention_factor
    else:
        values["beta_fast"] = scaling.beta_fast
        values["beta_slow"] = scaling.beta_slow
        values["truncate"] = scaling.truncate
        if scaling.attention_factor != _yarn_attention_factor(scaling.factor):
            values["attention_factor"] = scaling.attention_factor
    return values


def _longrope_to_hf(
    config: ModelConfig, scaling: RopeScaling, max_positions: int | None
) -> dict[str, Any]:
    """The full context, and rope_scaling with the three keys that transformers 4 insists on."""
    original = scaling.original_max_positions
    context = max_positions or max(config.max_positions, round(original * scaling.factor))
    short: dict[str, Any] = {
        "type": "longrope",
        "short_factor": list(scaling.short_factor),
        "long_factor": list(scaling.long_factor),
    }
    if scaling.attention_factor != _longrope_attention_factor(context / original, original):
        short["attention_factor"] = scaling.attention_factor
    return {"max_position_embeddings": context, _ORIGINAL: original, "rope_scaling": short}
