"""A Hugging Face config.json to a ModelConfig and back.

What is not implemented is refused by name, because a feature that is silently ignored gives a model
that runs and is wrong.

Not transformers' AutoConfig behind our refusals, because they need the raw keys all the same: in
5.24 a llama without vocab_size and hidden_size becomes a 7B, rope_theta=5 beside
rope_parameters.rope_theta=7 becomes 7, rope_type="foo" and factor="x" are lines in the log, and
num_hidden_layers=10**9 builds a list of that length. Of the 68 configs that our tests refuse it
accepts 44, and stops at the first problem of the others, with five types of exception. Phi-3's
first config.json (rope_scaling.type "su") is a KeyError. It could replace the defaults and the
sliding window patterns, about 80 lines, which would then change with the installed version.
Instead, tests compare ours with transformers: its configs in test_config_json.py, its models in
test_parity.py.
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
"""Far above any model (the deepest has a few hundred): lists of one entry a layer stay small."""
_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
_MAY_BE_ZERO = ("router_aux_coef",)
_NOT_COPIED = (
    "_name_or_path",  # a path on another machine
    "auto_map",  # names Python files that an export does not have
    "quantization_config",  # weights are written unquantized
)
_NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


# ---- reading ------------------------------------------------------------------------------------


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json.

    Both forms are read: the hub's (rope_theta, rope_scaling) and transformers 5's
    (rope_parameters). Keys that do not change what the model computes are ignored;
    attention_dropout is one of them (training uses none).

    Raises:
        ValueError: names every key that is missing, malformed, or asks for what is not implemented.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(
            f"model_type={shown(model_type)}: is not implemented. "
            f"Implemented are: {', '.join(FAMILIES)}"
        )
    reader = _reader(raw, family)
    _refuse_unsupported(reader, family)
    values = {"family": model_type, **family.fixed}
    values["activation"] = _activation(reader, family)
    values |= _plain_values(reader, family)
    values |= read_rope(reader, family, values["head_dim"], values["max_positions"])
    values |= _sliding_windows(reader, family, min(values["num_layers"], _MAX_LAYERS))
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
    renamed = {}
    for key, other in family.other_names.items():
        if raw.get(other) is not None:
            renamed[key] = raw[other]
    reader = Reader({**renamed, **raw}, family.defaults)
    for key, value in renamed.items():
        if reader.raw[key] != value:
            reader.refuse(key, f"{family.other_names[key]}={shown(value)} says otherwise")
    return reader


def _plain_values(reader: Reader, family: Family) -> dict[str, Any]:
    """The ModelConfig fields that have a key of their own in config.json."""
    keys = family.all_keys()
    num_heads = reader.size(keys["num_heads"])
    hidden_size = reader.size(keys["hidden_size"])
    values: dict[str, Any] = {
        "num_kv_heads": num_heads,
        "head_dim": max(hidden_size // num_heads, 1),
    }
    if family.mlp_ratio:
        values["mlp_size"] = family.mlp_ratio * hidden_size
    for field, key in keys.items():
        default = values.get(field, _FIELDS[field].default)
        values[field] = _plain_value(reader, field, key, default)
    return values


def _plain_value(reader: Reader, field: str, key: str, default: Any) -> Any:
    """The value of a key, checked by the type that ModelConfig declares for the field."""
    if default is dataclasses.MISSING:
        default = REQUIRED
    if field in _MAY_BE_ZERO:
        return reader.coefficient(key, default)
    methods: dict[Any, Any] = {
        int: reader.size,
        float: reader.number,
        bool: reader.flag,
        float | None: reader.optional,
    }
    return methods[_FIELDS[field].type](key, default)


def _activation(reader: Reader, family: Family) -> str:
    usual = next(iter(family.activations))
    name = reader.raw.get(family.activation_key) or usual
    if isinstance(name, str) and name in family.activations:
        return family.activations[name]
    names = " or ".join(shown(name) for name in family.activations)
    reader.refuse(family.activation_key, f"only {names} is implemented for this model_type")
    return family.activations[usual]


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
    method = quantization
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
    if quantization and method not in family.quantizations:
        reader.refuse(
            "quantization_config",
            "weights quantized this way are not implemented. Use the unquantized model",
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
        heads = f"{keys['num_heads']}={config.num_heads}"
        reader.refuse(
            keys["hidden_size"], f"is not a multiple of {heads}, and head_dim is not given"
        )
    if config.positions == "rope" and config.head_dim % 2:
        # not reader.refuse: head_dim may have been computed from other keys
        reader.problems.append(
            f"head_dim={config.head_dim}: must be even, since rope rotates pairs of dimensions"
        )
    if config.num_layers > _MAX_LAYERS:
        reader.refuse(keys["num_layers"], f"must be at most {_MAX_LAYERS}")
    if "num_experts" in keys and not 1 <= config.experts_per_token <= config.num_experts:
        experts = f"{keys['num_experts']}={config.num_experts}"
        reader.refuse(keys["experts_per_token"], f"must be at least 1 and at most {experts}")


# ---- sliding windows ----------------------------------------------------------------------------


def _sliding_windows(reader: Reader, family: Family, num_layers: int) -> dict[str, Any]:
    """sliding_window and window_layers of ModelConfig; a window that no layer has becomes None."""
    window = _window_size(reader, family)
    usual = _usual_window_layers(reader, family, window is not None, num_layers)
    layers = usual
    types = reader.raw.get("layer_types")
    if types is not None:
        layers = _layers_of_types(reader, types, num_layers)
    if any(layers) and window is None:
        reader.refuse(
            "sliding_window",
            f"{sum(layers)} layers have a window (layer_types), but none is switched on",
        )
    elif layers and layers != usual and not family.mixed_windows:
        reader.refuse(
            "layer_types",
            f"this model_type has one kind of layer, and sliding_window={window}. "
            "Leave layer_types out",
        )
    if not any(layers):
        return {"sliding_window": None, "window_layers": ()}
    return {"sliding_window": window, "window_layers": tuple(layers)}


def _window_size(reader: Reader, family: Family) -> int | None:
    if family.window == "never":
        return None
    if family.window == "flag" and not reader.flag("use_sliding_window"):
        return None
    if reader.raw.get("sliding_window") is None:
        return None
    return reader.size("sliding_window")


def _layers_of_types(reader: Reader, types: Any, num_layers: int) -> list[bool]:
    """Which layers have the window by the key layer_types; [] when it is refused."""
    named = isinstance(types, list) and all(kind in (_FULL, _SLIDING) for kind in types)
    if not named or len(types) != num_layers:
        reader.refuse(
            "layer_types",
            f'must name {num_layers} layers "{_FULL}" or "{_SLIDING}"; '
            "other kinds are not implemented",
        )
        return []
    return [kind == _SLIDING for kind in types]


def _usual_window_layers(
    reader: Reader, family: Family, has_window: bool, num_layers: int
) -> list[bool]:
    """Which layers have the window when config.json does not list them."""
    if family.window_period is not None:
        period = family.window_period
        if family.period_key:
            period = reader.size(family.period_key, period)
        return _periodic(period, num_layers)
    first = 0
    if family.mixed_windows:
        first = reader.raw.get("max_window_layers", 0)
        if not isinstance(first, int):
            reader.refuse("max_window_layers", "must be a whole number")
            first = 0
    return [has_window and layer >= first for layer in range(num_layers)]


def _periodic(period: int, num_layers: int) -> list[bool]:
    """All layers but the last of each period."""
    return [(layer + 1) % period != 0 for layer in range(num_layers)]


def _windows_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.window == "never":
        return {}
    values: dict[str, Any] = {"sliding_window": config.sliding_window}
    layers = config.window_layers or (False,) * config.num_layers
    if family.window == "flag":
        values["use_sliding_window"] = config.sliding_window is not None
    if family.mixed_windows:
        values["layer_types"] = [_SLIDING if layer else _FULL for layer in layers]
    if family.mixed_windows and family.window == "flag":
        # for versions of transformers that do not know layer_types
        first = layers.index(True) if True in layers else config.num_layers
        values["max_window_layers"] = first
    period = layers.index(False) + 1 if False in layers else config.num_layers + 1
    if family.period_key and layers == tuple(_periodic(period, config.num_layers)):
        values[family.period_key] = period
    if family.window == "always" and family.mixed_windows and config.sliding_window is None:
        del values["sliding_window"]  # transformers wants a number although no layer uses it
    return values


# ---- files --------------------------------------------------------------------------------------


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face folder.

    Raises:
        ValueError: the file is missing or is not a JSON object.
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


# ---- writing ------------------------------------------------------------------------------------


def to_hf(
    config: ModelConfig, raw: Mapping[str, Any] | None = None, *, dtype: str = "float32"
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read, for unquantized weights stored as `dtype`.

    Args:
        config: the model.
        raw: the config.json that the model came from; its keys that do not describe the computation
            are copied. Without it the model has no special tokens (transformers would assume some).
        dtype: "float32", "bfloat16" or "float16"; written under the old and the new name.
    """
    family = FAMILIES[config.family]
    if not raw:
        raw = _NO_SPECIAL_TOKENS
    written = {key: value for key, value in raw.items() if key not in _NOT_COPIED}
    written["architectures"] = [family.architecture]
    written["model_type"] = config.family
    for field, key in family.all_keys().items():
        written[key] = getattr(config, field)
    written[family.activation_key] = next(iter(family.activations))
    written |= _windows_to_hf(config, family)
    written |= rope_to_hf(config, family, raw.get("max_position_embeddings"))
    written["torch_dtype"] = dtype  # transformers 4
    written["dtype"] = dtype  # transformers 5
    for key, other in family.other_names.items():
        written[other] = written[key]
    if family.scalar_key and config.attention_scale:
        written[family.scalar_key] = round(config.attention_scale**-2)
    return written
