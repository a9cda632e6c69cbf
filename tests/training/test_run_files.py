"""The files that a run writes before its first step."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jaxdpo.training.run_files import write_inputs
from jaxdpo.training.trainer import Trainer
from tests.inference.models import STOP, write_chat_model
from tests.tiny import config, rows, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_device")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def model_of_run(folder: Path) -> Path:
    """The model/ that a run on folder/model and its rows writes."""
    spelled = [row for row in rows(30) if "w63" not in str(row)]
    write_rows(folder / "rows.jsonl", spelled)
    trainer = Trainer.open(config(folder))
    write_inputs(trainer, folder / "run")
    return folder / "run" / "model"


@pytest.mark.parametrize("named", [None, 0, [0, 5], [STOP]])
@pytest.mark.parametrize("has_map", [False, True])
def test_every_file_names_the_end_tokens_of_the_training(
    tmp_path: Path, named: Any, has_map: bool
) -> None:
    write_chat_model(tmp_path / "model")
    if named is not None:
        (tmp_path / "model" / "generation_config.json").write_text(
            json.dumps({"eos_token_id": named, "top_p": 0.5})
        )
    if has_map:
        (tmp_path / "model" / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    model = model_of_run(tmp_path)
    wanted = {0, STOP} | set(named if isinstance(named, list) else [])
    generation = read(model / "generation_config.json")
    assert set(generation["eos_token_id"]) == wanted
    assert generation.get("top_p") == (None if named is None else 0.5)
    assert set(read(model / "config.json")["eos_token_id"]) == wanted
    assert read(model / "tokenizer_config.json")["eos_token"] == "<|stop|>"
    assert AutoTokenizer.from_pretrained(model).eos_token_id == STOP
    # The model that the run started from is left as it was.
    assert read(tmp_path / "model" / "config.json")["eos_token_id"] == 0
    assert read(tmp_path / "model" / "tokenizer_config.json")["eos_token"] == "<|end|>"


def test_one_end_token_that_all_files_name_leaves_them_alone(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    model = model_of_run(tmp_path)
    for name in ("config.json", "tokenizer_config.json"):
        assert (model / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(model).eos_token_id == 0
