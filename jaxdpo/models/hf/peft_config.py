"""adapter_config.json of PEFT, both ways: what kind of adapter it is, its rank, alpha and target
modules.

Not peft.LoraConfig, because peft imports torch, which jaxdpo does not depend on.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.folder import read_json
from jaxdpo.models.hf.lora_targets import projections
from jaxdpo.models.hf.tensor_map import weight_table
from jaxdpo.models.lora import Lora

CONFIG = "adapter_config.json"
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Values of init_lora_weights that change the base model's weights."""
_PATTERN_KEY = re.compile(r"\^?[\w.]+\$?")
"""Keys of rank_pattern and alpha_pattern that are plain names; PEFT takes any expression."""
_MAX_NUMBER = 2**31
"""Above every rank and alpha in use; a larger number is a mistake."""

_UNSUPPORTED = {
    "use_dora": "weight-decomposed adapters (DoRA)",
    "modules_to_save": "modules trained in full beside the adapter",
    "lora_bias": "adapters with a bias",
    "layer_replication": "replicated layers",
    "target_parameters": "adapters of experts",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "adapters that some tokens switch on",
    "use_qalora": "quantization-aware adapters (QA-LoRA)",
}
"""Settings of PEFT that must be off, and what they ask for."""


# ---- reading ------------------------------------------------------------------------------------


class AdapterConfig(NamedTuple):
    """What adapter_config.json says of a LoRA adapter."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    """Module name, or its end, -> another rank."""
    alpha_pattern: Mapping[str, float]
    rslora: bool
    base: str
    """base_model_name_or_path; may be empty."""

    def rank_of(self, module: str) -> int:
        """Rank of a module's adapter."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale(self, module: str) -> float:
        """What PEFT multiplies the module's B A by."""
        rank, alpha = self.rank_of(module), _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is the module's name or its end, at a dot."""
    for key, value in pattern.items():
        if f".{module}".endswith(f".{key.strip('^$')}"):
            return value
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the adapter_config.json of a folder.

    Raises:
        ValueError: there is none, or it describes what is not implemented; lists every reason.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"lora.path={folder}: has no {CONFIG}. Name the folder of a PEFT adapter")
    raw = read_json(folder / CONFIG)
    problems = _unsupported(raw) + _malformed(raw)
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise ValueError(f"lora.path={folder}: its {CONFIG} cannot be used:\n{lines}")
    return AdapterConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        rslora=bool(raw.get("use_rslora")),
        base=str(raw.get("base_model_name_or_path") or ""),
    )


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type={raw.get('peft_type')!r}: only LORA is implemented")
    for key, what in _UNSUPPORTED.items():
        if raw.get(key):
            problems.append(f"{key}={raw[key]!r}: {what} are not implemented")
    if raw.get("bias", "none") not in ("none", None):
        problems.append(f"bias={raw['bias']!r}: trained biases are not implemented")
    if str(raw.get("init_lora_weights")).lower().startswith(_BASE_CHANGING):
        problems.append(
            f"init_lora_weights={raw['init_lora_weights']!r}: "
            "it changed the base's weights, which the adapter does not contain"
        )
    return problems


def _malformed(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    ranks, alphas = {"r": raw.get("r")}, {"lora_alpha": raw.get("lora_alpha")}
    for name, numbers in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict) or not all(_PATTERN_KEY.fullmatch(key) for key in pattern):
            problems.append(f"{name}: must be an object whose keys are names of modules")
            continue
        for key, value in pattern.items():
            numbers[f"{name}.{key}"] = value
    for name, value in ranks.items():
        if not _is_positive(value, int):
            problems.append(f"{name}={value!r}: must be a whole number above 0")
    for name, value in alphas.items():
        if not _is_positive(value, int | float):
            problems.append(f"{name}={value!r}: must be a number above 0")
    return problems


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < _MAX_NUMBER


# ---- writing ------------------------------------------------------------------------------------


def adapter_config_json(
    config: ModelConfig, lora: Lora, ranks: Mapping[str, int], base: str, revision: str | None
) -> dict[str, Any]:
    """Contents of adapter_config.json.

    Modules of another rank than the largest are named in the patterns, with the alpha that keeps
    the scale.

    Args:
        config: the base model.
        lora: the adapter.
        ranks: module (with {layer}) -> rank of its matrices in the file.
        base: hub id or folder of the base model.
        revision: of a hub id.
    """
    names = _shortest_names(config, list(ranks))
    largest = max(ranks.values())
    smaller = {names[module]: rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": alpha_for(lora.scale, largest, lora.rslora),
        "rank_pattern": smaller,
        "alpha_pattern": {
            name: alpha_for(lora.scale, rank, lora.rslora) for name, rank in smaller.items()
        },
        "use_rslora": lora.rslora,
        "target_modules": sorted(set(names.values())),
        "fan_in_fan_out": not all(weight.row.transposed for weight in projections(config).values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _shortest_names(config: ModelConfig, wanted: list[str]) -> dict[str, str]:
    """Module -> shortest end of its name that no module outside `wanted` has.

    PEFT adapts every module whose name ends in an entry of target_modules: GPT-2's `c_proj` alone
    would adapt attention and MLP.
    """
    others = {row.hf_name.removesuffix(".weight") for row in weight_table(config)} - set(wanted)

    def is_ambiguous(end: str) -> bool:
        return any(f".{other}".endswith(f".{end}") for other in others)

    return {name: next(end for end in _ends(name) if not is_ambiguous(end)) for name in wanted}


def _ends(module: str) -> Iterator[str]:
    """Ends of a module's name within its layer, the shortest first: q_proj, self_attn.q_proj."""
    words = module.partition("{layer}.")[2].split(".")
    for count in range(1, len(words) + 1):
        yield ".".join(words[-count:])


def alpha_for(scale: float, rank: int, rslora: bool) -> float | int:
    """The alpha that gives `scale` at a rank, as int where it is a whole number."""
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha
