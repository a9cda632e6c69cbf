"""What other frameworks call an option, and what answers it here.

Serves the hint for an unknown option on the command line, and the table in docs/from-trl.md. A
value begins with the name of our option, or is the rest of a sentence that begins with "It is" (see
`foreign_hint`).
"""

import re
from collections.abc import Collection

_GLOBAL_BATCH = "train.batch_size (the global batch, over all devices and microbatches)"
_ACCUMULATION = "computed from train.batch_size and data.packed_length (gradient accumulation)"
_WARMUP = "optim.warmup_steps (a number of steps) or optim.warmup_ratio (a share of them)"
_ADAMW = "always AdamW; its options are optim.learning_rate, optim.b1, optim.b2, optim.eps"
_DTYPE = "model.compute_dtype (bfloat16 or float32)"
_REMAT = "model.remat (gradient checkpointing: none, dots or full)"
_ATTENTION = "model.attention (auto, blocks, splash or dense)"
_TENSORBOARD = "log.tensorboard (TensorBoard and metrics.jsonl; W&B is not supported)"
_FSDP = "mesh.fsdp (the number of devices that shard the weights)"
_PACKED = "always on; data.packed_length is the length of a packed sequence"
_RESUME = "automatic: the same command resumes from run_dir"
_DROPOUT = "not supported: there is no dropout"
_NO_LOGITS = "not needed: logits of the whole sequence are never in memory at once"
_EVERY = "every so many steps"
_EXPORT = "the task of python -m jaxdpo.export, which writes a Hugging Face folder"
_TEMPLATE = "data.chat_template (a path; default: the tokenizer's own)"
_MODEL = "model.path (a Hugging Face folder or hub id)"

HF_AND_TRL: dict[str, str] = {
    "model_name_or_path": _MODEL,
    "model_revision": "model.revision",
    "torch_dtype": "model.param_dtype (of the trained weights; see also model.compute_dtype)",
    "dtype": "model.param_dtype (of the trained weights; see also model.compute_dtype)",
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "tf32": _DTYPE,
    "attn_implementation": _ATTENTION,
    "gradient_checkpointing": _REMAT,
    "gradient_checkpointing_kwargs": _REMAT,
    "activation_offloading": _REMAT,
    "trust_remote_code": "not supported: code from a model's repository is never run",
    "output_dir": "run_dir",
    "overwrite_output_dir": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "run_name": "run_dir",
    "logging_dir": "run_dir (TensorBoard files are in its folder tensorboard)",
    "seed": "seed",
    "data_seed": "seed",
    "per_device_train_batch_size": _GLOBAL_BATCH,
    "train_batch_size": _GLOBAL_BATCH,
    "batch_size": _GLOBAL_BATCH,
    "per_device_eval_batch_size": "computed from train.batch_size",
    "auto_find_batch_size": _ACCUMULATION,
    "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accum": _ACCUMULATION,
    "grad_acc_steps": _ACCUMULATION,
    "gradient_accumulation": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "learning_rate": "optim.learning_rate",
    "lr": "optim.learning_rate",
    "optim.lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule (cosine, constant or linear)",
    "warmup_ratio": "optim.warmup_ratio",
    "warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.max_grad_norm (gradient clipping)",
    "optim_args": _ADAMW,
    "logging_steps": "log.every",
    "report_to": _TENSORBOARD,
    "wandb": _TENSORBOARD,
    "use_wandb": _TENSORBOARD,
    "eval_steps": "eval.every",
    "eval_strategy": f"eval.every ({_EVERY})",
    "evaluation_strategy": f"eval.every ({_EVERY})",
    "generate_during_eval": "eval.samples (the number of prompts)",
    "save_steps": "checkpoint.save_every",
    "save_strategy": f"checkpoint.save_every ({_EVERY})",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.keep_best (checkpoints with the lowest validation loss)",
    "metric_for_best_model": "always the validation loss, see checkpoint.keep_best",
    "push_to_hub": _EXPORT,
    "hub_model_id": _EXPORT,
    "dataloader_num_workers": "data.num_proc (processes that tokenize)",
    "dataset_num_proc": "data.num_proc",
    "group_by_length": _PACKED,
    "deepspeed": _FSDP,
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "torch_compile": "always on; train.compilation_cache stores the compiled programs",
    "neftune_noise_alpha": "not supported",
    "dataset_name": "data.train",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "dataset_train_split": "data.train (name:split)",
    "dataset_test_split": "data.eval (name:split)",
    "beta": "loss.beta",
    "loss_type": "loss.name",
    "loss_weights": "loss.weights",
    "label_smoothing": "loss.label_smoothing",
    "f_divergence_type": "loss.f_divergence",
    "f_alpha_divergence_coef": "loss.alpha_divergence",
    "ld_alpha": "loss.ld_alpha",
    "discopop_tau": "loss.discopop_tau",
    "use_weighting": "loss.wpo",
    "rpo_alpha": "loss.weights (with loss.name=[sigmoid,sft])",
    "simpo_gamma": "loss.simpo_gamma",
    "cpo_alpha": "loss.cpo_alpha",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "max_completion_length": "computed: what data.max_length leaves after the prompt",
    "truncation_mode": "fixed: prompts keep their end, answers their beginning (data.max_length)",
    "padding_free": _PACKED,
    "reference_free": "loss.name (simpo, orpo and cpo need no reference)",
    "ref_model": "reference (auto, frozen, adapter_off, cached or none)",
    "precompute_ref_log_probs": "reference=cached",
    "precompute_ref_batch_size": "computed from train.batch_size; see reference=cached",
    "sync_ref_model": "loss.ref_sync_every",
    "ref_model_sync_steps": "loss.ref_sync_every",
    "ref_model_mixup_alpha": "loss.ref_mixup_alpha",
    "disable_dropout": _DROPOUT,
    "use_logits_to_keep": _NO_LOGITS,
    "use_liger_kernel": _NO_LOGITS,
    "use_liger_loss": _NO_LOGITS,
    "router_aux_loss_coef": "loss.router_aux_coef",
    "use_peft": "lora.rank (above 0)",
    "peft": "lora.rank (above 0)",
    "peft_config": "lora.rank (and lora.alpha, lora.targets)",
    "lora_r": "lora.rank",
    "lora.r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": _DROPOUT,
    "lora_target_modules": "lora.targets",
    "target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "load_in_4bit": "model.quantize=nf4",
    "load_in_8bit": "model.quantize=int8",
    "bnb_4bit_quant_type": "model.quantize=nf4",
}
"""transformers' TrainingArguments, and TRL's DPOConfig, ModelConfig and ScriptArguments."""

