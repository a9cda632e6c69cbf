"""The one list of training options: a tree of frozen dataclasses.

Each field's documentation is the string below it. `None` means "the default that the text names", so that an option
which was set but does not apply can be told from one that was left alone. Reading files and arguments: options.py.
"""

import dataclasses
from typing import Literal

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
class DataSection:
    """Preference pairs in, packed rows out."""

    train: list[str] = dataclasses.field(default_factory=list)
    """Training sets: each a file (.jsonl, .json, .csv, .parquet, also .gz), a folder[:split], or a hub set name[@revision][:split];
    :count at the end reads so many rows."""
    mix: list[float] = dataclasses.field(default_factory=list)
    """One weight for each training set: its share of the pairs that are visited. Default: every pair once an epoch."""
    eval: list[str] = dataclasses.field(default_factory=list)
    """Validation sets, written like data.train. Empty: a share of the training prompts, see eval_fraction."""
    eval_fraction: float = 0.05
    """Share of the prompts (by hash, so stable when rows are added) held out for validation when data.eval is empty."""
    format: Literal["auto", "hh-rlhf", "shp", "oasst", "ranked", "ab", "preference"] = "auto"
    """Form of the rows of files and of hub sets that are not known by name (docs/data.md). auto: found from the first rows."""
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"
    """Which pairs of an order of several answers are taken (oasst, ranked): the best with the worst, each with the next, or all."""
    min_score_ratio: float = 2.0
    """SHP: least ratio of the better comment's score to the other's."""
    max_pairs_per_prompt: int | None = None
    """Most pairs with one prompt that are taken from a training set. 0: no limit. Default: 5 for SHP, else no limit."""
    languages: list[str] = dataclasses.field(default_factory=list)
    """oasst: languages to keep, e.g. [en,de]. Empty: all."""
    synthetic: bool = True
    """oasst: keep threads with messages that a model wrote."""
    duplicates: Literal["drop", "keep", "error"] = "drop"
    """What becomes of a pair that the training (or the validation) sets hold already."""
    contradictions: Literal["drop", "keep", "error"] = "drop"
    """What becomes of pairs that prefer two answers to one prompt both ways; drop leaves out all of them."""
    identical: Literal["drop", "error"] = "drop"
    """What becomes of a pair whose two answers are the same."""
    empty: Literal["drop", "error"] = "drop"
    """What becomes of a pair with an empty answer."""
    no_end: Literal["error", "keep"] = "error"
    """What becomes of training sets in which no answer ends in an end marker, so that the model would not learn to stop."""
    overlap: Literal["error", "drop", "keep"] = "error"
    """What becomes of pairs of data.eval whose prompt is in data.train too."""
    chat_template: str | None = None
    """Path of a Jinja chat template. Default: the tokenizer's own, or plain text (Human: / Assistant:) if it has none."""
    turns: Literal["all", "last"] = "all"
    """Which assistant turns are scored where the two conversations part before their last turn: all since then, or the last only.
    What others say is never scored."""
    max_length: int = 0
    """Longest prompt + answer, in tokens. Longer answers lose their end, after the prompt was cut to fit.
    0: 1024, or the model's number of positions where that is less."""
    max_prompt_length: int = 0
    """Longest prompt, in tokens; a longer one keeps its end. Both sides always keep the same prompt. 0: half of max_length."""
    layout: Literal["shared", "separate"] = "shared"
    """shared: a pair's prompt is computed once for both answers. separate: once for each."""
    max_row_tokens: int = 4096
    """Longest packed row, in tokens. Steps with more tokens than the rows of one pass hold use more microbatches."""
    row_sizes: int = 8
    """How many row lengths, each a compiled program of its own. More of them waste fewer slots and compile longer."""
    shuffle: bool = True
    """Visit the pairs of each epoch in a new random order (from seed)."""
    max_dropped_fraction: float = 0.1
    """Stop when more than this share of the rows is unusable."""
    cache: str | None = "~/.cache/jaxdpo/pairs"
    """Folder that keeps encoded pairs, so that the next start reads them at once. null: keep none."""
    processes: int = 0
    """Processes that encode large sets, this one among them. 0: as many as there are cores, at most 32."""

    def __post_init__(self) -> None:
        require(
            (
                0 <= self.eval_fraction < 1,
                f"data.eval_fraction={self.eval_fraction}: must be at least 0 and below 1",
            ),
            (
                0 <= self.max_dropped_fraction <= 1,
                f"data.max_dropped_fraction={self.max_dropped_fraction}: must lie between 0 and 1",
            ),
            (
                self.max_length == 0 or self.max_length >= 2,
                f"data.max_length={self.max_length}: must be 0 (automatic) or at least 2",
            ),
            (
                self.max_prompt_length >= 0,
                f"data.max_prompt_length={self.max_prompt_length}: must be 0 (automatic) or at least 1",
            ),
            (
                self.min_score_ratio >= 1,
                f"data.min_score_ratio={self.min_score_ratio}: must be at least 1",
            ),
            (
                self.max_pairs_per_prompt is None or self.max_pairs_per_prompt >= 0,
                f"data.max_pairs_per_prompt={self.max_pairs_per_prompt}: must be 0 (no limit) or more",
            ),
            (
                all(weight > 0 for weight in self.mix),
                f"data.mix={self.mix}: every weight must be above 0",
            ),
            (self.row_sizes >= 1, f"data.row_sizes={self.row_sizes}: must be at least 1"),
            (
                self.processes >= 0,
                f"data.processes={self.processes}: must be 0 (automatic) or at least 1",
            ),
            (
                self.max_length == 0 or self.max_length > self.max_prompt_length,
                f"data.max_length={self.max_length}: must exceed data.max_prompt_length={self.max_prompt_length}, "
                "or no room is left for answers. Raise the one or lower the other",
            ),
            (
                self.max_row_tokens >= 2 * self.max_length,
                f"data.max_row_tokens={self.max_row_tokens}: must be at least twice data.max_length={self.max_length}",
            ),
        )


