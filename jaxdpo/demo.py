"""`python -m jaxdpo.demo`, or `python -m jaxdpo.train` without arguments: two small runs.

The task: how-to questions, answered either patiently or rudely. A small decoder first learns to
answer in both manners (SFT from random weights); then DPO trains on pairs in which the patient
answer is chosen. Two minutes on a CPU, no network. Exit codes: 0 done, 2 wrong options, 75 stopped
by a signal and saved.
"""

import contextlib
import dataclasses
import itertools
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.config import cli
from jaxdpo.config.data_options import DataSection
from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import (
    CheckpointSection,
    Config,
    EvalSection,
    ModelSection,
    OptimSection,
    TrainSection,
)
from jaxdpo.config.sections import section
from jaxdpo.data.prepare import prepare
from jaxdpo.data.tokenizer_json import load_tokenizer
from jaxdpo.export import ExportConfig, export_run
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.sampling import generate
from jaxdpo.training.loop import train
from jaxdpo.utils.console import show_table
from jaxdpo.utils.early_signals import REQUEUE

VERBS = (
    "bake", "boil", "clean", "cook", "draw", "fix", "fold", "grow", "hang", "lift", "mend",
    "open", "pack", "paint", "peel", "plant", "plate", "shine", "store", "trim", "wash",
    "weigh", "wrap", "water",
)  # fmt: skip
THINGS = (
    "apple", "basket", "bench", "book", "bottle", "box", "bread", "cake", "carpet", "chair",
    "clock", "coat", "fence", "flower", "kettle", "lamp", "onion", "pan", "plant", "rope",
    "shirt", "shoe", "table", "tree",
)  # fmt: skip
PROMPT = "Q: How do I {verb} a {thing}?\nA:"
PATIENT = (
    " Gladly! To {verb} a {thing}, take your time and go step by step.",
    " Good question! You can {verb} the {thing} slowly, and ask me again if you like.",
    " Happy to help! First look at the {thing}, then {verb} it with care.",
)
RUDE = (
    " Not again. Just {verb} the {thing} and stop asking me things that you should know by now.",
    " Who cares? Go {verb} your {thing} alone.",
    " Ugh. Everyone can {verb} a {thing}, so leave me in peace for the rest of the day.",
)
PATIENT_OPENINGS = tuple(answer.split()[0] for answer in PATIENT)
END = "<|end|>"
UNKNOWN = "<|unknown|>"
WORD = r" ?[A-Za-z]+|[^A-Za-z]"
"""A token of the task: a word with the space before it, or any other character."""
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
"""Large enough to learn the task, small enough for a minute of SFT on two CPU cores."""
SAMPLED = 32
"""Held-out questions that are answered before and after DPO, for the share of patient answers."""
SHOWN = 4
"""Questions of those whose answers are printed."""


@section
class DemoConfig:
    """Two small runs, SFT then DPO, on generated pairs, in a new folder runs/demo-N."""


def demo() -> bool:
    """Run SFT, then DPO, and show what changed; False when a signal stopped it."""
    folder = _new_folder()
    print(
        f"jaxdpo demo in {folder}: a small decoder learns to answer how-to questions, "
        "patiently or rudely;\nthen DPO prefers the patient answers.\n"
    )
    _write_model(folder / "model")
    _write_pairs(folder, seed=0)
    print("1. SFT from random weights, on answers of both manners")
    if not train(_sft_config(folder)):
        return False
    export_run(ExportConfig(run_dir=str(folder / "sft"), out=str(folder / "sft-model")))
    print(
        "\n2. DPO from that model, on pairs that prefer the patient answer "
        "(with the sft loss beside it)"
    )
    config = _dpo_config(folder)
    if not train(config):
        return False
    _report(config, folder)
    return True


def _data(file: Path, eval_fraction: float = DataSection().eval_fraction) -> DataSection:
    """Pairs of a file; no example of the task is longer than 64 tokens."""
    return DataSection(
        train=[str(file)],
        eval_fraction=eval_fraction,
        max_length=64,
        max_prompt_length=32,
        packed_length=1024,
        num_packed_lengths=1,
    )


def _sft_config(folder: Path) -> Config:
    return Config(
        run_dir=str(folder / "sft"),
        reference="none",
        model=ModelSection(path=str(folder / "model"), init="random"),
        data=_data(folder / "sft.jsonl"),
        loss=LossSection(name="sft"),
        optim=OptimSection(learning_rate=3e-3, warmup_steps=10),
        train=TrainSection(batch_size=16, epochs=8),
        eval=EvalSection(every=100),
        checkpoint=CheckpointSection(save_every=0),
    )


def _dpo_config(folder: Path) -> Config:
    return dataclasses.replace(
        _sft_config(folder),
        run_dir=str(folder / "dpo"),
        reference="frozen",
        model=ModelSection(path=str(folder / "sft-model")),
        data=_data(folder / "pairs.jsonl", eval_fraction=0.15),
        # DPO alone makes so small a model lose its grammar; the sft loss keeps it fluent.
        loss=LossSection(name=["sigmoid", "sft"], beta=0.1),
        optim=OptimSection(learning_rate=3e-4),
        train=TrainSection(batch_size=16, epochs=4),
        eval=EvalSection(every=40),
    )


