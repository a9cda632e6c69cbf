"""Checks of the training options that involve more than one section. None of them complains about
an option that was not set."""

from collections.abc import Iterator

from jaxdpo.config.data_options import LENGTH_MULTIPLE
from jaxdpo.config.schema import Config
from jaxdpo.utils.files import pattern_problem


def cross_check(config: Config) -> list[str]:
    """Problems that involve more than one section, as messages; empty when there are none."""
    return [
        *_check_required(config),
        *_check_schedule(config),
        *_check_reference(config),
        *_check_lora(config),
    ]


def _check_required(config: Config) -> Iterator[str]:
    data = config.data
    pattern = pattern_problem(config.run_dir)
    if pattern is not None:
        yield pattern
    if config.model.path is None:
        yield "model.path=null: name a Hugging Face folder or hub id, e.g. model.path=./my-model"
    if not data.train:
        yield "data.train=[]: name at least one training set, e.g. data.train=pairs.jsonl"
    if data.weights and len(data.weights) != len(data.train):
        yield (
            f"data.weights={data.weights}: must hold one weight for each of the {len(data.train)} "
            "sets in data.train"
        )


def _check_schedule(config: Config) -> Iterator[str]:
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if warmup > 0 and steps is not None and warmup >= steps:
        yield f"optim.warmup_steps={warmup}: must be fewer than train.steps={steps}"
    # Left alone, eval.every is 0 where there are no validation pairs.
    if config.eval.every and not config.data.has_eval:
        yield (
            f"eval.every={config.eval.every}: there are no validation pairs. "
            "Set data.eval or data.eval_fraction, or eval.every=0"
        )
    packed, context = config.data.packed_length, config.mesh.context
    # Left alone, packed_length becomes a multiple of 64, which every possible mesh.context divides.
    if packed % context != 0:
        yield (
            f"mesh.context={context}: does not divide data.packed_length={packed}. "
            f"Use data.packed_length={-(-packed // LENGTH_MULTIPLE) * LENGTH_MULTIPLE}"
        )


def _check_reference(config: Config) -> Iterator[str]:
    reference, sync_every, lora = config.reference, config.loss.ref_sync_every, config.lora.enabled
    if reference == "adapter_off" and not lora:
        yield (
            "reference=adapter_off: without adapters there is nothing to switch off. "
            "Set lora.rank, or use reference=frozen"
        )
    if sync_every and lora:
        yield (
            f"loss.ref_sync_every={sync_every}: a reference cannot move towards adapters. "
            "Leave out it or lora"
        )
    if sync_every and not lora and reference not in ("frozen", "auto"):
        yield (
            f"loss.ref_sync_every={sync_every}: moves a reference, but reference={reference}. "
            "Use reference=frozen"
        )


def _check_lora(config: Config) -> Iterator[str]:
    model, lora = config.model, config.lora.enabled
    if model.quantize != "none" and not lora:
        yield (
            f"model.quantize={model.quantize}: quantized weights cannot be trained. "
            "Set lora.rank, or leave it out"
        )
    if model.quantize != "none" and model.remat == "none":
        yield (
            f"model.quantize={model.quantize}: with model.remat=none the backward pass keeps all "
            "dequantized weights. "
            "Use model.remat=full"
        )
    if model.param_dtype != "float32" and lora:
        yield (
            f"model.param_dtype={model.param_dtype}: adapters are float32, and their base has "
            "model.compute_dtype. "
            "Leave it out"
        )
