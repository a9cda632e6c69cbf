"""What a run or a resume refuses before its first step."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxdpo.config.schema import Config
from jaxdpo.models.hf.peft import write_peft
from jaxdpo.models.lora import Lora
from jaxdpo.training.loop import train
from jaxdpo.training.startup_checks import FREE_FIELDS, changed_fields
from jaxdpo.training.trainer import Trainer
from tests.models.test_lora import random_adapter
from tests.runs import interrupt, replaced, settings, untimed
from tests.tiny import model, rows, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def halfway(shared: Path) -> Config:
    """A run that was stopped after its second step."""
    some = settings(shared, shared / "halfway")
    interrupt(some, 2)
    return some


def test_resume_with_another_config_is_refused_with_every_field(halfway: Config) -> None:
    other = replaced(
        halfway,
        optim={"learning_rate": 0.5},
        loss={"beta": 0.3},
        log={"every": 2},
        train={"steps": 9},
    )
    with pytest.raises(ValueError) as caught:
        train(other)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"run_dir={halfway.run_dir}: holds checkpoints of a different run:"
    assert lines[1:-1] == [
        "  loss.beta: 0.1 in the checkpoint, 0.3 now",
        "  optim.learning_rate: 0.001 in the checkpoint, 0.5 now",
        "  train.steps: 8 in the checkpoint, 9 now. A run may get more steps when it is finished: "
        "let it end first",
    ]


def test_resume_with_another_compute_dtype_is_refused_although_both_say_auto(
    halfway: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_on_a_gpu(some: Config, mesh: object) -> Config:
        return replaced(some, model={"compute_dtype": "bfloat16"})

    monkeypatch.setattr("jaxdpo.training.resolve.resolve_dtype", as_on_a_gpu)
    with pytest.raises(
        ValueError, match=r"model.compute_dtype: float32 in the checkpoint, bfloat16 now"
    ):
        train(halfway)


@pytest.mark.parametrize(
    ("what", "key"),
    [
        ("rows", "pairs"),
        ("weights", "weights"),
        ("tokenizer", "tokenizer"),
        ("template", "chat_template"),
    ],
)
def test_resume_with_other_data_or_models_is_refused(
    halfway: Config, shared: Path, what: str, key: str
) -> None:
    folder = Path(str(halfway.model.path))
    path = {
        "rows": shared / "rows.jsonl",
        "weights": folder / "model.safetensors",
        "tokenizer": folder / "tokenizer.json",
        "template": folder / "tokenizer_config.json",
    }[what]
    before = path.read_bytes()
    changes = {
        "rows": lambda: write_rows(
            path, [*rows(12), {"prompt": "w1", "chosen": " w2", "rejected": " w3"}]
        ),
        "weights": lambda: write_model(folder, seed=5),
        "tokenizer": lambda: path.write_bytes(
            before.replace(b'"w63": 63', b'"w63": 63, "w64": 63')
        ),
        "template": lambda: path.write_text(
            json.dumps(json.loads(before) | {"chat_template": "{{ messages }}"})
        ),
    }
    try:
        changes[what]()
        with pytest.raises(
            ValueError, match=f"\n  {key}: not what the checkpoint was trained with"
        ):
            train(halfway)
    finally:
        path.write_bytes(before)
    Trainer.open(halfway)


@pytest.mark.slow
def test_resume_with_another_starting_adapter_is_refused(shared: Path, tmp_path: Path) -> None:
    lora = Lora(rank=2, alpha=2.0, rslora=False, targets=("attn/q",))
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", model(), random_adapter(model(), lora), lora, base="model")
    some = settings(shared, tmp_path / "run", lora__path=str(tmp_path / "adapter"), eval__every=0)
    interrupt(some, 2)
    write_peft(
        tmp_path / "adapter", model(), random_adapter(model(), lora, 0.2), lora, base="model"
    )
    with pytest.raises(ValueError, match="\n  adapter: not what the checkpoint was trained with"):
        train(some)


def test_pair_weights_are_refused_by_losses_that_mix_pairs(shared: Path, tmp_path: Path) -> None:
    weighted = write_rows(
        tmp_path / "rows.jsonl", [row | {"weight": 1 + i % 2} for i, row in enumerate(rows(13))]
    )
    with pytest.raises(
        ValueError,
        match=r"loss.name=aot: .* the rows of data.train differ in their column 'weight'",
    ):
        Trainer.open(settings(shared, tmp_path, data__train=[weighted], loss__name="aot"))
    Trainer.open(settings(shared, tmp_path, data__train=[weighted]))
    Trainer.open(settings(shared, tmp_path, loss__name="aot"))


def test_margins_are_trained_on_or_refused(shared: Path, tmp_path: Path) -> None:
    wide = write_rows(tmp_path / "rows.jsonl", [row | {"margin": 0.5} for row in rows(13)])
    with pytest.raises(
        ValueError,
        match=r"loss.name=ipo: has no logit to take a margin from, and rows of data.train have one",
    ):
        Trainer.open(settings(shared, tmp_path, data__train=[wide], loss__name="ipo"))
    assert train(settings(shared, tmp_path, data__train=[wide])) is True
    first = next(row for row in untimed(tmp_path) if row.get("step") == 1 and "loss" in row)
    assert first["loss"] == pytest.approx(np.log1p(np.exp(0.5)), rel=1e-5), (
        "the loss of policy == reference at this margin"
    )


def test_every_option_that_a_resume_may_change_exists_and_is_in_the_docs() -> None:
    options, docs = dataclasses.asdict(Config()), (ROOT / "docs/checkpoints.md").read_text()
    for path in FREE_FIELDS:
        section, _, name = path.partition(".")
        assert section in options and (not name or name in options[section]), path
        assert f"`{path}*`" in docs or f"`{path}`" in docs, path


def test_changed_fields_names_what_changes_the_result_and_nothing_else() -> None:
    saved = {
        "seed": 0,
        "run_dir": "a",
        "optim": {"b1": 0.9, "old": 1},
        "log": {"every": 1},
        "data": {"train": ["x"], "weights": [1.0]},
        "mesh": {"data": 8},
    }
    current = {
        "seed": 0,
        "run_dir": "b",
        "optim": {"b1": 0.95, "new": 2},
        "log": {"every": 5},
        "data": {"train": ("moved/x",), "weights": (1.0,)},
        "mesh": {"data": 1},
    }
    assert changed_fields(saved, saved) == []
    assert changed_fields(saved, current) == [
        ("optim.b1", 0.9, 0.95),
        ("optim.new", "(absent)", 2),
        ("optim.old", 1, "(absent)"),
    ]