AXOLOTL: dict[str, str] = {
    "base_model": _MODEL,
    "revision_of_model": "model.revision",
    "micro_batch_size": _GLOBAL_BATCH,
    "num_epochs": "train.epochs",
    "epochs": "train.epochs",
    "lr_scheduler": "optim.schedule (cosine, constant or linear)",
    "optimizer": _ADAMW,
    "sequence_len": "data.max_length",
    "sample_packing": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "test_datasets": "data.eval",
    "val_set_size": "data.eval_fraction (a share of the prompts)",
    "dataset_prepared_path": "data.cache",
    "dataset_processes": "data.num_proc",
    "chat_template_jinja": _TEMPLATE,
    "rl": "loss.name (sigmoid is DPO)",
    "rl_beta": "loss.beta",
    "dpo_label_smoothing": "loss.label_smoothing",
    "dpo_use_weighting": "loss.wpo",
    "adapter": "lora.rank (above 0)",
    "lora_model_dir": "lora.path",
    "lora_target_linear": "lora.targets=all-linear",
    "peft_use_rslora": "lora.rslora",
    "flash_attention": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "wandb_project": _TENSORBOARD,
    "wandb_name": _TENSORBOARD,
    "mlflow_tracking_uri": _TENSORBOARD,
    "use_tensorboard": "log.tensorboard",
    "evals_per_epoch": f"eval.every ({_EVERY})",
    "saves_per_epoch": f"checkpoint.save_every ({_EVERY})",
    "auto_resume_from_checkpoints": _RESUME,
    "train_on_inputs": "always off: only answers are in the loss (data.loss_turns)",
    "dp_replicate_size": "mesh.data",
    "dp_shard_size": "mesh.fsdp",
    "context_parallel_size": "mesh.context",
    "tensor_parallel_size": "mesh.tensor",
    "expert_parallel_size": "mesh.expert",
}
"""axolotl's YAML, where it differs from transformers and TRL."""

