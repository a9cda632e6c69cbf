"""Rotary positions in config.json, in the hub's form (rope_theta, rope_scaling) and transformers 5's (rope_parameters)."""

import math
from collections.abc import Mapping
from typing import Any

from jaxdpo.models.config import ModelConfig, RopeScaling
from jaxdpo.models.hf.families import Family
from jaxdpo.models.hf.json_reader import Reader, shown

_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
_BESIDE = ("rope_theta", "partial_rotary_factor", _ORIGINAL)
"""Keys that may stand beside the rope parameters instead of among them."""


def read_rope(reader: Reader, family: Family, head_dim: int, max_positions: int) -> dict[str, Any]:
    """The ModelConfig fields that rope sets, read from either form, or both if they agree.

    `max_positions` is one of them: of longrope only the short factors are implemented, which hold within the original context.
    """
    if not family.rope_kinds:
        return {"max_positions": max_positions}
    rope, local = _merged(reader, family)
    inner = Reader(rope, {key: family.defaults[key] for key in _BESIDE if key in family.defaults})
    fraction = inner.number("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * fraction)
    if fraction != 1 and not family.partial_rope:
        inner.refuse(
            "partial_rotary_factor",
            "rope on a part of each head is not implemented for this model_type",
        )
    elif rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        inner.refuse(
            "partial_rotary_factor",
            f"turns {rotary_dim} of {head_dim} numbers, must be an even part of them",
        )
    scaling = _scaling(inner, family, rotary_dim, max_positions)
    fields = {
        "rope_theta": inner.number("rope_theta", _THETA),
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "local_rope_theta": _local_theta(reader, local) if family.local_rope else None,
        "max_positions": min(max_positions, scaling.original_max_positions)
        if scaling and scaling.kind == "longrope"
        else max_positions,
    }
    reader.problems += [f"rope: {problem}" for problem in inner.problems]
    return fields


def _merged(reader: Reader, family: Family) -> tuple[dict[str, Any], dict[str, Any]]:
    """(rope, rope of layers with a window), each one flat dict; what two places say differently is refused."""
    rope: dict[str, Any] = {}
    parameters, local = _split(reader, family)
    for key, part in (
        ("rope_parameters", parameters),
        ("rope_scaling", reader.given.get("rope_scaling")),
    ):
        if part is not None and not isinstance(part, dict):
            reader.refuse(key, "must be an object or null")
        elif part:
            part = _with_kind(part, family)
            clash = [name for name in part if rope.get(name, part[name]) != part[name]]
            reader.problems += [
                f"{key}.{name}={shown(part[name])}: rope_parameters.{name}={shown(rope[name])} says otherwise"
                for name in clash
            ]
            rope |= part
    rope = rope or dict(family.rope_default)
    beside = {key: reader.given[key] for key in _BESIDE if reader.given.get(key) is not None}
    clash = [key for key in beside if rope.get(key, beside[key]) != beside[key]]
    reader.problems += [
        f"{key}={beside[key]}: the rope parameters say {rope[key]}" for key in clash
    ]
    return {**beside, **rope}, local


def _split(reader: Reader, family: Family) -> tuple[Any, dict[str, Any]]:
    """rope_parameters of all layers, and of those with a window where a family tells them apart."""
    given = reader.given.get("rope_parameters")
    nested = isinstance(given, dict) and any(isinstance(value, dict) for value in given.values())
    if not isinstance(given, dict) or not given or not (nested or family.local_rope):
        return given, {}
    if not family.local_rope:
        reader.refuse(
            "rope_parameters",
            "rope that differs between layers is not implemented for this model_type",
        )
        return None, {}
    if not nested or not all(isinstance(part, dict | None) for part in given.values()):
        reader.refuse("rope_parameters", "must hold objects: full_attention and sliding_attention")
        return None, {}
    return given.get("full_attention"), _with_kind(given.get("sliding_attention") or {}, family)


def _with_kind(part: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Rope parameters with their kind as rope_type, whatever it was called."""
    kind = part.get("rope_type", part.get("type", "default"))
    kind = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
    return {**{key: value for key, value in part.items() if key != "type"}, "rope_type": kind}


def _local_theta(reader: Reader, local: Mapping[str, Any]) -> float:
    """rope_theta of the layers with a window."""
    kind = local.get("rope_type", "default")
    if kind != "default":
        reader.problems.append(
            f"rope_parameters.sliding_attention.rope_type={shown(kind)}: only default is implemented there"
        )
    given, inside = reader.given.get("rope_local_base_freq"), local.get("rope_theta")
    if None not in (given, inside) and given != inside:
        reader.problems.append(
            f"rope_local_base_freq={given}: rope_parameters.sliding_attention.rope_theta={inside} says otherwise"
        )
    theta = Reader(
        {
            "rope_local_base_freq": reader.raw.get("rope_local_base_freq")
            if inside is None
            else inside
        },
        {},
    )
    value = theta.number("rope_local_base_freq", _THETA)
    reader.problems += theta.problems
    return value


# ---- scaling ------------------------------------------------------------------------------------------------------------------


def _scaling(
    rope: Reader, family: Family, rotary_dim: int, max_positions: int
) -> RopeScaling | None:
    kind = rope.raw.get("rope_type", "default")
    if kind not in family.rope_kinds:
        implemented = ", ".join(family.rope_kinds)
        rope.problems.append(
            f"rope_type={shown(kind)}: is not implemented for this model_type. Implemented are: {implemented}"
        )
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope.number("factor"))
    if kind == "llama3":
        return _llama3(rope, max_positions)
    if kind == "yarn":
        return _yarn(rope, max_positions)
    return _longrope(rope, rotary_dim, max_positions) if kind == "longrope" else None


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
    scale, scale_all = rope.optional("mscale"), rope.optional("mscale_all_dim")
    ratio = (
        _yarn_attention(factor, scale) / _yarn_attention(factor, scale_all)
        if scale and scale_all
        else _yarn_attention(factor)
    )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=rope.size(_ORIGINAL, max_positions),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", ratio),
    )


def _yarn_attention(factor: float, scale: float = 1.0) -> float:
    """What multiplies cosines and sines (2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Reader, rotary_dim: int, max_positions: int) -> RopeScaling:
    original = rope.size(_ORIGINAL, max_positions)
    factor = rope.number("factor", max_positions / original)
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", _longrope_attention(factor, original)),
        short_factor=rope.numbers("short_factor", rotary_dim // 2),
        long_factor=rope.numbers("long_factor", rotary_dim // 2),
    )


def _longrope_attention(factor: float, original: int) -> float:
    """What multiplies cosines and sines (2402.13753, section 3.2)."""
    return (
        math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    )


# ---- writing ------------------------------------------------------------------------------------------------------------------


def rope_to_hf(config: ModelConfig, family: Family, max_positions: int | None) -> dict[str, Any]:
    """The keys of config.json that tell rope, in both forms.

    Args:
        config: the model.
        family: its family.
        max_positions: what config.json said, where ModelConfig holds only the original context.
    """
    if not family.rope_kinds:
        return {}
    long = config.rope_scaling is not None and config.rope_scaling.kind == "longrope"
    values = (
        _longrope_to_hf(config, config.rope_scaling, max_positions)
        if long and config.rope_scaling
        else {}
    )
    scaling = _scaling_to_hf(config.rope_scaling)
    parameters: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        **(scaling or {"rope_type": "default"}),
    }
    if family.partial_rope:
        values["partial_rotary_factor"] = parameters["partial_rotary_factor"] = (
            config.rotary_fraction
        )
    if family.local_rope:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        values["rope_local_base_freq"] = config.local_rope_theta
        parameters = {"full_attention": parameters, "sliding_attention": local}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        **values,
    }


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return {**values, "type": "linear"}  # the name that old readers look for
    values[_ORIGINAL] = scaling.original_max_positions
    if scaling.kind == "llama3":
        return {
            **values,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "longrope":
        factors = {
            "short_factor": list(scaling.short_factor),
            "long_factor": list(scaling.long_factor),
        }
        return {**values, **factors, "attention_factor": scaling.attention_factor}
    values |= {
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }
    usual = scaling.attention_factor == _yarn_attention(scaling.factor)
    return values if usual else {**values, "attention_factor": scaling.attention_factor}


def _longrope_to_hf(
    config: ModelConfig, scaling: RopeScaling, max_positions: int | None
) -> dict[str, Any]:
    """The whole context, and rope_scaling with the three keys that transformers 4 insists on."""
    original = scaling.original_max_positions
    context = max_positions or max(config.max_positions, round(original * scaling.factor))
    short: dict[str, Any] = {
        "type": "longrope",
        "short_factor": list(scaling.short_factor),
        "long_factor": list(scaling.long_factor),
    }
    if scaling.attention_factor != _longrope_attention(context / original, original):
        short["attention_factor"] = scaling.attention_factor
    return {"max_position_embeddings": context, _ORIGINAL: original, "rope_scaling": short}
