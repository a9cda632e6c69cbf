"""A Hugging Face config.json to a ModelConfig and back.

What is not implemented is refused by name, because a feature that is silently skipped gives a model that runs and is wrong.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.families import FAMILIES, Family
from jaxdpo.models.hf.folder import read_json
from jaxdpo.models.hf.json_reader import REQUIRED, Reader, shown
from jaxdpo.models.hf.rope import read_rope, rope_to_hf

_FULL, _SLIDING = "full_attention", "sliding_attention"
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_MAX_LAYERS = 2**14
_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
_MAY_BE_ZERO = ("router_aux_coef",)


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json, in the hub's form (rope_theta, rope_scaling) or transformers 5's (rope_parameters).

    Keys that do not change what the model computes are passed over; attention_dropout is one of them (training uses none).

    Raises:
        ValueError: names every key that is missing, malformed, or asks for something that is not implemented.
    """
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(
            f"model_type={shown(name)}: is not implemented. Implemented are: {', '.join(FAMILIES)}"
        )
    reader = _reader(raw, family)
    _refuse_unsupported(reader, family)
    values = {
        "family": name,
        **family.fixed,
        "activation": _activation(reader, family),
        **_plain_values(reader, family),
    }
    values |= read_rope(reader, family, values["head_dim"], values["max_positions"])
    window, layers = _windows(reader, family, min(values["num_layers"], _MAX_LAYERS))
    values |= {"sliding_window": window, "window_layers": layers}
    if family.scalar_key:
        values["attention_scale"] = reader.size(family.scalar_key) ** -0.5
    if family.scaled_embedding:
        values["embed_scale"] = values["hidden_size"] ** 0.5
    config = ModelConfig(**values)
    _refuse_contradictions(reader, family, config)
    if reader.problems:
        raise ValueError("\n".join(dict.fromkeys(reader.problems)))
    return config


def _reader(raw: Mapping[str, Any], family: Family) -> Reader:
    """A reader that finds keys also under their second names."""
    named = {
        key: raw[other] for key, other in family.other_names.items() if raw.get(other) is not None
    }
    reader = Reader({**named, **raw}, family.defaults)
    for key in named:
        if reader.raw[key] != named[key]:
            reader.refuse(key, f"{family.other_names[key]}={shown(named[key])} says otherwise")
    return reader


