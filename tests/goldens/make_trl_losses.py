# pyright: reportMissingImports=false
"""Evaluate TRL's own loss code in float64 on made-up log-probs and write losses.json.

In an environment of its own:

    pip install torch trl==1.16.0
    python tests/goldens/make_trl_losses.py

`tokens` holds eight pairs: for each side the completion tokens' log-probs under policy and
reference, and the policy's log sum of squared probabilities (for WPO). In `cases`, `section` are
jaxdpo's loss options, `per_pair` TRL's loss of each pair alone (a batch of one) and `mean` its loss
of all eight together. Losses that sort the batch (aot) have the mean only. ORPO's and CPO's cases
are the part without the NLL of the chosen completions.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import dpo_trainer

OUT = Path(__file__).with_name("losses.json")
DEFAULTS = {
    "beta": 0.1,
    "loss_types": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "label_smoothing": 0.0,
    "use_weighting": False,
}
DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}
TRL_NAMES = {
    "f_divergence": "f_divergence_type",
    "alpha_divergence": "f_alpha_divergence_coef",
    "wpo": "use_weighting",
    "weights": "loss_weights",
}
# jaxdpo's loss options; a name TRL lacks is left to its other trainers below
SECTIONS = [
    {"name": "sigmoid"},
    {"name": "sigmoid", "beta": 0.5},
    {"name": "hinge"},
    {"name": "ipo"},
    {"name": "ipo", "beta": 0.4},
    {"name": "exo_pair", "label_smoothing": 1e-3},
    {"name": "exo_pair", "label_smoothing": 0.2},
    {"name": "nca_pair"},
    {"name": "robust", "label_smoothing": 0.0},
    {"name": "robust", "label_smoothing": 0.1},
    {"name": "robust", "label_smoothing": 0.4},
    {"name": "bco_pair"},
    {"name": "sppo_hard"},
    {"name": "aot"},
    {"name": "aot", "label_smoothing": 0.2},
    {"name": "aot_unpaired"},
    {"name": "aot_unpaired", "label_smoothing": 0.2},
    {"name": "apo_zero"},
    {"name": "apo_down"},
    {"name": "discopop"},
    {"name": "discopop", "discopop_tau": 0.5, "beta": 0.3},
    {"name": "sigmoid_norm"},
    {"name": "sft"},
    *(
        {"name": name, "f_divergence": divergence}
        | ({"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {})
        for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "exo_pair", "robust", "discopop")
        for divergence in ("forward_kl", "js", "alpha")
    ),
    {"name": "sigmoid", "f_divergence": "alpha", "alpha_divergence": 2.0},
    {"name": "sigmoid", "f_divergence": "alpha", "alpha_divergence": 1.0},
    {"name": "sigmoid", "f_divergence": "alpha", "alpha_divergence": 0.0},
    *({"name": name, "ld_alpha": 0.3} for name in ("sigmoid", "ipo", "nca_pair", "aot")),
    *({"name": name, "wpo": True} for name in ("sigmoid", "ipo", "bco_pair")),
    {"name": ["sigmoid", "sft"], "weights": [1.0, 0.5]},
    {"name": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]},
    {"name": ["sigmoid", "sft"], "ld_alpha": 0.3},
    {"name": ["ipo", "hinge"], "f_divergence": "js"},
]
REFERENCE_FREE = [
    {"name": "cpo"},
    {"name": "cpo", "beta": 0.3, "label_smoothing": 0.2},
    {"name": "simpo"},
    {"name": "simpo", "beta": 2.5, "simpo_gamma": 1.0, "label_smoothing": 0.1},
    {"name": "orpo"},
    {"name": "orpo", "orpo_lambda": 0.7},
]


class Float64Torch:
    """torch with float64 as its float32: TRL's alpha divergence refuses any other dtype."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


class Scorer(torch.nn.Module):
    """A fake model that returns given per-token numbers."""

    is_gradient_checkpointing = False

    def __init__(self, **outputs: torch.Tensor):
        super().__init__()
        self.outputs = SimpleNamespace(**outputs)

    def forward(self, **inputs):
        return self.outputs


def main() -> None:
    """Evaluate every case and write the file."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    dpo_trainer.torch = Float64Torch()
    tokens = make_tokens()
    cases = [case(section, tokens) for section in SECTIONS]
    cases += [
        {"section": section, "per_pair": reference_free(section, tokens)}
        for section in REFERENCE_FREE
    ]
    record = {
        "source": f"trl {trl.__version__}'s loss code in float64",
        "tokens": tokens,
        "cases": cases,
    }
    lines = (
        json.dumps(record).replace('{"section"', '\n{"section"').replace('{"policy"', '\n{"policy"')
    )
    OUT.write_text(lines + "\n")
    print(f"{OUT}: {len(cases)} cases, {OUT.stat().st_size} bytes")


def make_tokens() -> dict[str, list[dict[str, list[float]]]]:
    """Eight pairs of 1 to 9 tokens a side; rounded, so that float32 holds the sums well."""
    rng = np.random.default_rng(3)

    def side() -> dict[str, list[float]]:
        length = rng.integers(1, 10)
        policy = -rng.exponential(1.5, length)
        columns = {
            "policy": policy,
            "reference": policy + rng.normal(0, 0.7, length),
            "log_sum_sq_probs": -rng.exponential(1.5, length),
        }
        return {
            name: (np.round(np.minimum(column, -1 / 64) * 64) / 64).tolist()
            for name, column in columns.items()
        }

    return {name: [side() for _ in range(8)] for name in ("chosen", "rejected")}


def case(section: dict, tokens: dict) -> dict:
    """TRL's values for one set of options."""
    names = section["name"] if isinstance(section["name"], list) else [section["name"]]
    coupled = any(name.startswith("aot") for name in names)
    found = {"section": section}
    if not coupled:
        found["per_pair"] = [evaluate(section, names, tokens, [i]) for i in range(8)]
    found["mean"] = evaluate(section, names, tokens, list(range(8)))
    return found


def evaluate(section: dict, names: list[str], tokens: dict, pairs: list[int]) -> float:
    """DPOTrainer's loss of a batch of these pairs."""
    sides = [tokens[side][i] for side in ("chosen", "rejected") for i in pairs]
    width = max(len(side["policy"]) for side in sides)

    def padded(column: str) -> torch.Tensor:
        return torch.tensor(
            [side[column] + [0.0] * (width - len(side[column])) for side in sides],
            dtype=torch.float64,
        )

    mask = torch.tensor(
        [[0] + [1] * len(side["policy"]) + [0] * (width - len(side["policy"])) for side in sides]
    )
    blank = torch.zeros(len(sides), width, dtype=torch.float64)
    policy = Scorer(
        log_probs=padded("policy"),
        log_sum_sq_probs=padded("log_sum_sq_probs"),
        entropy=blank,
        mean_logits=blank,
        is_top1=blank.bool(),
    )
    options = {
        TRL_NAMES.get(key, key): value
        for key, value in section.items()
        if key not in ("name", "discopop_tau")
    }
    options["f_divergence_type"] = DIVERGENCES.get(
        options.get("f_divergence_type", ""), "reverse_kl"
    )
    options = DEFAULTS | options | {"loss_types": names}
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        **options | {"loss_weights": options["loss_weights"] or [1.0] * len(names)},
        model=policy,
        ref_model=Scorer(log_probs=padded("reference")),
        accelerator=accelerator,
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None, discopop_tau=section.get("discopop_tau", 0.05)
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    return DPOTrainer._compute_loss(trainer, policy, inputs, False).item()


def reference_free(section: dict, tokens: dict) -> list[float]:
    """CPOTrainer's and ORPOTrainer's loss of each pair."""
    name, smoothing = section["name"], section.get("label_smoothing", 0.0)
    reduce = np.sum if name == "cpo" else np.mean
    logps = [
        torch.tensor([reduce(side["policy"]) for side in tokens[side_name]])
        for side_name in ("chosen", "rejected")
    ]
    trainer = SimpleNamespace(
        alpha=0.0,
        label_smoothing=smoothing,
        loss_type="simpo" if name == "simpo" else "sigmoid",
        simpo_gamma=section.get("simpo_gamma", 0.5),
        beta=section.get("orpo_lambda", section.get("beta", 2.0 if name == "simpo" else 0.1)),
        accelerator=SimpleNamespace(device="cpu"),
    )
    if name == "orpo":
        return (-ORPOTrainer.odds_ratio_loss(trainer, *logps)[0]).tolist()
    return CPOTrainer.cpo_loss(trainer, *logps)[0].tolist()


if __name__ == "__main__":
    main()
