"""`python -m jaxdpo.export`: from a run folder to a Hugging Face folder."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jaxdpo import export
from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.config import cli
from jaxdpo.config.data_options import DataSection
from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import Config, ModelSection
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf import save_folder
from jaxdpo.models.hf.config_json import load_model_config, to_hf
from jaxdpo.models.hf.load_save import load_params, weight_table
from jaxdpo.models.hf.model_card import Card

MODEL = ModelConfig(
    family="qwen2",
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=24,
    max_positions=64,
    tied_head=True,
    qkv_bias=True,
)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def random_params(seed: int) -> dict[str, Any]:
    rng, params = np.random.default_rng(seed), {}
    for row in weight_table(MODEL):
        *parents, last = row.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = rng.standard_normal(row.full_shape, dtype=np.float32)
    return params


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3 and 6, started from a folder beside it."""
    source, run = tmp_path / "base-model", tmp_path / "run"
    source.mkdir()
    raw = to_hf(
        MODEL, {"eos_token_id": 5, "_name_or_path": "/home/someone/model"}, dtype="bfloat16"
    )
    (source / "config.json").write_text(json.dumps(raw))
    (source / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 3, "content": "<s>"}, {"id": 4, "content": "</s>"}]})
    )
    (source / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "old"})
    )
    (source / "evil.py").write_text("")
    config = Config(
        run_dir=str(run),
        model=ModelSection(path=str(source)),
        data=DataSection(
            train=[str(tmp_path / "secret" / "pairs.jsonl"), "hh-rlhf/harmless-base:train:500"]
        ),
        loss=LossSection(name=["sigmoid", "sft"], weights=[1.0, 0.5]),
    )
    with Checkpoints(run) as checkpoints:
        for step in (3, 6):
            checkpoints.save(
                step,
                {
                    "params": jax.tree.map(jax.numpy.asarray, random_params(step)),
                    "step": np.int32(step),
                },
                {},
            )
    (run / "config.yaml").write_text(cli.to_yaml(config))
    rows = [
        {"step": step, "loss": 0.7 - step / 100, "rewards/margins": step / 10, "epoch": 0.1}
        for step in range(1, 7)
    ]
    rows += [
        {"step": 3, "eval/loss": 0.5},
        {"step": 6, "eval/loss": math.nan},
        {"step": 7, "loss": 9.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{torn\n")
    return run


def run_export(*arguments: str) -> int:
    return export.main(list(arguments))


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_newest_step_is_exported_in_the_dtype_of_the_base_model(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "models" / "out"
    assert run_export(f"run_dir={run_dir}", f"out={out}") == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and not list(out.parent.glob(".*"))
    assert load_model_config(out) == MODEL
    raw = json.loads((out / "config.json").read_text())
    assert raw["dtype"] == "bfloat16" and raw["eos_token_id"] == 5 and "_name_or_path" not in raw
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 3,
        "eos_token_id": 5,
    }
    params = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), random_params(6))
    assert_equal(load_params(out, MODEL, None, "bfloat16"), params)


def test_step_dtype_and_shards_can_be_chosen(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert (
        run_export(
            f"run_dir={run_dir}", f"out={out}", "step=3", "dtype=float32", "max_shard_bytes=8000"
        )
        == 0
    )
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert_equal(load_params(out, MODEL, None, "float32"), random_params(3))
    card = (out / "README.md").read_text()
    assert "| steps | 3 |" in card and "| loss | 0.67 |" in card and "| eval/loss | 0.5 |" in card


def test_model_card_describes_the_run_without_private_paths(run_dir: Path, tmp_path: Path) -> None:
    assert run_export(f"run_dir={run_dir}", f"out={tmp_path / 'out'}") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "jaxdpo"],
    }
    for line in (
        "base-model",
        "pairs.jsonl, hh-rlhf/harmless-base:train:500",
        "| beta | 0.1 |",
        "1.0 x sigmoid, 0.5 x sft",
        "| steps | 6 |",
    ):
        assert line in body, line
    assert "| rewards/margins | 0.6 |" in body and "nan" not in body and "epoch" not in body
    assert str(tmp_path) not in "".join(
        path.read_text()
        for path in (tmp_path / "out").glob("*.[jm]*")
        if path.suffix != ".safetensors"
    )


