"""LoRA adapters in the files of PEFT: adapter_config.json and adapter_model.safetensors, both ways.

PEFT has a pair of matrices for each module of transformers, lora_A [R, inputs] and lora_B [outputs, R]. A module may hold several of our
weights side by side (Phi-3's qkv_proj and gate_up_proj, GPT-2's c_attn). Then our adapters become one: their A below each other, their
B on the diagonal of a larger one, and alpha grows with the rank, so that the function is the same. Read back, such a module falls apart
again; one that was trained whole gives each of our weights a copy of A.

Capitals in shapes: L layers, R rank, I inputs, O outputs.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.folder import read_json, write_json
from jaxdpo.models.hf.lora_targets import Projection, projections
from jaxdpo.models.hf.safetensors_io import DTYPES, TensorInfo, read_header, write_file
from jaxdpo.models.hf.tensor_check import fold_names
from jaxdpo.models.hf.tensor_map import weight_table
from jaxdpo.models.lora import Lora, by_target, nested
from jaxdpo.models.params import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = ("lora_A", "lora_B")
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")
_PATTERN_KEY = re.compile(r"\^?[\w.]+\$?")

_UNSUPPORTED = {
    "use_dora": "weight-decomposed adapters (DoRA)",
    "modules_to_save": "modules trained in full beside the adapter",
    "lora_bias": "adapters with a bias",
    "layer_replication": "replicated layers",
    "target_parameters": "adapters of experts",
    "trainable_token_indices": "trained token vectors",
    "alora_invocation_tokens": "adapters that some tokens switch on",
    "use_qalora": "quantisation-aware adapters (QA-LoRA)",
}
"""Settings of PEFT that must be off, and what they ask for."""


class Module(NamedTuple):
    """A module of transformers, and those of our weights that it holds, in the order of its outputs."""

    name: str
    """With {layer} for the layer."""
    weights: dict[str, Projection]
    """By target."""

    @property
    def num_inputs(self) -> int:
        """Inputs, which its weights share."""
        return math.prod(next(iter(self.weights.values())).shape.inputs)

    @property
    def num_outputs(self) -> list[int]:
        """Outputs of each weight."""
        return [math.prod(weight.shape.outputs) for weight in self.weights.values()]

    def names(self, num_layers: int) -> list[str]:
        """The module's name in each layer."""
        return [self.name.format(layer=layer) for layer in range(num_layers)]


def modules(config: ModelConfig) -> list[Module]:
    """The modules that can have an adapter."""
    grouped: dict[str, dict[str, Projection]] = {}
    for target, weight in projections(config).items():
        grouped.setdefault(weight.module, {})[target] = weight
    return [Module(name, weights) for name, weights in grouped.items()]


# ---- reading ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter as it was read."""

    adapter: Params
    """numpy arrays."""
    lora: Lora
    base: str
    """The model that the adapter says it was trained on; may be empty."""


def read_peft(folder: Path, config: ModelConfig) -> PeftAdapter:
    """Read an adapter for the model `config`. Where modules differ in rank, zeros fill the smaller ones up.

    Raises:
        ValueError: with every reason why it is not one: another kind of adapter, another base, files that are damaged or missing.
    """
    settings, tensors = _read_settings(folder), _read_tensors(folder)
    problems, parts = [], {}
    for module in modules(config):
        pairs = {name: _pair(tensors, name) for name in module.names(config.num_layers)}
        if any(info for pair in pairs.values() for info in pair):
            wrong = _mismatches(module, pairs, settings)
            problems += wrong
            parts |= (
                {}
                if wrong
                else _split(
                    module,
                    _stacked(pairs, 0),
                    _stacked(pairs, 1),
                    settings.scale(next(iter(pairs))),
                )
            )
    problems += [
        f"not a projection of this model: {name}" for name in fold_names(_surplus(tensors, config))
    ]
    if problems or not parts:
        lines = "\n".join(f"  {line}" for line in problems or [f"{WEIGHTS} holds no adapter"])
        raise ValueError(f"lora.path={folder}: is not an adapter for this model:\n{lines}")
    return _assembled(parts, config, settings)


def _assembled(
    parts: "dict[str, _Part]", config: ModelConfig, settings: "_Settings"
) -> PeftAdapter:
    """Adapters of single weights -> one adapter with one rank and one scale; a scale that differs from it is moved into B."""
    rank, scale = (
        max(part.a_LIR.shape[-1] for part in parts.values()),
        next(iter(parts.values())).scale,
    )
    known = projections(config)
    alpha = _tidy(scale * (math.sqrt(rank) if settings.rslora else rank))
    lora = Lora(
        rank=rank,
        alpha=alpha,
        rslora=settings.rslora,
        targets=tuple(target for target in known if target in parts),
    )

    def update(target: str) -> dict[str, np.ndarray]:
        a_LIR, b_LRO, own_scale = parts[target]
        missing = rank - a_LIR.shape[-1]
        if not math.isclose(own_scale, lora.scale, rel_tol=1e-9):
            b_LRO = b_LRO * np.float32(own_scale / lora.scale)
        a_LIR, b_LRO = (
            np.pad(a_LIR, ((0, 0), (0, 0), (0, missing))),
            np.pad(b_LRO, ((0, 0), (0, missing), (0, 0))),
        )
        shape = known[target].shape
        return {
            "a": a_LIR.reshape(len(a_LIR), *shape.inputs, rank),
            "b": b_LRO.reshape(len(b_LRO), rank, *shape.outputs),
        }

    return PeftAdapter(
        nested({target: update(target) for target in lora.targets}), lora, settings.base
    )


