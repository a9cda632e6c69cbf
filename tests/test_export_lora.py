"""Exports of runs that trained an adapter: PEFT's folder, or merged into the base."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxdpo import export
from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.config import cli as options
from jaxdpo.config.schema import Config, LoraSection, ModelSection
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward
from jaxdpo.models.hf.config_json import load_model_config, to_hf
from jaxdpo.models.hf.folder import copy_model_files, set_chat_template, write_json
from jaxdpo.models.hf.load_save import load_params, save_params
from jaxdpo.models.hf.lora_targets import lora_of
from jaxdpo.models.hf.peft import read_peft
from jaxdpo.models.hf.weight_files import weights_fingerprint
from jaxdpo.models.params import Params
from tests.families import quick_and_slow, raw_config, tiny
from tests.models.test_lora import random_adapter
from tests.runs import folder_with_inputs, settings, use_one_device
from tests.runs import train as train_run
from tests.tiny import params, write_model

SCALE = 0.5


def lora_run(folder: Path, name: str = "llama") -> Path:
    """A run in `folder`/run with a random adapter over `folder`/base in its checkpoint."""
    base, run, model = folder / "base", folder / "run", tiny(name)
    targets = ["q", "k", "v", "o"]
    if not model.num_experts:
        targets.append("up")
    lora = LoraSection(rank=3, alpha=3 * SCALE, targets=targets)
    write_model(base, seed=None, vocab_size=model.vocab_size)  # for its tokenizer
    write_json(base / "config.json", to_hf(model, raw_config(name), dtype="float32"))
    save_params(base, model, params(0, model), "float32")
    set_chat_template(base, "{{ messages }}")
    copy_model_files(base, run / "model")
    adapter = jax.tree.map(jnp.asarray, random_adapter(model, lora_of(lora, model)))
    with Checkpoints(run) as checkpoints:
        checkpoints.save(
            5, {"params": adapter}, {"identity": {"weights": weights_fingerprint(base)}}
        )
    config = Config(
        run_dir=str(run), reference="adapter_off", model=ModelSection(path=str(base)), lora=lora
    )
    (run / "config.yaml").write_text(options.to_yaml(config))
    return run


def run_export(run: Path, out: Path, *more: str) -> int:
    return export.main([f"run_dir={run}", f"out={out}", *more])


def hidden(folder: Path, weights: Params, scale: float = 1.0) -> np.ndarray:
    """What a model computes of a few tokens."""
    tokens = (jnp.arange(12, dtype=jnp.int32)[None] * 7) % 60
    slots = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), tokens.shape)
    forward_options = ForwardOptions(attention="dense", lora_scale=scale)
    return np.asarray(
        forward(
            weights,
            load_model_config(folder),
            tokens,
            slots,
            jnp.zeros_like(slots),
            slots + 1,
            forward_options,
        )
    )


# --- what is written ---


def test_the_adapter_alone_is_a_peft_folder(tmp_path: Path) -> None:
    run, out = lora_run(tmp_path), tmp_path / "out"
    assert run_export(run, out) == 0
    weights, beside = (
        {"adapter_config.json", "adapter_model.safetensors"},
        {"tokenizer.json", "tokenizer_config.json", "README.md"},
    )
    assert {path.name for path in out.iterdir()} == weights | beside | {"chat_template.jinja"}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"] and (
        saved["r"],
        saved["lora_alpha"],
    ) == (3, 1.5)
    assert (
        saved["base_model_name_or_path"] == "base"
        and str(tmp_path) not in (out / "adapter_config.json").read_text()
        and saved["task_type"] == "CAUSAL_LM"
    )
    found = read_peft(out, tiny("llama"))
    for ours, theirs in zip(
        jax.tree.leaves(restore_params(run)[1]), jax.tree.leaves(found.adapter), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    head, body = (out / "README.md").read_text().split("---\n")[1:]
    assert yaml.safe_load(head)["library_name"] == "peft" and str(tmp_path) not in head + body
    assert (
        "| base model | base |" in body
        and "| adapter | LoRA, rank 3, alpha 1.5, on q, k, v, o, up |" in body
        and "| steps | 5 |" in body
    )


@pytest.mark.parametrize("name", quick_and_slow(["llama", "gpt2", "gpt_oss"]))
def test_the_merged_model_computes_what_the_adapter_over_the_base_does(
    tmp_path: Path, name: str
) -> None:
    run, out, model = lora_run(tmp_path, name), tmp_path / "out", tiny(name)
    assert run_export(run, out, "form=merged", "max_shard_bytes=60000") == 0
    base = load_params(tmp_path / "base", model, None, "float32")
    merged = load_params(out, load_model_config(out), None, "float32")
    got, wanted = (
        hidden(out, merged),
        hidden(tmp_path / "base", base | {"lora": restore_params(run)[1]}, SCALE),
    )
    np.testing.assert_allclose(got, wanted, rtol=3e-4, atol=3e-4)
    assert np.abs(got - hidden(tmp_path / "base", base)).mean() > 0.02
    assert (
        len(list(out.glob("model-*.safetensors"))) > 1
        and not (out / "adapter_config.json").exists()
    )
    np.testing.assert_array_equal(merged["embed"]["weight"], base["embed"]["weight"])
    assert "| adapter, merged | LoRA, rank 3, alpha 1.5, on q, k" in (out / "README.md").read_text()


def test_merged_weights_have_the_dtype_asked_for(tmp_path: Path) -> None:
    """A change too small for the base's type is kept where the file's type is larger."""
    run = lora_run(tmp_path)
    base = load_params(tmp_path / "base", tiny("llama"), None, "bfloat16")
    save_params(tmp_path / "base", tiny("llama"), base, "bfloat16")
    write_json(
        tmp_path / "base/config.json", to_hf(tiny("llama"), raw_config("llama"), dtype="bfloat16")
    )
    shutil.copy(tmp_path / "base/config.json", run / "model/config.json")
    change_meta(run, {"identity": {"weights": weights_fingerprint(tmp_path / "base")}})
    assert (
        run_export(run, tmp_path / "auto", "form=merged") == 0
        and run_export(run, tmp_path / "wide", "form=merged", "dtype=float32") == 0
    )
    short, wide = (
        load_params(tmp_path / name, tiny("llama"), None, "float32")["layers"]["attn"]["q"]
        for name in ("auto", "wide")
    )
    assert json.loads((tmp_path / "auto/config.json").read_text())["dtype"] == "bfloat16"
    np.testing.assert_array_equal(np.asarray(wide).astype(jnp.bfloat16).astype(np.float32), short)
    assert not np.array_equal(wide, short)


@pytest.mark.slow
def test_a_qlora_run_is_exported_as_adapter_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `train` on, with QLoRA: merged into the weights of model.path, not quantised ones."""
    use_one_device(monkeypatch)
    shared = folder_with_inputs(tmp_path)
    more = {
        "lora__rank": 4,
        "lora__rslora": True,
        "optim__learning_rate": 1e-2,
        "model__quantize": "int8",
        "eval__every": 0,
        "train__steps": 2,
    }
    assert train_run(settings(shared, tmp_path / "run", **more))
    assert (
        run_export(tmp_path / "run", tmp_path / "adapter") == 0
        and run_export(tmp_path / "run", tmp_path / "merged", "form=merged") == 0
    )
    model = load_model_config(tmp_path / "model")
    found = read_peft(tmp_path / "adapter", model)
    assert found.lora.scale == 16.0 / 2.0 and (tmp_path / "adapter" / "tokenizer.json").is_file()
    base = load_params(tmp_path / "model", model, None, "float32")
    merged = load_params(tmp_path / "merged", model, None, "float32")
    wanted = hidden(tmp_path / "model", base | {"lora": found.adapter}, found.lora.scale)
    np.testing.assert_allclose(hidden(tmp_path / "merged", merged), wanted, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(merged["layers"]["attn"]["q"], base["layers"]["attn"]["q"])
    assert "| base while training | int8 |" in (tmp_path / "merged" / "README.md").read_text()


# --- the base ---


def test_a_base_that_moved_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = lora_run(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert run_export(run, tmp_path / "out", "form=merged") == 1
    err = capsys.readouterr().err
    assert (
        "the base under the run's adapter is missing. Say where it is: base=<folder or hub id>"
        in err
        and "Traceback" not in err
    )
    assert not (tmp_path / "out").exists()
    assert run_export(run, tmp_path / "out", "form=merged", f"base={tmp_path / 'elsewhere'}") == 0
    assert run_export(run, tmp_path / "adapter", f"base={tmp_path / 'elsewhere'}") == 0
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "elsewhere"


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_base_that_changed_is_refused(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture
) -> None:
    run = lora_run(tmp_path)
    save_params(tmp_path / "base", tiny("llama"), params(1, tiny("llama")), "float32")
    assert run_export(run, tmp_path / "out", f"form={form}") == 1
    assert (
        f"base={tmp_path / 'base'}: has other weights than the adapter was trained on (hash "
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_hub_base_is_named_with_its_revision_and_not_fetched(tmp_path: Path) -> None:
    run = lora_run(tmp_path)
    shutil.rmtree(tmp_path / "base")
    change_config(run, model={"path": "org/base", "revision": "v2"})
    assert run_export(run, tmp_path / "out") == 0
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/base", "v2")
    assert (
        yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])["base_model"]
        == "org/base"
    )


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["form=full"], "form=full: the run trained an adapter. Use form=merged or form=adapter"),
        (["dtype=bfloat16"], "dtype=bfloat16: an adapter alone is float32"),
        (["form=adapter", "max_shard_bytes=9"], "max_shard_bytes=9: an adapter alone is one file"),
        (
            ["push_to=me/mine"],
            "push_to=me/mine: the adapter would name a folder of this machine as its base",
        ),
    ],
)
def test_options_that_do_not_fit_an_adapter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    run = lora_run(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run_export(run, tmp_path / "out", *options)
    assert exit_.value.code == 2 and complaint in capsys.readouterr().err


def change_meta(run: Path, meta: dict[str, Any]) -> None:
    (run / "checkpoints/5/meta.json").write_text(json.dumps(meta))
    (run / "checkpoints/5/manifest.json").write_text(json.dumps({"sha256": {}}))


def change_config(run: Path, **sections: dict[str, Any]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(
        yaml.safe_dump(config | {name: config[name] | fields for name, fields in sections.items()})
    )


UNRESOLVED = {"rank": 0, "alpha": None, "targets": None, "path": "somewhere"}
MISMATCHES = {
    "of an older version": (
        lambda run: change_meta(run, {"step": 5}),
        "does not say which base its adapter belongs to",
    ),
    "other rank": (
        lambda run: change_config(run, lora={"rank": 4}),
        "saved it:\n  layers/attn/k/a: must be [4, 32, 4], is [4, 32, 3]",
    ),
    "other targets": (
        lambda run: change_config(run, lora={"targets": ["q", "down"]}),
        "layers/mlp/down/a: must be [4, 64, 3], is absent",
    ),
    "rank left open": (
        lambda run: change_config(run, lora=UNRESOLVED),
        "does not hold the adapter of its config.yaml",
    ),
    "random base": (
        lambda run: change_config(run, model={"init": "random"}),
        "model.init=random: the run's base was drawn at random",
    ),
}


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize("case", MISMATCHES)
def test_an_adapter_that_does_not_fit_the_run_is_an_error(
    tmp_path: Path, case: str, form: str, capsys: pytest.CaptureFixture
) -> None:
    run = lora_run(tmp_path)
    change, complaint = MISMATCHES[case]
    change(run)
    assert run_export(run, tmp_path / "out", f"form={form}") == 1
    err = capsys.readouterr().err
    assert complaint in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_checkpoint_of_all_weights_in_an_adapters_run_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = lora_run(tmp_path)
    shutil.rmtree(run / "checkpoints")
    with Checkpoints(run) as checkpoints:
        checkpoints.save(5, {"params": jax.tree.map(jnp.asarray, params(0, tiny("llama")))}, {})
    assert run_export(run, tmp_path / "out") == 1
    assert "embed/weight: must be absent, is [96, 32]" in capsys.readouterr().err
