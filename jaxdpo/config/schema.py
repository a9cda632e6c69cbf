"""The one list of training options: a tree of frozen dataclasses.

Each field's documentation is the string below it. `None` means "the default that the text names", so that an option
which was set but does not apply can be told from one that was left alone. Reading files and arguments: options.py.
"""

import dataclasses
from typing import Literal

from jaxdpo.config.data_options import DataSection
from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.sections import require
from jaxdpo.config.sections import section as _section


@_section
class ModelSection:
    """The policy that is trained."""

    path: str | None = None
    """Hugging Face folder (config.json, *.safetensors, tokenizer files) or hub id."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Default: the hub's main branch."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: load the weights. random: draw them from seed; path then needs config.json and a tokenizer only."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the trained weights are held. bfloat16 halves memory but loses updates at small learning rates."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix-product inputs; sums are float32 always. auto: float32 on CPU, bfloat16 on GPU and TPU."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass recomputes. none: nothing. dots: all but matrix products and attention. full: all but attention.
    auto: full."""
    attention: Literal["auto", "blocks", "splash", "dense"] = "auto"
    """Attention implementation. blocks skips what no token may see, splash does so on TPUs; dense is the O(T^2) reference.
    auto: splash on TPUs, but for sliding windows in shared rows; else blocks."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Hold the projections of LoRA's base in 8 bits or in 4 (QLoRA): a quarter or an eighth of float32's memory."""


@_section
class LoraSection:
    """Low-rank adapters: the model's own weights stay as they are. docs/lora.md has the details."""

    rank: int = 0
    """Rank of the adapters, which are float32. 0: no adapters, all weights are trained."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank. Default 16."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    targets: str | list[str] | None = None
    """Projections that get an adapter: of q, k, v, o, gate, up, down, or by their names in transformers (q_proj, c_attn, ...).
    Default all-linear: all of attention and of dense MLPs."""
    path: str | None = None
    """Start from this PEFT adapter, which then is the reference too; the options above are taken from it."""

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained."""
        return self.rank > 0 or self.path is not None

    def __post_init__(self) -> None:
        given = {"alpha": self.alpha, "rslora": self.rslora or None, "targets": self.targets}
        require(
            (self.rank >= 0, f"lora.rank={self.rank}: must be 0 (no adapters) or at least 1"),
            (self.alpha is None or self.alpha > 0, f"lora.alpha={self.alpha}: must be above 0"),
            (
                self.targets is None or len(self.targets) > 0,
                f"lora.targets={self.targets}: name at least one, or leave it out for all",
            ),
            *(
                (
                    value is None or self.enabled,
                    f"lora.{name}={value}: does nothing without adapters. Set lora.rank",
                )
                for name, value in given.items()
            ),
        )


