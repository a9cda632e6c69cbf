"""The identity of a run: what its numbers depend on besides its options, as hashes.

A resume and a cached reference compare it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from jaxdpo.config.schema import Config
from jaxdpo.data.pair_table import PairTable
from jaxdpo.data.tokenize import Tokenizer
from jaxdpo.losses import rules
from jaxdpo.models.hf.peft import adapter_fingerprint
from jaxdpo.models.hf.weight_files import weights_fingerprint


def run_identity(
    config: Config, folder: Path, tokenizer: Tokenizer, pairs: PairTable
) -> dict[str, str]:
    """Weights, tokenizer, chat template, training pairs, the adapter to start from.

    Args:
        config: resolved.
        folder: the model's Hugging Face folder.
        pairs: the training pairs.
    """
    if config.model.init == "pretrained":
        weights = weights_fingerprint(folder)
    else:
        weights = f"random weights of seed {config.seed}"
    identity = {
        "weights": weights,
        "tokenizer": _sha256(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "chat_template": _sha256(str(tokenizer.chat_template)),
        "pairs": pairs.fingerprint(),
    }
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
    known = {key: identity[key] for key in identity if key not in ("pairs", "loss_constants")}
    known["computed"] = (
        f"{section.compute_dtype}, base {section.quantize}, loss.ld_alpha {config.loss.ld_alpha}"
    )
    known["truncation"] = (
        f"max_length {data.max_length}, max_prompt_length {data.max_prompt_length}"
    )
    return known


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
