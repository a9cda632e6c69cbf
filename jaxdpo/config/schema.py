"""The list of training options: a tree of frozen dataclasses. config/cli.py reads it from files and
arguments.

Each field's documentation is the string below it. `None` means "the default that the text names",
so that an option that was set can be told from one that was left alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from jaxdpo.config.data_options import LENGTH_MULTIPLE, DataSection
from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.sections import MAX_SEED, refuse
from jaxdpo.config.sections import section as _section

DEFAULT_EVAL_EVERY = 100
"""eval.every where it is automatic and there are validation pairs: that of checkpoint.save_every,
so that a new best costs no further save."""

MAX_BATCH_SIZE = 2**20
"""Of pairs a step: beyond any training, and arrays of that size are still made in no time."""


@_section
class ModelSection:
    """The policy that is trained."""

    path: str | None = None
    """Hugging Face folder (config.json, *.safetensors, tokenizer files) or hub id."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Default: the hub's main branch."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: load the weights. random: initialize them from seed; path then needs config.json
    and a tokenizer only."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the trained weights. bfloat16 halves memory, but small updates are lost at small
    learning rates."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Mixed precision: dtype of the inputs of matrix multiplications; they accumulate in float32
    always. float32 is exact, without TF32 or bfloat16 passes, and slow on GPUs and TPUs. auto:
    float32 on CPU, bfloat16 on GPU and TPU."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """Gradient checkpointing: what the backward pass recomputes to save activation memory. none:
    nothing. dots: all but matrix multiplications and attention. full: all but attention. auto:
    full."""
    attention: Literal["auto", "blocks", "splash", "dense"] = "auto"
    """Attention implementation. blocks skips blocks that no token attends to, splash does so on
    TPUs; dense is the O(T^2) reference. auto: splash on TPUs, except for sliding windows with
    shared prefixes; else blocks."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Store the projections of LoRA's base in 8 bits or in 4 (QLoRA): a quarter or an eighth of
    float32's memory."""


@_section
class LoraSection:
    """Low-rank adapters (LoRA): the base model's weights are frozen. docs/lora.md has the
    details."""

    rank: int = 0
    """Rank of the adapters, which are float32. 0: no adapters, all weights are trained."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank. Default 16."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    targets: str | list[str] | None = None
    """Projections that get an adapter: of q, k, v, o, gate, up, down, or by their names in
    transformers (q_proj, c_attn, ...). Default all-linear: all of attention and of dense MLPs."""
    path: str | None = None
    """Start from this PEFT adapter, which then is the reference too; the options above are taken
    from it."""

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained."""
        return self.rank > 0 or self.path is not None

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.rank < 0:
            yield f"lora.rank={self.rank}: must be 0 (no adapters) or at least 1"
        if self.alpha is not None and self.alpha <= 0:
            yield f"lora.alpha={self.alpha}: must be above 0"
        if self.targets is not None and len(self.targets) == 0:
            yield f"lora.targets={self.targets}: name at least one, or leave it out for all"
        if self.enabled:
            return
        given = {
            "alpha": self.alpha is not None,
            "rslora": self.rslora,
            "targets": self.targets is not None,
        }
        for name, is_given in given.items():
            if is_given:
                value = getattr(self, name)
                yield f"lora.{name}={value}: has no effect without adapters. Set lora.rank"


@_section
class OptimSection:
    """AdamW and its learning rate schedule."""

    learning_rate: float = 5e-6
    """Peak learning rate."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (not on norms, biases and attention sinks)."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """Learning rate after the warm-up: cosine or linear decay to 0 at the last step, or
    constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to the peak; step k of them uses k / warmup_steps of it. Fewer
    than the steps of the run."""
    warmup_ratio: float = 0.0
    """The warm-up as a share of the run's steps, rounded up. Give this or optim.warmup_steps, not
    both."""
    max_grad_norm: float = 1.0
    """Gradient clipping: gradients with a larger global norm are scaled down to it. 0: never."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment; the second is float32 always."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.learning_rate < 0:
            yield f"optim.learning_rate={self.learning_rate}: must not be negative"
        if not 0 <= self.b1 < 1:
            yield f"optim.b1={self.b1}: must be at least 0 and below 1"
        if not 0 <= self.b2 < 1:
            yield f"optim.b2={self.b2}: must be at least 0 and below 1"
        if self.eps <= 0:
            yield f"optim.eps={self.eps}: must be above 0"
        if self.weight_decay < 0:
            yield f"optim.weight_decay={self.weight_decay}: must not be negative"
        if self.warmup_steps < 0:
            yield f"optim.warmup_steps={self.warmup_steps}: must not be negative"
        if not 0 <= self.warmup_ratio < 1:
            yield f"optim.warmup_ratio={self.warmup_ratio}: must be at least 0 and below 1"
        if self.warmup_steps and self.warmup_ratio:
            yield (
                f"optim.warmup_ratio={self.warmup_ratio}: "
                f"optim.warmup_steps={self.warmup_steps} is given too. Give one of them"
            )
        if self.max_grad_norm < 0:
            yield f"optim.max_grad_norm={self.max_grad_norm}: must be 0 (off) or positive"