@_section
class OptimSection:
    """AdamW and its schedule."""

    learning_rate: float = 5e-6
    """Peak learning rate."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (norm scales and biases are left alone)."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """From the peak: cosine or linear to 0 at the last step, or constant."""
    warmup_steps: int = 0
    """Steps of linear rise from 0 to the peak; step k of them uses k / warmup_steps of it."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it. 0: never."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment; the second is float32 always."""

    def __post_init__(self) -> None:
        require(
            (
                self.learning_rate >= 0,
                f"optim.learning_rate={self.learning_rate}: must not be negative",
            ),
            (0 <= self.b1 < 1, f"optim.b1={self.b1}: must be at least 0 and below 1"),
            (0 <= self.b2 < 1, f"optim.b2={self.b2}: must be at least 0 and below 1"),
            (self.eps > 0, f"optim.eps={self.eps}: must be above 0"),
            (
                self.weight_decay >= 0,
                f"optim.weight_decay={self.weight_decay}: must not be negative",
            ),
            (
                self.warmup_steps >= 0,
                f"optim.warmup_steps={self.warmup_steps}: must not be negative",
            ),
            (
                self.max_grad_norm >= 0,
                f"optim.max_grad_norm={self.max_grad_norm}: must be 0 (off) or positive",
            ),
        )


@_section
class TrainSection:
    """How long, and how much at once."""

    batch_size: int = 16
    """Pairs in one optimizer step, over all devices: the global batch."""
    steps: int | None = None
    """Number of optimizer steps. Default: as many as train.epochs need."""
    epochs: int | None = None
    """Passes over the training pairs. Default 1. Give this or train.steps, not both."""
    offload: list[Literal["reference", "moments"]] = dataclasses.field(default_factory=list)
    """What waits in the hosts' memory and comes to GPUs and TPUs a layer at a time: a frozen reference, AdamW's moments. Slower."""
    compilation_cache: str | None = "~/.cache/jaxdpo"
    """Folder that keeps compiled programs, so that the next start is quicker. null: keep none."""
    watchdog_minutes: float = 60
    """End the process (status 70, to be started again) when no step, and nothing else, has been finished for so long. Compiling one program
    must take less. 0: never."""

    def __post_init__(self) -> None:
        require(
            (
                self.watchdog_minutes >= 0,
                f"train.watchdog_minutes={self.watchdog_minutes}: must be 0 (never) or positive",
            ),
            (
                self.batch_size >= 1,
                f"train.batch_size={self.batch_size}: must be at least 1",
            ),
            (
                self.steps is None or self.steps >= 1,
                f"train.steps={self.steps}: must be at least 1",
            ),
            (
                self.epochs is None or self.epochs >= 1,
                f"train.epochs={self.epochs}: must be at least 1",
            ),
            (
                self.steps is None or self.epochs is None,
                f"train.steps={self.steps}: train.epochs={self.epochs} is given too. Give one of them",
            ),
        )


@_section
class MeshSection:
    """How many devices share what (docs/scale.md). data * fsdp * expert * context * tensor is the number of devices."""

    data: int = -1
    """Devices that each hold a full copy and see other rows. -1: as many as are left."""
    fsdp: int = 1
    """Devices that share weights and optimizer state and see other rows."""
    expert: int = 1
    """Mixtures of experts: devices that each hold other experts; they share the other weights, and see other rows."""
    context: int = 1
    """Devices that share the slots of each row, for rows longer than one device holds. A divisor of 64."""
    tensor: int = 1
    """Devices that share each matrix product."""

    def __post_init__(self) -> None:
        sizes = {
            "fsdp": self.fsdp,
            "expert": self.expert,
            "context": self.context,
            "tensor": self.tensor,
        }
        require(
            (
                self.data == -1 or self.data >= 1,
                f"mesh.data={self.data}: must be -1 (what is left) or at least 1",
            ),
            *(
                (size >= 1, f"mesh.{name}={size}: must be at least 1")
                for name, size in sizes.items()
            ),
            (
                self.context < 1 or 64 % self.context == 0,
                f"mesh.context={self.context}: rows are multiples of 64 slots, which it does not divide. Use 1, 2, 4, 8, 16, 32 or 64",
            ),
        )


@_section
class EvalSection:
    """Measurements on the validation pairs."""

    every: int = 100
    """Evaluate before the first step, after every so many steps and after the last. 0: never."""
    samples: int = 0
    """Validation prompts that policy and reference answer greedily at each evaluation, into samples.jsonl. 0: none."""
    sample_tokens: int = 64
    """Longest sampled answer, in tokens."""

    def __post_init__(self) -> None:
        require(
            (self.samples >= 0, f"eval.samples={self.samples}: must not be negative"),
            (
                self.sample_tokens >= 1,
                f"eval.sample_tokens={self.sample_tokens}: must be at least 1",
            ),
            (self.every >= 0, f"eval.every={self.every}: must be 0 (never) or a number of steps"),
        )


@_section
class CheckpointSection:
    """What is kept, so that the same command resumes."""

    save_every: int = 100
    """Save after every so many steps; the last step is always saved. 0: the last only."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints to keep besides, by lowest validation loss (needs eval.every). 0: none."""

    def __post_init__(self) -> None:
        require(
            (
                self.save_every >= 0,
                f"checkpoint.save_every={self.save_every}: must be 0 (the last only) or a number of steps",
            ),
            (self.keep >= 1, f"checkpoint.keep={self.keep}: must be at least 1"),
            (self.keep_best >= 0, f"checkpoint.keep_best={self.keep_best}: must not be negative"),
        )


@_section
class LogSection:
    """What is told, and where."""

    every: int = 1
    """Write metrics (metrics.jsonl, TensorBoard) every so many steps."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""

    def __post_init__(self) -> None:
        require((self.every >= 1, f"log.every={self.every}: must be at least 1"))


@_section
class Config:
    """Everything that `python -m jaxdpo.train` can be told."""

    run_dir: str = "runs/dpo"
    """Folder of this run: config, metrics, checkpoints. Running the same command again resumes from it."""
    seed: int = 0
    """Seed of shuffling, random weights and samples."""
    reference: Literal["auto", "frozen", "adapter_off", "cached", "none"] = "auto"
    """What the policy is compared with: the model that it starts as. frozen: a copy of its weights. adapter_off: with LoRA, the same
    base without the adapter. cached: its log-probs, computed once and kept in the run folder. none: for losses that need no reference
    (simpo, orpo, cpo, sft). auto: adapter_off with LoRA, else frozen."""
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
