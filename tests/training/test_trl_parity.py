"""Six steps of every loss equal those of TRL's trainers (goldens/make_trl_trajectory.py)."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.params import Params
from jaxdpo.training.ref_sync import sync_reference
from tests.tiny import Setup, Stepper, pack

GOLDENS = json.loads(
    Path(__file__).parents[1].joinpath("goldens").joinpath("trl_trajectories.json").read_text()
)
RUNS = {run["name"]: run for run in GOLDENS["runs"]}
QUICK = ("sigmoid",)
PAIRS, SIZE = GOLDENS["batch_size"], 192
MEANS_PER_TOKEN = ("simpo", "simpo_sft", "orpo", "orpo_lambda")
"""Runs whose logps/* TRL reports as means per token; ours are always sums. Their rewards are beta
times those means."""
WITHOUT_REFERENCE = ("sft",)
"""Runs whose loss needs no reference: ours then loads none, and rewards are beta times the
log-prob; TRL's DPO trainer loads one."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Params]:
    """The tiny checkpoint that TRL trained, made again from its recipe."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)

    def draw(name: str, shape: list[int]) -> np.ndarray:
        x = 0.1 * rng.standard_normal(shape)
        return (1.0 + x if name.endswith("norm.weight") else x).astype(np.float32)

    save_file(
        {name: draw(name, shape) for name, shape in GOLDENS["model"]["tensors"]},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(GOLDENS["model"]["config"]))
    config = load_model_config(folder)
    return config, jax.tree.map(np.asarray, load_params(folder, config, None, "float32"))


@functools.cache
def pairs_of(step: int, one_token: bool) -> list[EncodedPair]:
    rows = GOLDENS["one_token_rows" if one_token else "rows"]
    chosen = [rows[(PAIRS * (step - 1) + i) % len(rows)] for i in range(PAIRS)]
    return [
        EncodedPair(ids(row["prompt"]), ids(row["chosen"]), ids(row["rejected"])) for row in chosen
    ]


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def our_steps(run: dict[str, Any], checkpoint: tuple[Any, Params]) -> list[dict[str, float]]:
    config, params = checkpoint
    given = GOLDENS["optimizer"]
    optim = OptimSection(
        learning_rate=given["learning_rate"],
        b1=given["adam_beta1"],
        b2=given["adam_beta2"],
        eps=given["adam_epsilon"],
        weight_decay=given["weight_decay"],
        max_grad_norm=given["max_grad_norm"],
        schedule=run["args"].get("lr_scheduler_type", "constant"),
    )
    loss = LossSection(**run["section"])
    stepper = Stepper(
        Setup(loss=loss, optim=optim, config=config, total_steps=len(run["steps"])),
        policy=params,
        reference=params,
    )
    metrics = []
    for step in range(1, len(run["steps"]) + 1):
        batch = pack(pairs_of(step, run["trainer"] == "orpo"), size=SIZE)
        assert batch.tokens_MBT.shape == (1, 1, SIZE)
        metrics.append(stepper.train(stepper.put(batch)))
        if (
            stepper.reference is not None
            and loss.ref_sync_every
            and step % loss.ref_sync_every == 0
        ):
            stepper.reference = sync_reference(stepper.reference, stepper.state.params, loss)
    return metrics


def tolerance(name: str, key: str, step: int) -> float:
    if step > 2:
        return 1e-3
    if key.startswith(
        "rewards/"
    ):  # beta times a difference of sums of some 50 nats, whose last float32 digit is 4e-6
        return 1e-5 * max(1.0, 4.0 * RUNS[name]["section"].get("beta", 0.1))
    return 5e-5 if key == "grad_norm" and "f_divergence" in RUNS[name]["section"] else 1e-5


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_six_steps_equal_those_of_trl(name: str, checkpoint: tuple[Any, Params]) -> None:
    run = RUNS[name]
    wrong = []
    for step, (ours, theirs) in enumerate(
        zip(our_steps(run, checkpoint), run["steps"], strict=True), 1
    ):
        skipped = (
            "logps/"
            if name in MEANS_PER_TOKEN
            else "rewards/"
            if name in WITHOUT_REFERENCE
            else "nothing"
        )
        compared = [key for key in theirs if not key.startswith(skipped)]
        assert len(compared) >= 5
        for key in compared:
            off = abs(ours[key] - theirs[key]) / max(1.0, abs(theirs[key]))
            if off > tolerance(name, key, step):
                wrong.append(
                    f"step {step} {key}: {ours[key]:.9g}, TRL {theirs[key]:.9g}, off by {off:.1e}"
                )
    assert not wrong, "\n".join(wrong)