def test_own_files_of_the_run_and_chat_template(run_dir: Path, tmp_path: Path) -> None:
    """The copy in the run folder is enough: the base model may be gone."""
    shutil.move(tmp_path / "base-model", run_dir / "model")
    (run_dir / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (run_dir / "model" / "chat_template.jinja").write_text("kept")
    assert run_export(f"run_dir={run_dir}", f"out={tmp_path / 'out'}") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [5, 6]
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "kept"


def test_chat_template_of_the_config_replaces_the_tokenizers(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        text.replace("chat_template: null", f"chat_template: {tmp_path / 'mine.jinja'}")
    )
    assert run_export(f"run_dir={run_dir}", f"out={tmp_path / 'out'}") == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
        == TEMPLATE
    )


def test_a_tokenizer_object_saves_itself(tmp_path: Path) -> None:
    class Saver:
        def save_pretrained(self, save_directory: str) -> None:
            (Path(save_directory) / "tokenizer.json").write_text(
                json.dumps({"added_tokens": [{"id": 7, "content": "</s>"}]})
            )
            (Path(save_directory) / "tokenizer_config.json").write_text(
                json.dumps({"eos_token": "</s>"})
            )

    save_folder.export_model(
        tmp_path / "out",
        MODEL,
        random_params(0),
        card=Card(base_model="made here"),
        tokenizer=Saver(),
    )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 7
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("change", ["occupied", "file", "no run", "options", "form", "old config"])
def test_wrong_options_are_exit_code_2(
    run_dir: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    arguments = [f"run_dir={run_dir}", f"out={out}"]
    if change == "occupied":
        out.mkdir()
        (out / "mine").write_text("keep me")
    elif change == "file":
        out.write_text("keep me")
    elif change == "no run":
        arguments[0] = f"run_dir={tmp_path / 'nothing'}"
    elif change == "form":
        arguments += ["form=merged", "base=somewhere"]
    elif change == "old config":
        (run_dir / "config.yaml").write_text("model: {kind: llama}\n")
    else:
        arguments += ["step=-1", "max_shard_bytes=0", "dtyp=float32", "private=false"]
    with pytest.raises(SystemExit) as exit_:
        run_export(*arguments)
    err = capsys.readouterr().err
    expected = {
        "occupied": ["is not empty"],
        "file": ["is not a folder"],
        "no run": ["has no config.yaml"],
        "form": [
            "form=merged: the run trained all weights",
            "base=somewhere: the run trained all weights",
        ],
        "old config": ["is not a config of this version of jaxdpo", "model.kind"],
        "options": ["step=-1", "dtype", "private=false: does nothing by itself"],
    }
    assert exit_.value.code == 2 and all(text in err for text in expected[change])
    assert not out.exists() or "keep me" in ((out / "mine") if out.is_dir() else out).read_text()


def test_a_checkpoint_deleted_while_it_is_read_is_an_error(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in progress deletes its older checkpoints; missing weights must not count as zeros."""
    write_config = save_folder.write_json

    def delete_first(path: Path, content: Any) -> None:
        shutil.rmtree(run_dir / "checkpoints" / "3", ignore_errors=True)
        write_config(path, content)

    monkeypatch.setattr(save_folder, "write_json", delete_first)
    with pytest.raises(
        ValueError, match=r"step=3: was deleted while it was read, by a run that goes on"
    ):
        export.export_run(
            export.ExportConfig(run_dir=str(run_dir), out=str(tmp_path / "out"), step=3)
        )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_nothing_is_left_behind_when_export_fails(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "out"
    assert run_export(f"run_dir={run_dir}", f"out={out}", "step=4") == 1
    assert "step=4: there is no such checkpoint" in capsys.readouterr().err
    raw = json.loads((tmp_path / "base-model" / "config.json").read_text())
    (tmp_path / "base-model" / "config.json").write_text(json.dumps(raw | {"hidden_size": 32}))
    assert run_export(f"run_dir={run_dir}", f"out={out}") == 1
    assert "has shape" in capsys.readouterr().err
    assert not out.exists() and not (out.parent.exists() and list(out.parent.iterdir()))
