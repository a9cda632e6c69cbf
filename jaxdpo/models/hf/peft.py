"""LoRA adapters in PEFT's files: the key names of adapter_model.safetensors, reading and writing.

For each adapted module of transformers there are two matrices, lora_A [R, I] and lora_B [O, R],
under the keys `base_model.model.<module>.lora_A.weight` and `...lora_B.weight`.
adapter_config.json: peft_config.py.

A module may contain several of our projections side by side (Phi-3's qkv_proj and gate_up_proj,
GPT-2's c_attn). Then our adapters are written as one: their A stacked, their B on the diagonal of a
larger one, and alpha grows with the rank, so that the function is the same. Read back, such a
module is split again; one that PEFT trained as a unit gives each of our projections a copy of A.

Not the peft package, because it imports torch, which jaxdpo does not depend on. Tests compare with
it.

Capitals in shapes: L layers, R rank, I inputs, O outputs.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.folder import write_json
from jaxdpo.models.hf.lora_targets import Projection, projections
from jaxdpo.models.hf.peft_config import (
    CONFIG,
    AdapterConfig,
    adapter_config_json,
    alpha_for,
    read_adapter_config,
)
from jaxdpo.models.hf.safetensors_io import DTYPES, TensorInfo, read_header, write_file
from jaxdpo.models.hf.tensor_check import fold_names
from jaxdpo.models.lora import Lora, by_target, nested
from jaxdpo.models.params import Params

WEIGHTS = "adapter_model.safetensors"
_FACTORS = ("lora_A", "lora_B")


def key_name(module: str, factor: str) -> str:
    """Key of a module's matrix in adapter_model.safetensors; `factor` is lora_A or lora_B."""
    return f"base_model.model.{module}.{factor}.weight"


class Module(NamedTuple):
    """A module of transformers, and our projections in it, in the order of its outputs."""

    name: str
    """With {layer} for the layer."""
    weights: dict[str, Projection]
    """By target."""

    @property
    def num_inputs(self) -> int:
        """Inputs, which its projections share."""
        return math.prod(next(iter(self.weights.values())).shape.inputs)

    @property
    def num_outputs(self) -> list[int]:
        """Outputs of each projection."""
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


# ---- reading ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter as it was read."""

    adapter: Params
    """numpy arrays."""
    lora: Lora
    base: str
    """The model that the adapter says it was trained on; may be empty."""


def read_peft(folder: Path, config: ModelConfig) -> PeftAdapter:
    """Read an adapter for the model `config`. Where modules or their layers differ in rank, zeros
    pad the smaller ones.

    Raises:
        ValueError: with every reason why it is not one: another kind of adapter, another base,
            files that are damaged or missing.
    """
    settings, tensors = read_adapter_config(folder), _read_tensors(folder)
    problems: list[str] = []
    parts: dict[str, _Part] = {}
    surplus = dict(tensors)
    for module in modules(config):
        pairs: dict[str, _Pair] = {}
        for name in module.names(config.num_layers):
            a, b = (surplus.pop(key_name(name, factor), None) for factor in _FACTORS)
            pairs[name] = (a, b)
        if not any(info for pair in pairs.values() for info in pair):
            continue  # a module without an adapter
        wrong = _mismatches(module, pairs, settings)
        problems += wrong
        if not wrong:
            parts |= _split(module, *_stacked(pairs, settings))
    problems += [f"not a projection of this model: {name}" for name in fold_names(surplus)]
    if not problems and not parts:
        problems.append(f"{WEIGHTS} holds no adapter")
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise ValueError(f"lora.path={folder}: is not an adapter for this model:\n{lines}")
    return _assembled(parts, config, settings)


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = ""
        if (folder / "adapter_model.bin").is_file():
            pickled = " (adapter_model.bin may run code when opened: convert it)"
        raise ValueError(f"lora.path={folder}: has no {WEIGHTS}{pickled}")
    found = read_header(path)
    wrong = []
    for name, info in found.items():
        if info.dtype not in DTYPES:
            wrong.append(f"{name} has type {info.dtype}")
    if wrong:
        raise ValueError(
            f"{path}: {'; '.join(wrong)}, which is not implemented ({', '.join(DTYPES)} are)"
        )
    return found


_Pair = tuple[TensorInfo | None, TensorInfo | None]
"""lora_A and lora_B of a module in one layer."""


def _mismatches(module: Module, pairs: Mapping[str, _Pair], settings: AdapterConfig) -> list[str]:
    """What is wrong with a module's tensors: all layers must have both, of their layer's rank."""
    problems = []
    for name, pair in pairs.items():
        rank = settings.rank_of(name)
        shapes = ((rank, module.num_inputs), (sum(module.num_outputs), rank))
        for factor, info, shape in zip(_FACTORS, pair, shapes, strict=True):
            if info is None:
                problems.append(f"{name}.{factor}: is missing, though other layers have it")
            elif info.shape != shape:
                problems.append(
                    f"{name}.{factor}: has shape {list(info.shape)}, must have {list(shape)}"
                )
    return problems


def _stacked(
    pairs: Mapping[str, Any], settings: AdapterConfig
) -> tuple[np.ndarray, np.ndarray, float]:
    """A module's matrices in all layers: float32 A [L, I, R], B [L, R, O], and their scale.

    Zeros fill up the layers of a smaller rank (rank_pattern may name layers), and where a layer has
    another scale than the first, its B takes the difference.
    """
    largest = max(settings.rank_of(name) for name in pairs)
    scale = settings.scale(next(iter(pairs)))
    a_layers, b_layers = [], []
    for name, (a_RI, b_OR) in pairs.items():
        missing = largest - settings.rank_of(name)
        a_IR = a_RI.view().astype(np.float32).T
        b_RO = b_OR.view().astype(np.float32).T
        own_scale = settings.scale(name)
        if not math.isclose(own_scale, scale, rel_tol=1e-9):
            b_RO = b_RO * np.float32(own_scale / scale)
        a_layers.append(np.pad(a_IR, ((0, 0), (0, missing))))
        b_layers.append(np.pad(b_RO, ((0, missing), (0, 0))))
    return np.stack(a_layers), np.stack(b_layers), scale


