"""Exported folders in transformers and PEFT, for every family: they compute what was trained."""

from pathlib import Path

import numpy as np
import pytest

from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.hf.model_card import Card
from jaxdpo.models.hf.save_folder import export_model
from tests.families import TINY, raw_config, tiny
from tests.test_export_lora import SCALE, lora_run, run_export
from tests.tiny import params

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
from tests.models.hf.test_peft_parity import ours, theirs  # noqa: E402
from tests.theirs import read  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", TINY)
def test_all_weights(tmp_path: Path, name: str) -> None:
    config, out = tiny(name), tmp_path / "out"
    export_model(
        out,
        config,
        params(3, config),
        card=Card(base_model="tiny"),
        raw_config=raw_config(name),
        max_shard_bytes=50_000,
    )
    assert len(list(out.glob("model-*.safetensors"))) > 1 and load_model_config(out) == config
    np.testing.assert_allclose(
        theirs(read(out)), ours(params(3, config), config, 1.0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", TINY)
def test_adapters(tmp_path: Path, name: str) -> None:
    """Over the base and merged into it, in PEFT and here: one function, and not the base's."""
    run, config = lora_run(tmp_path, name), tiny(name)
    for form in ("adapter", "merged"):
        assert run_export(run, tmp_path / form, f"form={form}") == 0
    base = load_params(tmp_path / "base", config, None, "float32")
    wanted = ours(base | {"lora": restore_params(run)[1]}, config, SCALE)
    np.testing.assert_allclose(
        theirs(peft.PeftModel.from_pretrained(read(tmp_path / "base"), tmp_path / "adapter")),
        wanted,
        rtol=1e-4,
        atol=1e-4,
    )
    np.testing.assert_allclose(theirs(read(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - ours(base, config, 1.0)).max() > 0.01


def test_an_adapter_finds_its_base_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = lora_run(tmp_path), tiny("llama")
    assert run_export(run, tmp_path / "out") == 0
    # It names the base's folder without the path, which is that of the exporting machine.
    monkeypatch.chdir(tmp_path)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    weights = load_params(tmp_path / "base", config, None, "float32") | {
        "lora": restore_params(run)[1]
    }
    np.testing.assert_allclose(theirs(model), ours(weights, config, SCALE), rtol=1e-4, atol=1e-4)