LLAMA_FACTORY: dict[str, str] = {
    "adapter_name_or_path": "lora.path",
    "template": _TEMPLATE,
    "finetuning_type": "lora.rank (0: full fine-tuning)",
    "lora_rank": "lora.rank",
    "lora_target": "lora.targets",
    "pref_beta": "loss.beta",
    "pref_loss": "loss.name",
    "pref_ftx": "loss.weights (with loss.name=[sigmoid,sft])",
    "dataset_dir": "data.train (with the path)",
    "cutoff_len": "data.max_length",
    "max_samples": "data.train (name:count)",
    "val_size": "data.eval_fraction (a share of the prompts)",
    "preprocessing_num_workers": "data.num_proc",
    "overwrite_cache": "data.cache (it knows by itself when data or options changed)",
    "packing": _PACKED,
    "neat_packing": _PACKED,
    "mask_history": "data.loss_turns=last",
    "train_on_prompt": "always off: only answers are in the loss (data.loss_turns)",
    "flash_attn": _ATTENTION,
    "enable_liger_kernel": _NO_LOGITS,
    "quantization_bit": "model.quantize (int8 or nf4)",
    "moe_aux_loss_coef": "loss.router_aux_coef",
    "plot_loss": _TENSORBOARD,
    "export_dir": _EXPORT,
}
"""LLaMA-Factory's YAML, where it differs from transformers and TRL."""

LEVANTER: dict[str, str] = {
    "initialize_from_hf": _MODEL,
    "num_train_steps": "train.steps",
    "per_device_parallelism": _ACCUMULATION,
    "steps_per_eval": "eval.every",
    "steps_per_save": "checkpoint.save_every",
    "trainer.mp": _DTYPE,
    "trainer.tracker": _TENSORBOARD,
    "tracker": _TENSORBOARD,
    "trainer.id": "run_dir",
    "checkpointer.base_path": "run_dir",
    "load_checkpoint_path": _RESUME,
    "model_axis_size": "mesh.tensor",
    "replica_dcn_axis_size": "mesh.data",
    "optimizer.warmup": _WARMUP,
    "optimizer.lr_schedule": "optim.schedule (cosine, constant or linear)",
    "optimizer.beta1": "optim.b1",
    "optimizer.beta2": "optim.b2",
    "optimizer.epsilon": "optim.eps",
    "beta1": "optim.b1",
    "beta2": "optim.b2",
    "warmup": _WARMUP,
    "lr_schedule": "optim.schedule (cosine, constant or linear)",
    "train_seq_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "validation_split_fraction": "data.eval_fraction",
    "reference_model_path": "reference (it is the policy as it starts)",
    "hf_save_path": _EXPORT,
    "hf_save_steps": _EXPORT,
}
"""levanter's YAML (trainer.*, optimizer.*, and of its DPO script)."""

BEFORE: dict[str, str] = {
    "pairs_per_step": "train.batch_size",
    "max_row_tokens": "data.packed_length",
    "row_sizes": "data.num_packed_lengths",
    "data.layout": "data.share_prefix (true or false)",
    "data.turns": "data.loss_turns",
    "data.pairs": "data.pairing",
    "data.mix": "data.weights",
    "data.processes": "data.num_proc",
    "data.no_end": "data.missing_eos",
    "moments_dtype": "optim.mu_dtype",
    "tr_every": "loss.ref_sync_every",
    "tr_alpha": "loss.ref_mixup_alpha",
}
"""jaxdpo's own names before its first release."""

FOREIGN_NAMES: dict[str, str] = HF_AND_TRL | AXOLOTL | LLAMA_FACTORY | LEVANTER | BEFORE
"""A name that users bring, in full (trainer.mp) or its last part (wandb) -> our option, or what
happens instead."""

_OPTION = re.compile(r"\b[a-z]+\.[a-z_]\w*")
_NO_OPTIONS = frozenset({"metrics.jsonl", "jaxdpo.export"})
"""Words with a dot in the answers that are not options."""


def foreign_hint(name: str, options: Collection[str]) -> str | None:
    """What to say about an option that another framework knows, or None.

    Args:
        name: as the user wrote it; looked up in full, then by its last part.
        options: the options of the command. None of others is mentioned.

    >>> foreign_hint("log.wandb", {"log.tensorboard"})
    'Did you mean log.tensorboard (TensorBoard and metrics.jsonl; W&B is not supported)?'
    >>> foreign_hint("neftune_noise_alpha", set())
    'It is not supported'
    """
    answer = FOREIGN_NAMES.get(name) or FOREIGN_NAMES.get(name.rpartition(".")[2])
    if answer is None or not set(_OPTION.findall(answer)) <= _NO_OPTIONS.union(options):
        return None
    first = re.split(r"[ =]", answer, maxsplit=1)[0]
    return f"Did you mean {answer}?" if first in options else f"It is {answer}"
