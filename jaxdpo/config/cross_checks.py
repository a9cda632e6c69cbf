"""Checks of the training options that involve more than one section."""

from jaxdpo.config.schema import Config

Check = tuple[bool, str]
"""Whether all is well, and what to say if not."""


def cross_check(config: Config) -> list[str]:
    """Problems that involve more than one section, as messages; empty when there are none."""
    checks = [
        (
            config.model.path is not None,
            "model.path=null: name a Hugging Face folder or hub id, e.g. model.path=./my-model",
        ),
        (
            bool(config.data.train),
            "data.train=[]: name at least one training set, e.g. data.train=[pairs.jsonl]",
        ),
        (
            len(config.data.weights) in (0, len(config.data.train)),
            f"data.weights={config.data.weights}: must hold one weight for each of the {len(config.data.train)} sets in data.train",
        ),
        (
            config.optim.warmup_steps == 0
            or config.train.steps is None
            or config.optim.warmup_steps < config.train.steps,
            f"optim.warmup_steps={config.optim.warmup_steps}: must be fewer than train.steps={config.train.steps}",
        ),
        (
            config.eval.every == 0 or bool(config.data.eval) or config.data.eval_fraction > 0,
            f"eval.every={config.eval.every}: there are no validation pairs. Set data.eval or data.eval_fraction, or eval.every=0",
        ),
        (
            config.data.packed_length % config.mesh.context == 0,
            f"mesh.context={config.mesh.context}: does not divide data.packed_length={config.data.packed_length}. "
            f"Use data.packed_length={-(-config.data.packed_length // 64) * 64}",
        ),
        *_reference_checks(config),
        *_lora_checks(config),
    ]
    return [message for ok, message in checks if not ok]


def _reference_checks(config: Config) -> list[Check]:
    reference, ref_sync_every, lora = (
        config.reference,
        config.loss.ref_sync_every,
        config.lora.enabled,
    )
    return [
        (
            reference != "adapter_off" or lora,
            "reference=adapter_off: without adapters there is nothing to switch off. Set lora.rank, or use reference=frozen",
        ),
        (
            ref_sync_every == 0 or lora or reference in ("frozen", "auto"),
            f"loss.ref_sync_every={ref_sync_every}: moves a reference, but reference={reference}. Use reference=frozen",
        ),
        (
            ref_sync_every == 0 or not lora,
            f"loss.ref_sync_every={ref_sync_every}: a reference cannot move towards adapters. Leave out it or lora",
        ),
    ]


def _lora_checks(config: Config) -> list[Check]:
    model, lora = config.model, config.lora.enabled
    return [
        (
            model.quantize == "none" or lora,
            f"model.quantize={model.quantize}: quantised weights cannot be trained. Set lora.rank, or leave it out",
        ),
        (
            model.quantize == "none" or model.remat != "none",
            f"model.quantize={model.quantize}: with model.remat=none the backward pass keeps all weights as arrays. Use model.remat=full",
        ),
        (
            model.param_dtype == "float32" or not lora,
            f"model.param_dtype={model.param_dtype}: adapters are float32, and their base has model.compute_dtype. Leave it out",
        ),
    ]
