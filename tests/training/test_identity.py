"""What a resume and a cached reference compare: everything that numbers depend on, found by trying,
and no names of files."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.peft import write_peft
from jaxdpo.models.lora import Lora
from jaxdpo.training.identity import identity_changes, reference_identity
from jaxdpo.training.loop import train
from jaxdpo.training.resolve import validate
from jaxdpo.training.startup_checks import changed_fields
from jaxdpo.training.trainer import Trainer
from tests.models.test_lora import random_adapter
from tests.runs import (
    interrupt,
    same_bits,
    settings,
    stopped_copy,
    whole,
)
from tests.tiny import HF, model, rows, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_device")

NOISE = 1e-4
"""Nats by which the log-probs of a tiny model may differ from rounding alone."""
MOE = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
}


# ---- by trying ----------------------------------------------------------------------------------


def cached(some: Config) -> tuple[np.ndarray, dict[str, str]]:
    """The reference's log-probs of the first training pairs, and the identity of its cache."""
    trainer = Trainer.open(dataclasses.replace(some, reference="cached"))
    weights = trainer.weights
    found = trainer.cache_reference(
        lambda: weights.start_view(weights.initial(), weights.base()), lambda _: None, lambda: False
    )
    identity = reference_identity(trainer.config, trainer.identity)
    return found.train, identity | {"pairs": trainer.data.train.fingerprint()}


def lines_on_resume(before: Config, after: Config) -> list[str]:
    """What a resume of the one run as the other would be refused for."""
    old, new = Trainer.open(before), Trainer.open(after)
    fields = changed_fields(cli.to_dict(old.config), cli.to_dict(new.config))
    return [path for path, *_ in fields] + identity_changes(old.identity, new.identity)