@_section
class LossSection:
    """What is minimised. docs/losses.md has the formulas and the papers. An option that the loss does not use is an error."""

    name: str | list[str] = "sigmoid"
    """One loss, or a list of losses that are added with loss.weights."""
    weights: list[float] | None = None
    """One factor for each name in the list. Default: all 1."""
    beta: float | None = None
    """Strength of the pull towards the reference. Default 0.1; 2.0 for simpo (a mean per token, not a sum)."""
    label_smoothing: float | None = None
    """Probability that a label is wrong (cdpo, robust, exo_pair, aot, aot_unpaired, simpo, cpo). Default 0.1 for cdpo and robust,
    0.001 for exo_pair, else 0."""
    ipo_length: Literal["mean", "sum"] | None = None
    """IPO's log-ratios: mean per token (TRL, as its authors asked) or sum (original DPO code). Default mean."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = None
    """Divergence from the reference that shapes the log-ratio difference. Default reverse_kl (plain DPO)."""
    alpha_divergence: float | None = None
    """Coefficient of f_divergence=alpha; 0 is forward_kl, 1 reverse_kl. Default 0.5, as in TRL."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens beyond the shorter answer's length, 0 to 1. Default 1 (off)."""
    length_penalty: float | None = None
    """R-DPO: penalty on the reward per token; adds length_penalty * (chosen - rejected tokens) to the logit. Default 0 (off)."""
    wpo: bool = False
    """WPO: weigh each pair by how likely the policy is to have written it."""
    discopop_tau: float | None = None
    """DiscoPOP's temperature. Default 0.05."""
    simpo_gamma: float | None = None
    """SimPO's target margin, in units of the scaled logit. Default 0.5."""
    orpo_lambda: float | None = None
    """ORPO's weight of the odds-ratio term. Default 0.1."""
    cpo_alpha: float | None = None
    """CPO's weight of the chosen answer's NLL. Default 1.0."""
    dpop_lambda: float | None = None
    """DPOP's penalty when the chosen answer falls below the reference. Default 50."""
    tr_every: int = 0
    """TR-DPO: move the reference towards the policy every so many steps. 0: never."""
    tr_alpha: float | None = None
    """TR-DPO: share of the policy in the moved reference. Default 0.6."""
    router_aux_coef: float | None = None
    """Mixtures of experts: weight of the loss that spreads tokens evenly over the experts.
    Default: router_aux_loss_coef of config.json if that also says output_router_logits (as TRL), else 0."""

    @property
    def names(self) -> list[str]:
        """The losses as a list."""
        return [self.name] if isinstance(self.name, str) else list(self.name)

    def __post_init__(self) -> None:
        smoothing, ld, tr = self.label_smoothing, self.ld_alpha, self.tr_alpha
        require(
            (bool(self.names), "loss.name=[]: name at least one loss"),
            (
                len(set(self.names)) == len(self.names),
                f"loss.name={self.name}: names a loss twice; add up its weights instead",
            ),
            (
                self.weights is None or len(self.weights) == len(self.names),
                f"loss.weights={self.weights}: needs one factor for each of loss.name={self.names}",
            ),
            (self.beta is None or self.beta > 0, f"loss.beta={self.beta}: must be above 0"),
            (
                smoothing is None or 0 <= smoothing < 0.5,
                f"loss.label_smoothing={smoothing}: must be at least 0 and below 0.5",
            ),
            (ld is None or 0 <= ld <= 1, f"loss.ld_alpha={ld}: must lie between 0 and 1"),
            (tr is None or 0 < tr <= 1, f"loss.tr_alpha={tr}: must be above 0 and at most 1"),
            (
                self.tr_every >= 0,
                f"loss.tr_every={self.tr_every}: must be 0 (never) or a number of steps",
            ),
            (
                tr is None or self.tr_every > 0,
                f"loss.tr_alpha={tr}: does nothing while loss.tr_every=0. Set loss.tr_every",
            ),
            (
                self.alpha_divergence is None or self.f_divergence == "alpha",
                f"loss.alpha_divergence={self.alpha_divergence}: needs loss.f_divergence=alpha",
            ),
            (
                self.discopop_tau is None or self.discopop_tau > 0,
                f"loss.discopop_tau={self.discopop_tau}: must be above 0",
            ),
            (
                self.router_aux_coef is None or self.router_aux_coef >= 0,
                f"loss.router_aux_coef={self.router_aux_coef}: must be 0 (off) or positive",
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
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
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

    pairs_per_step: int = 16
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
                self.pairs_per_step >= 1,
                f"train.pairs_per_step={self.pairs_per_step}: must be at least 1",
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
