"""The demo: `python -m jaxdpo.train` without arguments. Two real runs on a task that it makes up itself, in two minutes on a CPU.

The task: how-to questions, answered either patiently or rudely. A small decoder first learns to answer in both manners
(sft loss, from random weights); then DPO is shown pairs in which the patient answer is preferred.
"""

import dataclasses
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxdpo.checkpoints.restore import restore_params
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
from jaxdpo.data.prepare import prepare
from jaxdpo.data.tokenize import load_tokenizer
from jaxdpo.export import ExportConfig, export_run
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.sampling import generate
from jaxdpo.training.loop import train
from jaxdpo.training.preemption import REQUEUE
from jaxdpo.utils.console import show_table

VERBS = (
    "bake",
    "boil",
    "clean",
    "cook",
    "draw",
    "fix",
    "fold",
    "grow",
    "hang",
    "lift",
    "mend",
    "open",
    "pack",
    "paint",
    "peel",
    "plant",
    "plate",
    "shine",
    "store",
    "trim",
    "wash",
    "weigh",
    "wrap",
    "water",
)
THINGS = (
    "apple",
    "basket",
    "bench",
    "book",
    "bottle",
    "box",
    "bread",
    "cake",
    "carpet",
    "chair",
    "clock",
    "coat",
    "fence",
    "flower",
    "kettle",
    "lamp",
    "onion",
    "pan",
    "plant",
    "rope",
    "shirt",
    "shoe",
    "table",
    "tree",
)
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
SHOWN, SAMPLED = 4, 32


def demo() -> bool:
    """Train, align, and show what changed; False when a signal stopped it."""
    folder = _new_folder()
    print(
        f"jaxdpo demo in {folder}: a small decoder learns to answer how-to questions, patiently or rudely;\n"
        "then DPO prefers the patient answers.\n"
    )
    _write_model(folder / "model")
    _write_pairs(folder, seed=0)
    print("1. SFT from random weights, on answers of both manners")
    if not train(_sft_config(folder)):
        return False
    export_run(ExportConfig(run_dir=str(folder / "sft"), out=str(folder / "sft-model")))
    print(
        "\n2. DPO from that model, on pairs that prefer the patient answer (with the sft loss beside it)"
    )
    config = _dpo_config(folder)
    if not train(config):
        return False
    _report(config, folder)
    return True


def _sft_config(folder: Path) -> Config:
    return Config(
        run_dir=str(folder / "sft"),
        reference="none",
        model=ModelSection(path=str(folder / "model"), init="random"),
        data=DataSection(
            train=[str(folder / "sft.jsonl")],
            max_length=64,
            max_prompt_length=32,
            packed_length=1024,
            num_packed_lengths=1,
        ),
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
        data=DataSection(
            train=[str(folder / "pairs.jsonl")],
            eval_fraction=0.15,
            max_length=64,
            max_prompt_length=32,
            packed_length=1024,
            num_packed_lengths=1,
        ),
        loss=LossSection(
            name=["sigmoid", "sft"], beta=0.1
        ),  # the sft loss keeps so small a model fluent
        optim=OptimSection(learning_rate=3e-4),
        train=TrainSection(batch_size=16, epochs=4),
        eval=EvalSection(every=40),
    )


def _new_folder() -> Path:
    """runs/demo-1, or the next number that is free: a demo never touches what another one left."""
    for number in itertools.count(1):
        folder = Path("runs") / f"demo-{number}"
        if not folder.exists():
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("counting ends never")


def _write_model(folder: Path) -> None:
    """A Hugging Face folder without weights: config.json, and a tokenizer whose tokens are the task's words."""
    texts = [PROMPT, *PATIENT, *RUDE, *(f" {word}" for word in VERBS + THINGS)]
    words = sorted(
        {word for text in texts for word in _split(text)} - {"{", "}", " {", "verb", "thing"}
    )
    vocabulary = {word: i for i, word in enumerate([END, "<|unknown|>", *words])}
    folder.mkdir()
    _write_json(folder / "config.json", MODEL | {"vocab_size": len(vocabulary), "eos_token_id": 0})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "unk_token": "<|unknown|>",
        },
    )
    end = {
        "id": 0,
        "content": END,
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": [end],
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": WORD},
                "behavior": "Isolated",
                "invert": False,
            },
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|unknown|>"},
            "decoder": {"type": "Fuse"},
        },
    )


def _split(text: str) -> list[str]:
    return re.findall(WORD, text)


def _write_pairs(folder: Path, seed: int) -> None:
    """sft.jsonl, whose preferred answers are of either manner, and pairs.jsonl, whose preferred answers are the patient ones."""
    draw = random.Random(seed)
    sft, pairs = [], []
    for verb, thing in itertools.product(VERBS, THINGS):
        words = {"verb": verb, "thing": thing}
        patient, rude = draw.choice(PATIENT).format(**words), draw.choice(RUDE).format(**words)
        first, second = draw.sample((patient, rude), 2)
        prompt = PROMPT.format(**words)
        sft.append({"prompt": prompt, "chosen": first, "rejected": second})
        pairs.append({"prompt": prompt, "chosen": patient, "rejected": rude})
    for name, rows in (("sft", sft), ("pairs", pairs)):
        lines = (json.dumps(row) + "\n" for row in draw.sample(rows, len(rows)))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _report(config: Config, folder: Path) -> None:
    """The table of validation metrics, and sampled answers to held-out questions, before and after DPO."""
    rows = [
        json.loads(line) for line in (folder / "dpo" / "metrics.jsonl").read_text().splitlines()
    ]
    measured = [row for row in rows if "eval/loss" in row]
    ends = (measured[0], measured[-1])
    tokenizer = load_tokenizer(str(folder / "model"))
    held_out = prepare(config.data, tokenizer, len(tokenizer)).eval
    prompts = [held_out[i].prompt_ids for i in range(min(SAMPLED, len(held_out)))]
    answers = [
        [
            str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            for ids in _sample(folder, run, prompts)
        ]
        for run in ("sft", "dpo")
    ]
    print()
    show_table(
        f"{len(held_out)} held-out questions",
        ["", "before (SFT)", "after (DPO)"],
        [
            [
                "accuracy (a tie counts half)",
                *(f"{row['eval/rewards/accuracies_ties_half']:.2f}" for row in ends),
            ],
            ["margin between the rewards", *(f"{row['eval/rewards/margins']:.2f}" for row in ends)],
            [
                "KL from the reference, nats per token",
                *(f"{row['eval/kl/token_exact']:.3f}" for row in ends),
            ],
            [
                "sampled answers that are patient",
                *(f"{_share_patient(texts):.0%}" for texts in answers),
            ],
        ],
    )
    questions = [
        str(tokenizer.decode(prompts[i])).removeprefix("Q: ").removesuffix("\nA:")
        for i in range(SHOWN)
    ]
    show_table(
        "Sampled answers",
        ["question", "before (SFT)", "after (DPO)"],
        list(map(list, zip(questions, *answers, strict=False))),
    )


def _sample(folder: Path, run: str, prompts: list[np.ndarray]) -> list[np.ndarray]:
    """Answers of a run's last checkpoint, at temperature 1."""
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


def main() -> int:
    """The command; returns its exit status: 0 done, 75 stopped by a signal and saved."""
    return 0 if demo() else REQUEUE


if __name__ == "__main__":
    raise SystemExit(main())