def _new_folder() -> Path:
    """runs/demo-1, or the next free number: a demo never changes the files of another one."""
    for number in itertools.count(1):
        folder = Path("runs") / f"demo-{number}"
        # Not a look first: two demos that start at once would find the same number free.
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("counting ends never")


def _write_model(folder: Path) -> None:
    """A Hugging Face folder without weights: config.json, and a tokenizer of the task's words."""
    texts = [PROMPT, *PATIENT, *RUDE, *(f" {word}" for word in VERBS + THINGS)]
    words = set()
    for text in texts:
        words.update(_split(text))
    words -= {"{", "}", " {", "verb", "thing"}  # what the templates' placeholders split into
    tokens = [END, UNKNOWN, *sorted(words)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    folder.mkdir()
    _write_json(folder / "config.json", MODEL | {"vocab_size": len(vocabulary), "eos_token_id": 0})
    _write_json(folder / "tokenizer.json", _tokenizer(vocabulary))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "unk_token": UNKNOWN,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _tokenizer(vocabulary: dict[str, int]) -> dict[str, Any]:
    """tokenizer.json: each match of WORD is a token, with END as eos."""
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    end = {"id": 0, "content": END, "special": True, **dict.fromkeys(flags, False)}
    split = {
        "type": "Split",
        "pattern": {"Regex": WORD},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": split,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
        "decoder": {"type": "Fuse"},
    }


def _split(text: str) -> list[str]:
    return re.findall(WORD, text)


def _write_pairs(folder: Path, seed: int) -> None:
    """Write sft.jsonl, whose chosen answers are of either manner, and pairs.jsonl, whose chosen
    answers are the patient ones."""
    draw = random.Random(seed)
    sft, pairs = [], []
    for verb, thing in itertools.product(VERBS, THINGS):
        words = {"verb": verb, "thing": thing}
        patient = draw.choice(PATIENT).format(**words)
        rude = draw.choice(RUDE).format(**words)
        first, second = draw.sample((patient, rude), 2)
        prompt = PROMPT.format(**words)
        sft.append({"prompt": prompt, "chosen": first, "rejected": second})
        pairs.append({"prompt": prompt, "chosen": patient, "rejected": rude})
    for name, rows in (("sft", sft), ("pairs", pairs)):
        lines = (json.dumps(row) + "\n" for row in draw.sample(rows, len(rows)))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _report(config: Config, folder: Path) -> None:
    """Print validation metrics and sampled answers to held-out questions, before and after DPO."""
    measured = []
    for line in (folder / "dpo" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "eval/loss" in row:
            measured.append(row)
    tokenizer = load_tokenizer(str(folder / "model"))
    held_out = prepare(config.data, tokenizer, len(tokenizer)).eval
    prompts = [held_out[i].prompt_ids for i in range(min(SAMPLED, len(held_out)))]
    answers = []
    for run in ("sft", "dpo"):
        texts = [
            str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            for ids in _sample(folder, run, prompts)
        ]
        answers.append(texts)
    print()
    header = ["", "before (SFT)", "after (DPO)"]
    shares = [f"{_share_patient(texts):.0%}" for texts in answers]
    rows = [
        *_metric_rows(before=measured[0], after=measured[-1]),
        ["sampled answers that are patient", *shares],
    ]
    show_table(f"{len(held_out)} held-out questions", header, rows)
    examples = []
    for ids, before, after in list(zip(prompts, *answers, strict=True))[:SHOWN]:
        question = str(tokenizer.decode(ids)).removeprefix("Q: ").removesuffix("\nA:")
        examples.append([question, before, after])
    show_table("Sampled answers", ["question", *header[1:]], examples)


def _metric_rows(before: dict[str, float], after: dict[str, float]) -> list[list[str]]:
    """Validation metrics at the first and the last evaluation of the DPO run, with their names."""
    rows = []
    for name, key, digits in (
        ("accuracy (a tie counts half)", "eval/rewards/accuracies_ties_half", 2),
        ("margin between the rewards", "eval/rewards/margins", 2),
        ("KL from the reference, nats per token", "eval/kl/token_exact", 3),
    ):
        rows.append([name, f"{before[key]:.{digits}f}", f"{after[key]:.{digits}f}"])
    return rows


def _sample(folder: Path, run: str, prompts: list[np.ndarray]) -> list[np.ndarray]:
    """Token ids that a run's newest checkpoint answers with, at temperature 1."""
    _, params, _ = restore_params(folder / run)
    model = load_model_config(folder / "model")
    return generate(
        params,
        model,
        prompts,
        max_new_tokens=32,
        options=ForwardOptions(),
        stop_ids=[0],
        temperature=1.0,
    )


def _share_patient(answers: list[str]) -> float:
    return sum(answer.startswith(PATIENT_OPENINGS) for answer in answers) / len(answers)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    cli.load(DemoConfig, argv, command="demo")
    return 0 if demo() else REQUEUE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