CONFIG_JSON: dict[str, Any] = {
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "initializer_range": 0.5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "attention_dropout": 0.5,
    "use_cache": False,
    "transformers_version": "5.0.0",
    "num_key_value_heads": 1,
    "hidden_act": "gelu",
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
"""Every kind of field of a config.json, changed; those that the weights do not allow are refused
when the model is loaded."""
QUICK_FIELDS = ("rope_theta", "transformers_version")


@pytest.mark.parametrize(
    "key",
    [
        key if key in QUICK_FIELDS else pytest.param(key, marks=pytest.mark.slow)
        for key in CONFIG_JSON
    ],
)
def test_identity_changes_with_every_config_json_field_that_changes_a_number(
    shared: Path, tmp_path: Path, key: str
) -> None:
    base = settings(shared, tmp_path / "run")
    wanted, known = cached(base)
    shutil.copytree(shared / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(HF | {key: CONFIG_JSON[key]}))
    other = settings(shared, tmp_path / "other", model__path=str(tmp_path / "model"))
    try:
        found, identity = cached(other)
    except ValueError:
        return  # refused, with what the weights are
    lines = lines_on_resume(base, other)
    if not np.allclose(found, wanted, rtol=0, atol=NOISE, equal_nan=True):
        assert identity != known and lines, key
    elif load_model_config(shared / "model") == load_model_config(tmp_path / "model"):
        assert identity == known and not lines, f"{key} changes nothing, but the identity"
    if key in ("rope_theta", "rms_norm_eps"):
        name = {"rms_norm_eps": "norm_eps"}.get(key, key)
        assert lines == [
            f"config.json, {name}: {HF[key]} in the checkpoint, {CONFIG_JSON[key]} now"
        ]
    if key == "transformers_version":
        assert identity == known and not lines


CHANGED: dict[str, Any] = {
    "reference": "adapter_off",
    "lora.rank": 2,
    "lora.targets": ["q_proj"],
    "data.train": ["nowhere"],
    "data.eval": ["nowhere"],
    "data.weights": [2.0],
    "data.chat_template": "nowhere",
    "data.max_length": 12,
    "data.max_prompt_length": 3,
    "data.packed_length": 128,
    "data.oasst.languages": ["de"],
    "loss.name": ["ipo", "sft"],
    "loss.weights": [2.0],
    "loss.ld_alpha": 0.5,
    "loss.alpha_divergence": 0.5,
    "loss.router_aux_coef": 0.5,
    "model.path": "nowhere",
    "model.revision": "other",
    "lora.path": "nowhere",
    "lora.alpha": 3.0,
    "train.steps": 3,
    "train.epochs": 2,
    "train.offload": ["moments"],
    "train.compilation_cache": "cache",
}
"""Other values of options, where changed() does not find one by the type."""


def changed(name: str, kind: Any, default: Any) -> Any:
    """Another value of an option; every option has one, also those that are new."""
    if name in CHANGED:
        return CHANGED[name]
    words = [word for word in get_args(kind) if isinstance(word, str) and word != default]
    if words:
        return words[-1]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1 if isinstance(default, int) else default * 1.5 + 0.01
    return "another value"  # of the type that it has, or refused


OPTIONS = {name: (kind, default) for name, kind, default, _ in cli.fields(Config)}
QUICK_OPTIONS = ("model.param_dtype", "loss.ld_alpha", "loss.beta")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_OPTIONS else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIONS
        if name != "run_dir"
    ],
)
def test_identity_of_a_cached_reference_changes_with_every_option_that_changes_its_numbers(
    shared: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # options that name a folder make it
    base = settings(shared, tmp_path / "run")
    values = cli.to_dict(base)
    section = values
    *path, last = name.split(".")
    for part in path:
        section = section[part]
    section[last] = changed(name, *OPTIONS[name])
    other, problems = cli.validate(Config, values)
    if problems or other is None or validate(other):
        return  # not without other options: refused
    other = dataclasses.replace(other, run_dir=str(tmp_path / "other"))
    try:
        found, identity = cached(other)
    except (ValueError, OSError):
        return
    wanted, known = cached(base)
    same_shape = found.shape == wanted.shape
    if not same_shape or not np.allclose(found, wanted, rtol=0, atol=NOISE, equal_nan=True):
        # Of the same pairs in another order of visits, the cache is another one too.
        assert identity != known or is_about_visits(found, wanted), name
    if name in ("model.param_dtype", "loss.ld_alpha"):
        assert identity != known
    if name in ("loss.beta", "model.remat", "optim.learning_rate", "log.every", "eval.every"):
        assert identity == known


def is_about_visits(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether the log-probs of all pairs that both runs visit are the same."""
    both = np.isfinite(found) & np.isfinite(wanted)
    return found.shape == wanted.shape and np.allclose(found[both], wanted[both], atol=NOISE)


def test_every_option_is_compared_or_is_free_and_changes_no_update(shared: Path) -> None:
    """An option that is new is compared: none is free by being forgotten."""
    names = {name for name, *_ in cli.fields(Config)}
    same = cli.to_dict(settings(shared, shared / "run"))
    free = set()
    for name in names:
        changed = json.loads(json.dumps(same))
        section = changed
        *path, last = name.split(".")
        for part in path:
            section = section[part]
        section[last] = "another value"
        if not changed_fields(same, changed):
            free.add(name.partition(".")[0] if name.split(".")[0] in FREE_SECTIONS else name)
    assert free == FREE


FREE_SECTIONS = ("checkpoint", "eval", "log", "mesh")
FREE = {
    *FREE_SECTIONS,
    *("run_dir", "model.path", "model.revision", "model.attention", "model.remat", "lora.path"),
    *("data.train", "data.eval", "data.chat_template", "data.cache", "data.num_proc"),
    *("data.share_prefix", "data.packed_length", "data.num_packed_lengths"),
    *("data.max_dropped_fraction", "data.missing_eos"),
    *("train.offload", "train.compilation_cache", "train.watchdog_minutes"),
}


def test_identity_changes_with_every_field_of_the_model() -> None:
    first = dataclasses.asdict(model())
    for name, value in first.items():
        other = first | {name: "another value"}
        lines = identity_changes(*({"model_config": json.dumps(some)} for some in (first, other)))
        assert lines == [
            f"config.json, {name}: {json_value(value)} in the checkpoint, another value now"
        ]


def json_value(value: Any) -> Any:
    return json.loads(json.dumps(value))


# ---- resumes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_and_data_that_moved_resume_to_the_same_bits(shared: Path, tmp_path: Path) -> None:
    stopped_copy(shared, tmp_path / "run")
    shutil.copytree(shared / "model", tmp_path / "moved" / "model")
    shutil.copy(shared / "rows.jsonl", tmp_path / "moved" / "other name.jsonl")
    moved = settings(
        shared,
        tmp_path / "run",
        model__path=str(tmp_path / "moved" / "model"),
        data__train=[str(tmp_path / "moved" / "other name.jsonl")],
    )
    assert train(moved) is True
    assert same_bits(tmp_path / "run", whole(shared))


def changed_model(shared: Path, folder: Path, **changes: Any) -> str:
    """The shared model with another config.json and the same weights."""
    shutil.copytree(shared / "model", folder)
    (folder / "config.json").write_text(json.dumps(HF | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rope_theta": 20000.0}, "rope_theta: 10000.0 in the checkpoint, 20000.0 now"),
        ({"rms_norm_eps": 1e-6}, "norm_eps: 1e-05 in the checkpoint, 1e-06 now"),
        pytest.param(
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling: None in the checkpoint, {",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resume_with_another_config_json_is_refused_with_the_field(
    shared: Path, tmp_path: Path, changes: Mapping[str, Any], line: str
) -> None:
    stopped_copy(shared, tmp_path / "run")
    path = changed_model(shared, tmp_path / "model", **changes)
    with pytest.raises(ValueError) as error:
        train(settings(shared, tmp_path / "run", model__path=path))
    assert f"\n  config.json, {line}" in str(error.value)


def test_resume_with_other_validation_pairs_is_refused(shared: Path, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "eval.jsonl", rows(3, seed=5))
    some = settings(shared, tmp_path / "run", data__eval=[held_out], data__eval_fraction=0)
    interrupt(some, 2)
    shutil.move(held_out, tmp_path / "moved.jsonl")
    moved = settings(
        shared,
        tmp_path / "run",
        data__eval=[str(tmp_path / "moved.jsonl")],
        data__eval_fraction=0,
    )
    old, new = Trainer.open(moved), tmp_path / "moved.jsonl"
    assert identity_changes(old.identity, Trainer.open(moved).identity) == []
    write_rows(new, rows(3, seed=6))
    with pytest.raises(ValueError, match="\n  validation_pairs: not what the checkpoint"):
        train(moved)


def test_resume_with_a_pair_that_changed_its_set_is_refused_where_sets_are_mixed(
    shared: Path, tmp_path: Path
) -> None:
    """All pairs are the same and in the same order, but how often each is visited is not."""
    some = rows(12)

    def mixed(first: int) -> Config:
        files = [
            write_rows(tmp_path / f"a{first}.jsonl", some[:first]),
            write_rows(tmp_path / f"b{first}.jsonl", some[first:]),
        ]
        return settings(
            shared,
            tmp_path / "run",
            data__train=files,
            data__weights=[1.0, 3.0],
            data__eval_fraction=0,
            eval__every=0,
        )

    lines = lines_on_resume(mixed(8), mixed(4))
    assert len(lines) == 1 and lines[0].startswith("sources: not what the checkpoint")


def test_resume_without_the_adapter_that_it_started_from_is_refused(
    shared: Path, tmp_path: Path
) -> None:
    lora = Lora(rank=2, alpha=2.0, rslora=False, targets=("attn/q",))
    for name in ("adapter", "moved"):
        (tmp_path / name).mkdir()
        write_peft(tmp_path / name, model(), random_adapter(model(), lora), lora, base="model")
    from_it = settings(shared, tmp_path / "run", lora__path=str(tmp_path / "adapter"))
    moved = settings(shared, tmp_path / "run", lora__path=str(tmp_path / "moved"))
    fresh = settings(
        shared, tmp_path / "run", lora__rank=2, lora__alpha=2.0, lora__targets=["q_proj"]
    )
    assert lines_on_resume(from_it, moved) == []
    assert lines_on_resume(from_it, fresh)[-1].startswith("adapter: not what the checkpoint")
    assert lines_on_resume(fresh, from_it)[-1].startswith("adapter: not what the checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 2},
        pytest.param({"data__share_prefix": False}, marks=pytest.mark.slow),
        pytest.param({"data__packed_length": 128}, marks=pytest.mark.slow),
    ],
)
def test_with_a_router_loss_mesh_and_packing_must_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    write_model(tmp_path / "model", **MOE)
    write_rows(tmp_path / "rows.jsonl", rows(13))
    first = Trainer.open(settings(tmp_path, tmp_path / "run"))
    assert first.config.loss.router_aux_coef == 0.1
    without = Trainer.open(settings(tmp_path, tmp_path / "run", loss__router_aux_coef=0.0))
    if "rows" in change:
        monkeypatch.setattr("jaxdpo.distributed.sharding.num_row_shards", lambda mesh: 2)
        change = {}
    other = Trainer.open(settings(tmp_path, tmp_path / "run", **change))
    free = Trainer.open(settings(tmp_path, tmp_path / "run", loss__router_aux_coef=0.0, **change))
    (line,) = identity_changes(first.identity, other.identity)
    assert line.startswith("microbatches: 1 sequences of 64 tokens, prompts shared in the")
    assert "loss.router_aux_coef depends on them" in line
    assert identity_changes(without.identity, free.identity) == []
    assert not changed_fields(cli.to_dict(first.config), cli.to_dict(other.config))
