# pyright: reportMissingImports=false
"""Train a tiny Llama with TRL's own trainers and record every step in trl_trajectories.json.

In an environment of its own:

    pip install torch trl==1.16.0
    python tests/goldens/make_trl_trajectory.py

The file holds all that a comparison needs, so that it can be repeated without torch:

- `model.config` is the checkpoint's config.json; `model.tensors` lists [name, shape] in the order
  in which the weights are drawn from one numpy.random.default_rng(0): with
  x = rng.standard_normal(shape), a norm is 1 + 0.1 x, all others are 0.1 x; then float32.
- `rows` are the token ids that TRL's trainers made of their text rows (they end every completion
  with EOS, 2). Step k (from 1) trains on rows 4 (k-1) to 4 (k-1) + 3, counted modulo the number of
  rows, in order. `one_token_rows` have the same completions after a prompt of one token. ORPO's
  runs use them: TRL takes its NLL over prompt and completion, and only a prompt of one token makes
  that the NLL of the completion alone, which is what the paper has.
- A run's `section` are jaxdpo's loss options, `trainer` and `args` what TRL was given.
- `steps` are taken before gradient clipping and the update of that step: loss, grad_norm,
  learning_rate, rewards/*, logps/*. The loss and the metrics are float32 as computed, not TRL's
  rounded logs. CPO's trainer reports logps/* as means per token for simpo, ORPO's always; DPO's
  always as sums.
"""

import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_runs import RUNS