class _Settings(NamedTuple):
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    base: str

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.rank)

    def scale(self, module: str) -> float:
        """What PEFT multiplies the module's B A by."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (
            math.sqrt(rank) if self.rslora else rank
        )


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is the module's name or its end, at a dot."""
    hits = (value for key, value in pattern.items() if f".{module}".endswith(f".{key.strip('^$')}"))
    return next(hits, default)


def _read_settings(folder: Path) -> _Settings:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"lora.path={folder}: has no {CONFIG}. Name the folder of a PEFT adapter")
    raw = read_json(folder / CONFIG)
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type={raw.get('peft_type')!r}: only LORA is implemented")
    problems += [
        f"{key}={raw[key]!r}: {what} are not implemented"
        for key, what in _UNSUPPORTED.items()
        if raw.get(key)
    ]
    if raw.get("bias", "none") not in ("none", None):
        problems.append(f"bias={raw['bias']!r}: trained biases are not implemented")
    if str(raw.get("init_lora_weights")).lower().startswith(_BASE_CHANGING):
        problems.append(
            f"init_lora_weights={raw['init_lora_weights']!r}: it changed the base's weights, which the adapter does not hold"
        )
    numbers = {"r": raw.get("r"), "lora_alpha": raw.get("lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict) or not all(_PATTERN_KEY.fullmatch(key) for key in pattern):
            problems.append(f"{name}: must be an object whose keys are names of modules")
        else:
            numbers |= {f"{name}.{key}": value for key, value in pattern.items()}
    for name, value in numbers.items():
        whole = name == "r" or name.startswith("rank")
        if (
            isinstance(value, bool)
            or not isinstance(value, int if whole else int | float)
            or not 0 < value < 2**31
        ):
            problems.append(
                f"{name}={value!r}: must be a {'whole ' if whole else ''}number above 0"
            )
    if problems:
        raise ValueError(
            f"lora.path={folder}: its {CONFIG} cannot be used:\n"
            + "\n".join(f"  {line}" for line in problems)
        )
    patterns = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    return _Settings(
        raw["r"],
        raw["lora_alpha"],
        *patterns,
        bool(raw.get("use_rslora")),
        str(raw.get("base_model_name_or_path") or ""),
    )


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (
            " (adapter_model.bin may run code when opened: convert it)"
            if (folder / "adapter_model.bin").is_file()
            else ""
        )
        raise ValueError(f"lora.path={folder}: has no {WEIGHTS}{pickled}")
    found = read_header(path)
    if wrong := [
        f"{name} has type {info.dtype}" for name, info in found.items() if info.dtype not in DTYPES
    ]:
        raise ValueError(
            f"{path}: {'; '.join(wrong)}, which is not implemented ({', '.join(DTYPES)} are)"
        )
    return found


def _pair(tensors: Mapping[str, TensorInfo], module: str) -> tuple[TensorInfo | None, ...]:
    return tuple(tensors.get(f"{_PREFIX}{module}.{factor}.weight") for factor in _FACTORS)


def _surplus(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> list[str]:
    names = [name for module in modules(config) for name in module.names(config.num_layers)]
    known = {f"{_PREFIX}{name}.{factor}.weight" for name in names for factor in _FACTORS}
    return [name for name in tensors if name not in known]


def _mismatches(module: Module, pairs: Mapping[str, tuple], settings: _Settings) -> list[str]:
    """What is wrong with a module's tensors: all layers must have both, in the same shapes and with the same scale."""
    first = next(iter(pairs))
    rank, problems = settings.rank_of(first), []
    for name, pair in pairs.items():
        for factor, info, shape in zip(
            _FACTORS,
            pair,
            ((rank, module.num_inputs), (sum(module.num_outputs), rank)),
            strict=True,
        ):
            if info is None:
                problems.append(f"{name}.{factor}: is missing, though other layers have it")
            elif info.shape != shape:
                problems.append(
                    f"{name}.{factor}: has shape {list(info.shape)}, must have {list(shape)}"
                )
        if settings.scale(name) != settings.scale(first):
            problems.append(
                f"{name}: is scaled otherwise than in the first layer, which is not implemented"
            )
    return problems


def _stacked(pairs: Mapping[str, tuple], factor: int) -> np.ndarray:
    """float32 A [L, I, R] or B [L, R, O]."""
    return np.stack([pair[factor].view().astype(np.float32).T for pair in pairs.values()])


class _Part(NamedTuple):
    """The adapter of one of our weights."""

    a_LIR: np.ndarray
    b_LRO: np.ndarray
    scale: float


def _split(module: Module, a_LIR: np.ndarray, b_LRO: np.ndarray, scale: float) -> dict[str, _Part]:
    """A module's adapter as one of each of our weights."""
    targets = list(module.weights)
    bs = np.split(b_LRO, np.cumsum(module.num_outputs)[:-1], axis=2)
    for count in range(len(targets), 0, -1):
        if blocks := _diagonal(bs, count):
            a_blocks = np.split(a_LIR, count, axis=2)
            return {
                targets[i]: _Part(a_blocks[block], np.split(bs[i], count, axis=1)[block], scale)
                for i, block in blocks.items()
            }
    return {target: _Part(a_LIR, b, scale) for target, b in zip(targets, bs, strict=True)}


def _diagonal(bs: list[np.ndarray], count: int) -> dict[int, int]:
    """Which of `count` equal blocks of the rank each B uses, if `count` of them use one each and the others none; else {}."""
    if bs[0].shape[1] % count:
        return {}
    used = {
        i: [j for j, block in enumerate(np.split(b, count, axis=1)) if block.any()]
        for i, b in enumerate(bs)
    }
    used = {i: blocks for i, blocks in used.items() if blocks}
    alone = len(used) == count and sorted(
        block for blocks in used.values() for block in blocks
    ) == list(range(count))
    return {i: blocks[0] for i, blocks in used.items()} if alone else {}


def adapter_fingerprint(folder: Path) -> str:
    """A string that names the adapter in a folder: the sha256 of its files."""
    return (
        "sha256:"
        + hashlib.sha256(
            b"".join((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))
        ).hexdigest()
    )


# ---- writing ------------------------------------------------------------------------------------------------------------------


def write_peft(
    folder: Path,
    config: ModelConfig,
    adapter: Params,
    lora: Lora,
    *,
    base: str,
    revision: str | None = None,
) -> list[Path]:
    """Write an adapter as PEFT does, in float32.

    Args:
        folder: an existing folder.
        adapter: jax or numpy arrays.
        lora: its scale; ranks are those of the arrays.
        base: hub id or folder of the model that it belongs to.

    Returns:
        The files.
    """
    updates, tensors, ranks = by_target(adapter), {}, {}
    for module in modules(config):
        factors = {target: _flat(updates[target]) for target in module.weights if target in updates}
        for layer, name in enumerate(module.names(config.num_layers) if factors else []):
            matrices = _joined(
                module,
                {
                    target: (a_LIR[layer], b_LRO[layer])
                    for target, (a_LIR, b_LRO) in factors.items()
                },
            )
            tensors |= {
                f"{_PREFIX}{name}.{factor}.weight": matrix
                for factor, matrix in zip(_FACTORS, matrices, strict=True)
            }
            ranks[module.name] = len(matrices[0])
    write_json(folder / CONFIG, _config_json(config, lora, ranks, base, revision))
    write_file(
        folder / WEIGHTS,
        {name: matrix.shape for name, matrix in tensors.items()},
        np.dtype(np.float32),
        tensors.values(),
    )
    return [folder / CONFIG, folder / WEIGHTS]


def _flat(update: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A [L, I, R] and B [L, R, O] on the host."""
    a, b = jax.device_get((update["a"], update["b"]))
    return a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)


def _joined(
    module: Module, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """One layer's lora_A [R, I] and lora_B [O, R] of a module; the outputs of a weight without an adapter have zeros."""
    a_RI = np.concatenate([a_IR.T for a_IR, _ in factors.values()])
    b_OR = np.zeros((sum(module.num_outputs), len(a_RI)), np.float32)
    output = rank = 0
    for target, size in zip(module.weights, module.num_outputs, strict=True):
        if target in factors:
            b_RO = factors[target][1]
            b_OR[output : output + size, rank : rank + len(b_RO)] = b_RO.T
            rank += len(b_RO)
        output += size
    return a_RI, b_OR


def _config_json(
    config: ModelConfig, lora: Lora, ranks: Mapping[str, int], base: str, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json. Modules of another rank than the largest are named in the patterns, with the alpha that keeps the scale."""
    names = _shortest_names(config, list(ranks))
    largest = max(ranks.values())
    alphas = {
        rank: _tidy(lora.scale * (math.sqrt(rank) if lora.rslora else rank))
        for rank in set(ranks.values())
    }
    smaller = {names[name]: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": alphas[largest],
        "rank_pattern": smaller,
        "alpha_pattern": {name: alphas[rank] for name, rank in smaller.items()},
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
    """For each module the shortest end of its name that no module outside `wanted` shares: PEFT compares ends of names."""
    others = {row.hf_name.removesuffix(".weight") for row in weight_table(config)} - set(wanted)

    def ends(name: str) -> Iterator[str]:
        words = name.partition("{layer}.")[2].split(".")
        yield from (".".join(words[-count:]) for count in range(1, len(words) + 1))

    return {
        name: next(
            end
            for end in ends(name)
            if not any(f".{other}".endswith(f".{end}") for other in others)
        )
        for name in wanted
    }


def _tidy(number: float) -> float | int:
    """A whole number as int."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
