# pyright: reportMissingImports=false
"""TRL's side: a worker that trains with DPOTrainer.train(), in an environment that has TRL.

    python -m versus.theirs --folder <prepared> --dtype bfloat16 --head completions --threads 2

Imports nothing of jaxdpo. A round is timed within TRL's own loop: from one callback at the end of a
step to the one at the end of the round's last step, so it includes batches, forward and backward
passes, clipping, optimizer and schedule, and nothing else.

- float32: bf16=False. bfloat16: bf16=True, which is autocast over float32 weights, as on a GPU.
- `--head completions` turns on what TRL does on a GPU: its fused LM head (add_fused_lm_head, always
  in use since 1.16) computes only the positions of completions if `_use_triton(device)` holds, and
  all positions otherwise. The name that trl.trainer.utils asks is replaced by one that says yes.
  The kernels ask their own copy of it, which still says no, so they take their torch code, the
  only one that runs on a CPU.
- Gradient checkpointing, TRL's default, is off: without it TRL is faster. `--checkpointing` turns
  it on.
- No evaluation, logging or saving; the reference is TRL's default, a frozen copy that runs in every
  step.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from .protocol import Channel


class InOrder(torch.utils.data.Sampler):
    """Rows in the order given."""

    def __init__(self, rows: list[int]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


class Trainer(DPOTrainer):
    """DPOTrainer that visits the rows of a plan, in order."""

    rows: list[int]

    def _get_train_sampler(self, train_dataset=None):
        return InOrder(self.rows)


class Rounds(TrainerCallback):
    """Stops the training loop between rounds, and times them."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.metrics: dict[str, list[float]] = {}
        self.left, self.began = 0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """After every update: answer if the round is over, and wait for the next."""
        now = time.perf_counter()
        if state.global_step == 1:
            self.channel.send(event="first_step", logps=self.metrics["logps/chosen"][-1:])
        else:
            self.left -= 1
            if self.left:
                return
            self.channel.send(
                event="round",
                seconds=now - self.began,
                logps=self.metrics["logps/chosen"][-self.steps :],
            )
        while (request := self.channel.receive())["do"] == "prepare":
            self.channel.send(event="prepared")
        if request["do"] == "quit":
            os._exit(0)
        self.steps = self.left = request["steps"]
        self.began = time.perf_counter()


def make_trainer(args: argparse.Namespace, plan: dict[str, Any], steps: list[list[int]]) -> Trainer:
    """The trainer, with the pairs tokenized by TRL and found equal to what our side trains on."""
    rows = [
        json.loads(line)
        for line in (args.folder / "random.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    config = DPOConfig(
        output_dir=str(args.folder / "trl"),
        per_device_train_batch_size=len(steps[0]),
        max_length=plan["max_length"],
        max_steps=len(steps),
        learning_rate=5e-6,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=args.checkpointing,
        use_cpu=True,
        eval_strategy="no",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    folder = str(args.folder / "model")
    trainer = Trainer(
        model=folder,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    check_ids(trainer, plan)
    trainer.rows = [row for step in steps for row in step]
    return trainer


def in_turn(plan: dict[str, Any]) -> list[list[int]]:
    """All steps of the plan: the first, then a round of each phase in turn."""
    size = plan["steps_per_round"]
    first, *rest = plan["phases"]["random"]
    grouped = plan["phases"]["grouped"]
    steps = [first]
    for start in range(0, len(grouped), size):
        steps += rest[start : start + size]
        steps += grouped[start : start + size]
    return steps


def check_ids(trainer: Trainer, plan: dict[str, Any]) -> None:
    """Both sides must see the same tokens.

    Raises:
        ValueError: they do not.
    """
    collate = trainer.data_collator
    for row, (prompt, chosen, rejected) in plan["ids"].items():
        batch = collate([trainer.train_dataset[int(row)]])
        sides = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        answers = batch["completion_mask"].sum(dim=1).tolist()
        if sides != [prompt + chosen, prompt + rejected] or answers != [len(chosen), len(rejected)]:
            raise ValueError(f"row {row} of random.jsonl: TRL's token ids are not ours")


def main() -> None:
    """Train over the plan, waiting between rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--head", choices=["installed", "completions"], required=True)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument(
        "--steps",
        type=json.loads,
        help="Steps to train on, as lists of rows. Default: those of the plan.",
    )
    args = parser.parse_args()
    channel = Channel()
    torch.set_num_threads(args.threads)
    disable_progress_bars()
    if args.head == "completions":
        assert hasattr(trl.trainer.utils, "_use_triton"), (
            "this TRL decides elsewhere which positions its LM head scores"
        )
        trl.trainer.utils._use_triton = lambda device: True
    plan = json.loads((args.folder / "plan.json").read_text(encoding="utf-8"))
    trainer = make_trainer(args, plan, args.steps or in_turn(plan))
    rounds = Rounds(channel)
    rounds.metrics = trainer._metrics["train"]
    trainer.add_callback(rounds)
    trainer.train()


if __name__ == "__main__":
    main()