class _Part(NamedTuple):
    """The adapter of one of our projections."""

    a_LIR: np.ndarray
    b_LRO: np.ndarray
    scale: float


def _split(module: Module, a_LIR: np.ndarray, b_LRO: np.ndarray, scale: float) -> dict[str, _Part]:
    """A module's adapter as one for each of our projections."""
    targets = list(module.weights)
    bs = np.split(b_LRO, np.cumsum(module.num_outputs)[:-1], axis=2)
    for count in range(len(targets), 0, -1):
        blocks = _diagonal(bs, count)
        if blocks:  # what write_peft wrote
            a_blocks = np.split(a_LIR, count, axis=2)
            parts = {}
            for number, block in blocks.items():
                b_block = np.split(bs[number], count, axis=1)[block]
                parts[targets[number]] = _Part(a_blocks[block], b_block, scale)
            return parts
    return {target: _Part(a_LIR, b, scale) for target, b in zip(targets, bs, strict=True)}


def _diagonal(bs: list[np.ndarray], count: int) -> dict[int, int]:
    """Number of a B -> which of `count` equal blocks of the rank it uses.

    Only where `count` of the B use one block each, all different, and the others none; else {}.
    """
    if bs[0].shape[1] % count:
        return {}
    used: dict[int, int] = {}
    for number, b in enumerate(bs):
        blocks = [i for i, block in enumerate(np.split(b, count, axis=1)) if block.any()]
        if len(blocks) > 1:
            return {}
        if blocks:
            used[number] = blocks[0]
    return used if sorted(used.values()) == list(range(count)) else {}


def _assembled(
    parts: Mapping[str, _Part], config: ModelConfig, settings: AdapterConfig
) -> PeftAdapter:
    """Adapters of single projections -> one adapter with one rank and one scale."""
    known = projections(config)
    rank = max(part.a_LIR.shape[-1] for part in parts.values())
    scale = next(iter(parts.values())).scale
    lora = Lora(
        rank=rank,
        alpha=alpha_for(scale, rank, settings.rslora),
        rslora=settings.rslora,
        targets=tuple(target for target in known if target in parts),
    )
    updates = {}
    for target in lora.targets:
        a_LIR, b_LRO, own_scale = parts[target]
        if not math.isclose(own_scale, lora.scale, rel_tol=1e-9):
            b_LRO = b_LRO * np.float32(own_scale / lora.scale)  # moved into B
        missing = rank - a_LIR.shape[-1]
        a_LIR = np.pad(a_LIR, ((0, 0), (0, 0), (0, missing)))
        b_LRO = np.pad(b_LRO, ((0, 0), (0, missing), (0, 0)))
        shape = known[target].shape
        updates[target] = {
            "a": a_LIR.reshape(len(a_LIR), *shape.inputs, rank),
            "b": b_LRO.reshape(len(b_LRO), rank, *shape.outputs),
        }
    return PeftAdapter(nested(updates), lora, settings.base)


def adapter_fingerprint(folder: Path) -> str:
    """A string that identifies the adapter in a folder: the sha256 of its files."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((folder / name).read_bytes())
    return f"sha256:{digest.hexdigest()}"


# ---- writing ------------------------------------------------------------------------------------


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
        config: the model that it is for.
        adapter: jax or numpy arrays.
        lora: gives the scale; ranks are those of the arrays.
        base: hub id or folder of the model that it belongs to.
        revision: of a hub id.

    Returns:
        The files.
    """
    updates = by_target(adapter)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in modules(config):
        pairs = {target: _flat(updates[target]) for target in module.weights if target in updates}
        if not pairs:
            continue
        for layer, name in enumerate(module.names(config.num_layers)):
            of_layer = {target: (a[layer], b[layer]) for target, (a, b) in pairs.items()}
            a_RI, b_OR = _joined(module, of_layer)
            tensors[key_name(name, "lora_A")] = a_RI
            tensors[key_name(name, "lora_B")] = b_OR
            ranks[module.name] = len(a_RI)
    write_json(folder / CONFIG, adapter_config_json(config, lora, ranks, base, revision))
    shapes = {name: matrix.shape for name, matrix in tensors.items()}
    write_file(folder / WEIGHTS, shapes, np.dtype(np.float32), tensors.values())
    return [folder / CONFIG, folder / WEIGHTS]


def _flat(update: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A [L, I, R] and B [L, R, O] on the host."""
    a, b = jax.device_get((update["a"], update["b"]))
    return a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)


def _joined(
    module: Module, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """One layer's lora_A [R, I] and lora_B [O, R] of a module.

    The outputs of a projection without an adapter are zero in lora_B.
    """
    a_RI = np.concatenate([a_IR.T for a_IR, _ in pairs.values()])
    b_OR = np.zeros((sum(module.num_outputs), len(a_RI)), np.float32)
    output, rank = 0, 0
    for target, size in zip(module.weights, module.num_outputs, strict=True):
        if target in pairs:
            b_RO = pairs[target][1]
            b_OR[output : output + size, rank : rank + len(b_RO)] = b_RO.T
            rank += len(b_RO)
        output += size
    return a_RI, b_OR