OUT = Path(__file__).with_name("trl_trajectories.json")
VOCAB, PAD, BOS, EOS = 64, 0, 1, 2
NUM_ROWS, PAIRS_PER_STEP, STEPS = 12, 4, 6
OPTIMIZER = {
    "learning_rate": 1e-3,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
KEPT = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def main() -> None:
    """Run every trajectory and write the file."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(1)
    rows, one_token_rows = make_rows(one_token=False), make_rows(one_token=True)
    with tempfile.TemporaryDirectory() as folder:
        model = save_checkpoint(Path(folder) / "model")
        runs = []
        for name, kind, args, section in RUNS:
            pairs = one_token_rows if kind == "orpo" else rows
            runs.append(trajectory(folder, name, kind, args, section, rows=pairs))
    versions = [
        f"{package.__name__} {package.__version__}" for package in (trl, transformers, torch)
    ]
    record = {
        "source": f"{', '.join(versions)}, float32, CPU",
        "model": model,
        "optimizer": OPTIMIZER,
        "batch_size": PAIRS_PER_STEP,
        "rows": rows,
        "one_token_rows": one_token_rows,
        "runs": runs,
    }
    OUT.write_text(pretty(record) + "\n")
    print(f"{OUT}: {len(runs)} runs, {OUT.stat().st_size} bytes")


def make_rows(one_token: bool) -> list[dict[str, list[int]]]:
    """Token ids of the pairs: prompts of 2 to 9 tokens (or 1), completions of 2 to 13 with EOS."""
    rng = np.random.default_rng(7)

    def some(low: int, high: int) -> list[int]:
        return rng.integers(3, VOCAB, rng.integers(low, high)).tolist()

    rows = []
    for _ in range(NUM_ROWS):
        prompt, chosen, rejected = some(1, 9), some(1, 13), some(1, 13)
        if one_token:
            prompt = []
        row = {"prompt": [BOS, *prompt], "chosen": [*chosen, EOS], "rejected": [*rejected, EOS]}
        rows.append(row)
    return rows


def save_checkpoint(folder: Path) -> dict:
    """Write the checkpoint and its tokenizer; return what is needed to make the weights again."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    names = sorted(model.state_dict())
    tensors = [[name, list(model.state_dict()[name].shape)] for name in names]
    rng = np.random.default_rng(0)
    weights = {name: draw(rng, name, shape) for name, shape in tensors}
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    model.float().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return {"config": json.loads((folder / "config.json").read_text()), "tensors": tensors}


def draw(rng: np.random.Generator, name: str, shape: list[int]) -> np.ndarray:
    """One weight, see the head of this file."""
    x = 0.1 * rng.standard_normal(shape)
    return (1.0 + x if name.endswith("norm.weight") else x).astype(np.float32)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: "<pad>", "<s>", "</s>", "t3", "t4", ..."""
    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, VOCAB))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def as_text(rows: list[dict[str, list[int]]]) -> Dataset:
    """The rows as text; TRL ends completions with EOS itself, so theirs is left out."""
    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, VOCAB))]

    def text(ids: list[int]) -> str:
        return " ".join(words[i] for i in ids)

    texts = []
    for row in rows:
        chosen, rejected = text(row["chosen"][:-1]), text(row["rejected"][:-1])
        texts.append(
            {"prompt": text(row["prompt"]), "chosen": f" {chosen}", "rejected": f" {rejected}"}
        )
    return Dataset.from_list(texts)


class Recorder:
    """A mixin: a trainer that visits rows in order and records steps at full precision."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.steps = getattr(self, "steps", [])
        self.steps.append({"loss": loss.item()})
        return loss

    def store_metrics(self, metrics, train_eval="train"):
        self.metrics_now = dict(metrics)
        super().store_metrics(metrics, train_eval)

    def log(self, logs, *args, **kwargs):
        if "grad_norm" in logs:
            if hasattr(self, "metrics_now"):
                now = self.metrics_now
            else:
                now = {key: values[-1] for key, values in self._metrics["train"].items()}
            self.steps[-1] |= {key: now[key] for key in KEPT}
            self.steps[-1] |= {key: logs[key] for key in ("grad_norm", "learning_rate")}
        super().log(logs, *args, **kwargs)


class RecordedDPO(Recorder, DPOTrainer):
    """DPO's trainer with the recorder."""


class RecordedCPO(Recorder, CPOTrainer):
    """CPO's trainer with the recorder."""


class RecordedORPO(Recorder, ORPOTrainer):
    """ORPO's trainer with the recorder."""


TRAINERS = {
    "dpo": (RecordedDPO, DPOConfig),
    "cpo": (RecordedCPO, CPOConfig),
    "orpo": (RecordedORPO, ORPOConfig),
}


def trajectory(
    folder: str, name: str, kind: str, args: dict, section: dict, rows: list[dict]
) -> dict:
    """One run of TRL's trainer from the checkpoint: its options and its steps."""
    trainer_type, config_type = TRAINERS[kind]
    common = {
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_length": 64,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    config = config_type(output_dir=f"{folder}/{name}", **(common | OPTIMIZER | args))
    path = f"{folder}/model"
    if kind == "dpo":
        config.model_init_kwargs = {"dtype": "float32", "attn_implementation": "eager"}
        model = path
    else:
        model = LlamaForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
    trainer = trainer_type(
        model=model, args=config, train_dataset=as_text(rows), processing_class=tokenizer()
    )
    assert [ids_of(row) for row in trainer.train_dataset] == rows, (
        f"{name}: TRL made other ids of the rows"
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert len(trainer.steps) == STEPS and all(
        len(step) == 3 + len(KEPT) for step in trainer.steps
    ), f"{name}: a step is missing"
    print(name, [round(step["loss"], 4) for step in trainer.steps], flush=True)
    return {"name": name, "trainer": kind, "args": args, "section": section, "steps": trainer.steps}


def ids_of(row: dict) -> dict[str, list[int]]:
    """The ids that a trainer keeps of a row, in whichever columns."""
    if "prompt_ids" in row:
        return {
            "prompt": row["prompt_ids"],
            "chosen": row["chosen_ids"],
            "rejected": row["rejected_ids"],
        }
    cut = len(row["prompt_input_ids"])
    return {
        "prompt": row["prompt_input_ids"],
        "chosen": row["chosen_input_ids"][cut:],
        "rejected": row["rejected_input_ids"][cut:],
    }


def pretty(value: object) -> str:
    """JSON with nine digits a float (all that float32 has) and line breaks only in long values."""
    if isinstance(value, float):
        return repr(float(f"{value:.9g}"))
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {pretty(item)}" for key, item in value.items()]
        start, end = "{", "}"
    elif isinstance(value, list):
        parts = [pretty(item) for item in value]
        start, end = "[", "]"
    else:
        return json.dumps(value)
    long = sum(map(len, parts)) >= 320 or any("\n" in part for part in parts)
    separator = ",\n" if long else ", "
    return start + separator.join(parts) + end


if __name__ == "__main__":
    main()
