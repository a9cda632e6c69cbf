"""The identity of a run: what its numbers depend on besides its options, as hashes or as text.

A resume and a cached reference compare it. Names of files and folders are not part of it: what is
in them is.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from jaxdpo.config.schema import Config
from jaxdpo.data.loader import Loader
from jaxdpo.data.pair_table import PairTable
from jaxdpo.data.tokenizer_json import Tokenizer
from jaxdpo.losses import rules
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.peft import adapter_fingerprint
from jaxdpo.models.hf.weight_files import weights_fingerprint

MODEL_CONFIG = "model_config"
"""The key whose value is JSON of every field of ModelConfig, so that a difference can be named."""
OF_THE_REFERENCE = ("weights", MODEL_CONFIG, "tokenizer", "chat_template", "adapter")
"""Parts of a run's identity that its reference depends on."""


def run_identity(
    config: Config,
    folder: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    loader: Loader,
    validation: PairTable,
) -> dict[str, str]:
    """Weights, architecture, tokenizer, chat template, pairs, the adapter to start from, and what
    else a loss depends on.

    Args:
        config: resolved.
        folder: the model's Hugging Face folder.
        model: its config.json as it is understood: rope_theta, norm_eps and all the rest.
        loader: of the training pairs.
        validation: the validation pairs.
    """
    if config.model.init == "pretrained":
        weights = weights_fingerprint(folder)
    else:
        weights = f"random weights of seed {config.seed}"
    identity = {
        "weights": weights,
        MODEL_CONFIG: json.dumps(dataclasses.asdict(model), sort_keys=True),
        "tokenizer": _sha256(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "chat_template": _sha256(_template(config, tokenizer)),
        "pairs": loader.table.fingerprint(),
    }
    if len(validation):
        identity["validation_pairs"] = validation.fingerprint()
    if config.data.weights:
        # Which set a pair is of decides how often it is visited.
        sources = loader.table.sources
        identity["sources"] = hashlib.sha256(sources.tobytes()).hexdigest()
    if config.loss.router_aux_coef:
        # The load-balancing loss is one of each microbatch: it changes with what is in one.
        packer = loader.packer
        identity["microbatches"] = (
            f"{packer.num_rows} sequences of {_numbers(packer.packed_lengths)} tokens, prompts "
            f"{'shared' if packer.share_prefix else 'separate'}"
        )
    constants = rules.open_constants(config.loss)
    if constants:  # of mixed losses that differ in a default
        identity["loss_constants"] = _sha256(json.dumps(constants, sort_keys=True))
    if config.lora.path is not None:
        identity["adapter"] = adapter_fingerprint(Path(config.lora.path).expanduser())
    return identity


def reference_identity(config: Config, identity: Mapping[str, str]) -> dict[str, str]:
    """What the reference's log-probs depend on, the pairs aside.

    Args:
        identity: of the run.
    """
    section, data = config.model, config.data
    known = {key: identity[key] for key in OF_THE_REFERENCE if key in identity}
    known["computed"] = (
        f"weights {section.param_dtype}, matmuls {section.compute_dtype}, "
        f"base {section.quantize}, loss.ld_alpha {config.loss.ld_alpha}"
    )
    known["truncation"] = (
        f"max_length {data.max_length}, max_prompt_length {data.max_prompt_length}"
    )
    return known


def identity_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between the identities of a checkpoint and of this start, a line each."""
    lines = []
    for key in [*now, *(key for key in saved if key not in now)]:
        before, after = saved.get(key), now.get(key)
        if before == after:
            continue
        if key == MODEL_CONFIG and before and after:
            lines += _model_changes(json.loads(before), json.loads(after))
        elif key == "microbatches":
            lines.append(
                f"{key}: {before or 'none'} in the checkpoint, {after or 'none'} now. "
                "loss.router_aux_coef depends on them, so mesh and packing must stay"
            )
        else:
            hashes = f"hash {_short(before)}, now {_short(after)}"
            lines.append(f"{key}: not what the checkpoint was trained with ({hashes})")
    return lines


def _model_changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "(absent)"), after.get(name, "(absent)")
        if old != new:
            lines.append(f"config.json, {name}: {old} in the checkpoint, {new} now")
    return lines


def _template(config: Config, tokenizer: Tokenizer) -> str:
    """The text of the chat template."""
    name = config.data.chat_template
    if name is None:
        return str(tokenizer.chat_template)
    path = Path(name).expanduser()
    return path.read_text(encoding="utf-8") if path.is_file() else name


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