@_section
class TrainSection:
    """Batch size, length of the run, and what happens on the machine meanwhile."""

    batch_size: int = 16
    """Global batch size: pairs in one optimizer step, over all devices and microbatches. The number
    of microbatches (gradient accumulation) follows from it and data.packed_length."""
    steps: int | None = None
    """Number of optimizer steps. Default: as many as train.epochs need."""
    epochs: float | None = None
    """Passes over the training pairs, such as 3 or 0.5. Default 1. Give this or train.steps, not
    both."""
    offload: list[Literal["reference", "moments"]] = dataclasses.field(default_factory=list)
    """What is offloaded to host memory and fetched by GPUs and TPUs a layer at a time: a frozen
    reference, AdamW's moments. Slower."""
    compilation_cache: str | None = "~/.cache/jaxdpo"
    """Folder that stores compiled programs, so that the next start is quicker. null: no cache."""
    watchdog_minutes: float = 60
    """End the process (status 70, to be restarted) when no step, and nothing else, was finished for
    so long. Compiling one program must take less. 0: never."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.batch_size < 1:
            yield f"train.batch_size={self.batch_size}: must be at least 1"
        if self.batch_size > MAX_BATCH_SIZE:
            yield f"train.batch_size={self.batch_size}: must be at most {MAX_BATCH_SIZE:,}"
        if self.steps is not None and self.steps < 1:
            yield f"train.steps={self.steps}: must be at least 1"
        if self.epochs is not None and self.epochs <= 0:
            yield f"train.epochs={self.epochs}: must be above 0"
        if self.steps is not None and self.epochs is not None:
            yield (
                f"train.steps={self.steps}: "
                f"train.epochs={self.epochs} is given too. Give one of them"
            )
        if self.watchdog_minutes < 0:
            yield f"train.watchdog_minutes={self.watchdog_minutes}: must be 0 (never) or positive"


@_section
class MeshSection:
    """How the devices share the work (docs/scale.md). data * fsdp * expert * context * tensor is
    the number of devices."""

    data: int = -1
    """Data parallelism: replicas that each hold all weights (of their fsdp group) and see different
    sequences. -1: as many as devices are left."""
    fsdp: int = 1
    """Fully sharded data parallelism: devices that shard weights and optimizer state, and see
    different sequences."""
    expert: int = 1
    """Expert parallelism, for mixtures of experts: devices that each hold different experts, shard
    the other weights as fsdp does, and see different sequences."""
    context: int = 1
    """Context parallelism: devices that shard the token positions of each packed sequence, for
    sequences longer than one device can process. A divisor of 64."""
    tensor: int = 1
    """Tensor parallelism: devices that shard each matrix multiplication."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.data != -1 and self.data < 1:
            yield f"mesh.data={self.data}: must be -1 (what is left) or at least 1"
        for name in ("fsdp", "expert", "context", "tensor"):
            size = getattr(self, name)
            if size < 1:
                yield f"mesh.{name}={size}: must be at least 1"
        if self.context >= 1 and LENGTH_MULTIPLE % self.context != 0:
            yield (
                f"mesh.context={self.context}: "
                "must divide packed lengths, which are multiples of 64. "
                "Use 1, 2, 4, 8, 16, 32 or 64"
            )


@_section
class EvalSection:
    """Evaluation on the validation pairs."""

    every: int | None = None
    """Evaluate before the first step, after every so many steps and after the last. 0: never.
    Default: 100, or 0 when there are no validation pairs (data.eval is empty and
    data.eval_fraction=0)."""
    samples: int = 0
    """Validation prompts that policy and reference answer greedily at each evaluation, into
    samples.jsonl. 0: none."""
    sample_tokens: int = 64
    """Maximum length of a sampled answer, in tokens."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.every is not None and self.every < 0:
            yield f"eval.every={self.every}: must be 0 (never) or a number of steps"
        if self.samples < 0:
            yield f"eval.samples={self.samples}: must not be negative"
        if self.sample_tokens < 1:
            yield f"eval.sample_tokens={self.sample_tokens}: must be at least 1"


@_section
class CheckpointSection:
    """Which checkpoints are stored, so that the same command resumes."""

    save_every: int = 100
    """Save after every so many steps; also always the last one, and each new best (keep_best). 0:
    only those."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of further checkpoints to keep, by lowest validation loss (needs eval.every). A step
    whose loss is among the lowest is saved when it is measured. 0: none."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.save_every < 0:
            yield (
                f"checkpoint.save_every={self.save_every}: "
                "must be 0 (the last only) or a number of steps"
            )
        if self.keep < 1:
            yield f"checkpoint.keep={self.keep}: must be at least 1"
        if self.keep_best < 0:
            yield f"checkpoint.keep_best={self.keep_best}: must not be negative"


@_section
class LogSection:
    """Which metrics are logged, and where."""

    every: int = 1
    """Log metrics (metrics.jsonl, TensorBoard) every so many steps."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every={self.every}: must be at least 1")


@_section
class Config:
    """The options of `python -m jaxdpo.train`."""

    run_dir: str = "runs/dpo"
    """Folder of this run: config, metrics, checkpoints. Running the same command again resumes from
    it."""
    seed: int = 0
    """Seed of shuffling, random weights and samples."""
    reference: Literal["auto", "frozen", "adapter_off", "cached", "none"] = "auto"
    """The reference model, which is the policy as it starts. frozen: a copy of its weights.
    adapter_off: with LoRA, the same base without the adapter. cached: its log-probs, computed once
    and stored in the run folder. none: for losses that need no reference (simpo, orpo, cpo, sft).
    auto: adapter_off with LoRA, else frozen."""
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    mesh: MeshSection = MeshSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed}: must lie between 0 and {MAX_SEED}")