def _plain_values(reader: Reader, family: Family) -> dict[str, Any]:
    """The ModelConfig fields that are one key of config.json each, and those that follow from them when there is none."""
    keys = family.all_keys()
    heads, hidden_size = (reader.size(keys[field]) for field in ("num_heads", "hidden_size"))
    usual = {"num_kv_heads": heads, "head_dim": max(hidden_size // heads, 1)}
    if family.mlp_ratio:
        usual["mlp_size"] = family.mlp_ratio * hidden_size
    return usual | {field: _plain_value(reader, field, key, usual) for field, key in keys.items()}


def _plain_value(reader: Reader, field: str, key: str, usual: Mapping[str, Any]) -> Any:
    default = usual.get(field, _FIELDS[field].default)
    default = REQUIRED if default is dataclasses.MISSING else default
    read = {
        int: reader.size,
        float: reader.number,
        bool: reader.flag,
        float | None: reader.optional,
    }[_FIELDS[field].type]
    return (reader.weight if field in _MAY_BE_ZERO else read)(key, default)


def _activation(reader: Reader, family: Family) -> str:
    key, names = family.activation_key, list(family.activations)
    value = reader.raw.get(key) or names[0]
    if value not in names:
        reader.refuse(
            key, f"only {' or '.join(map(shown, names))} is implemented for this model_type"
        )
    return family.activations.get(
        value if isinstance(value, str) else "", family.activations[names[0]]
    )


def _refuse_unsupported(reader: Reader, family: Family) -> None:
    """Keys that ask for a computation that is not implemented."""
    raw = reader.raw
    for key, value in family.only.items():
        if raw.get(key) not in (None, value):
            reader.refuse(key, f"only {shown(value)} is implemented")
    for key in _SOFTCAPS:
        if raw.get(key) is not None and key not in family.all_keys().values():
            reader.refuse(key, "soft-capped logits are not implemented for this model_type")
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if quantization and method not in family.quantizations:
        reader.refuse(
            "quantization_config",
            "quantised weights of this kind are not implemented. Use the unquantised model",
        )
    architectures = raw.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [architectures]
    if names and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        reader.refuse("architectures", "is not a causal language model (...ForCausalLM)")


def _refuse_contradictions(reader: Reader, family: Family, config: ModelConfig) -> None:
    """Sizes that do not fit each other."""
    keys = family.all_keys()
    if config.num_heads % config.num_kv_heads:
        reader.refuse(keys["num_kv_heads"], f"must divide {keys['num_heads']}={config.num_heads}")
    if config.hidden_size % config.num_heads and reader.raw.get("head_dim") is None:
        reader.refuse(
            keys["hidden_size"],
            f"is not a multiple of {keys['num_heads']}={config.num_heads}, and head_dim is not given",
        )
    if config.positions == "rope" and config.head_dim % 2:
        reader.problems.append(
            f"head_dim={config.head_dim}: must be even, since rope turns pairs of numbers"
        )
    if config.num_layers > _MAX_LAYERS:
        reader.refuse(keys["num_layers"], f"must be at most {_MAX_LAYERS}")
    if "num_experts" in keys and not 1 <= config.experts_per_token <= config.num_experts:
        reader.refuse(
            keys["experts_per_token"],
            f"must be at least 1 and at most {keys['num_experts']}={config.num_experts}",
        )


# ---- sliding windows ----------------------------------------------------------------------------------------------------------


def _windows(
    reader: Reader, family: Family, num_layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """(the window, which layers have it); a window that no layer has is None."""
    on = family.window == "always" or (
        family.window == "flag" and reader.flag("use_sliding_window")
    )
    window = (
        reader.size("sliding_window")
        if on and reader.raw.get("sliding_window") is not None
        else None
    )
    usual = _usual_windows(reader, family, window is not None, num_layers)
    kinds = reader.raw.get("layer_types")
    layers = (
        usual
        if kinds is None
        else [kind == _SLIDING for kind in kinds]
        if isinstance(kinds, list)
        else []
    )
    if kinds is not None and (
        len(layers) != num_layers or any(kind not in (_FULL, _SLIDING) for kind in kinds)
    ):
        reader.refuse(
            "layer_types",
            f'must name {num_layers} layers "{_FULL}" or "{_SLIDING}"; other kinds are not implemented',
        )
    elif any(layers) and window is None:
        reader.refuse(
            "sliding_window",
            f"{sum(layers)} layers have a window (layer_types), but none is switched on",
        )
    elif layers != usual and not family.mixed_windows:
        reader.refuse(
            "layer_types",
            f"this model_type has one kind of layer, and sliding_window={window}. Leave layer_types out",
        )
    return (window, tuple(layers)) if any(layers) else (None, ())


def _usual_windows(reader: Reader, family: Family, window: bool, num_layers: int) -> list[bool]:
    """Which layers have the window when config.json does not list them."""
    if family.window_period is not None:
        period = (
            reader.size(family.period_key, family.window_period)
            if family.period_key
            else family.window_period
        )
        return _periodic(period, num_layers)
    first = reader.raw.get("max_window_layers", 0) if family.mixed_windows else 0
    if not isinstance(first, int):
        reader.refuse("max_window_layers", "must be a whole number")
        first = 0
    return [window and layer >= first for layer in range(num_layers)]


def _periodic(period: int, num_layers: int) -> list[bool]:
    """All layers but the last of each period."""
    return [bool((layer + 1) % period) for layer in range(num_layers)]


def _windows_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.window == "never":
        return {}
    values: dict[str, Any] = {"sliding_window": config.sliding_window}
    layers = config.window_layers or (False,) * config.num_layers
    if family.window == "flag":
        values |= {"use_sliding_window": config.sliding_window is not None}
    if family.mixed_windows:
        values |= {"layer_types": [_SLIDING if layer else _FULL for layer in layers]}
    if family.mixed_windows and family.window == "flag":  # for readers that do not know layer_types
        values |= {"max_window_layers": layers.index(True) if True in layers else config.num_layers}
    period = layers.index(False) + 1 if False in layers else config.num_layers + 1
    if family.period_key and layers == tuple(_periodic(period, config.num_layers)):
        values |= {family.period_key: period}
    if family.window == "always" and family.mixed_windows and config.sliding_window is None:
        del values["sliding_window"]  # transformers wants a number although no layer uses it
    return values


# ---- files --------------------------------------------------------------------------------------------------------------------


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face folder.

    Raises:
        ValueError: the file is missing or holds something else than a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.path={folder}: has no config.json. Name a Hugging Face model folder"
        )
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


def to_hf(
    config: ModelConfig, raw: Mapping[str, Any] | None = None, *, dtype: str = "float32"
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read, for unquantised weights stored as `dtype`.

    Args:
        config: the model.
        raw: the config.json that the model came from; keys that say nothing about its computation are kept from it. Without it the
            model has no special tokens, instead of those that transformers takes for granted.
        dtype: "float32", "bfloat16" or "float16"; written under the old and the new name.
    """
    family, raw = (
        FAMILIES[config.family],
        raw or dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    values = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **{key: getattr(config, field) for field, key in family.all_keys().items()},
        family.activation_key: next(iter(family.activations)),
        **_windows_to_hf(config, family),
        **rope_to_hf(config, family, raw.get("max_position_embeddings")),
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    values |= {other: values[key] for key, other in family.other_names.items()}
    if family.scalar_key and config.attention_scale:
        values[family.scalar_key] = round(config.attention_scale**-2)
    dropped = (
        "_name_or_path",
        "auto_map",
        "quantization_config",
    )  # a path elsewhere, code that is not there, what the weights are no more
    return {**{key: value for key, value in raw.items() if key not in dropped}, **values}
