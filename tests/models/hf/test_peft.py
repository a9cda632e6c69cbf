"""Adapters as PEFT's files: what is written is read back, what does not fit is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdpo.config.schema import LoraSection
from jaxdpo.models.hf.lora_targets import lora_of
from jaxdpo.models.hf.peft import CONFIG, WEIGHTS, adapter_fingerprint, read_peft, write_peft
from jaxdpo.models.lora import Lora, by_target, merge
from tests.families import TINY, tiny
from tests.models.test_lora import random_adapter
from tests.tiny import params

FUSED = ("phi3", "gpt2")


def lora(name: str, **options: Any) -> Lora:
    return lora_of(LoraSection(**{"rank": 4, "alpha": 6.0, **options}), tiny(name))


def written(folder: Path, name: str, **options: Any) -> tuple[Any, Lora]:
    """A random adapter, written into the folder."""
    some = lora(name, **options)
    adapter = random_adapter(tiny(name), some)
    folder.mkdir(exist_ok=True)
    assert write_peft(folder, tiny(name), adapter, some, base="org/base") == [
        folder / CONFIG,
        folder / WEIGHTS,
    ]
    return adapter, some


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True}, {"targets": ["q", "v"]}, {"targets": ["up"]}], ids=str
)
@pytest.mark.parametrize("name", TINY)
def test_what_is_written_is_read_back(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    if options.get("targets") == ["up"] and tiny(name).num_experts:
        pytest.skip("its MLPs are experts")
    adapter, some = written(tmp_path, name, **options)
    found = read_peft(tmp_path, tiny(name))
    assert (found.lora, found.base) == (some, "org/base")
    assert jax.tree.structure(found.adapter) == jax.tree.structure(adapter)
    for ours, theirs in zip(jax.tree.leaves(found.adapter), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_files_are_what_peft_writes(tmp_path: Path) -> None:
    adapter, _ = written(tmp_path, "llama", targets=["q", "down"])
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert (config["peft_type"], config["task_type"], config["bias"]) == (
        "LORA",
        "CAUSAL_LM",
        "none",
    )
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, False)
    assert config["target_modules"] == ["down_proj", "q_proj"] and not config["fan_in_fan_out"]
    assert (
        config["base_model_name_or_path"] == "org/base"
        and config["rank_pattern"] == config["alpha_pattern"] == {}
    )
    stem = "base_model.model.model.layers.2.self_attn.q_proj."
    np.testing.assert_array_equal(
        tensors[stem + "lora_A.weight"], adapter["layers"]["attn"]["q"]["a"][2].T
    )
    np.testing.assert_array_equal(
        tensors[stem + "lora_B.weight"], adapter["layers"]["attn"]["q"]["b"][2].reshape(4, -1).T
    )
    assert len(tensors) == 2 * 2 * 4


def test_projections_of_one_module_are_written_as_one_adapter(tmp_path: Path) -> None:
    adapter, _ = written(tmp_path, "phi3")
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert (config["r"], config["lora_alpha"]) == (12, 18)
    assert config["rank_pattern"] == {"o_proj": 4, "gate_up_proj": 8, "down_proj": 4}
    assert config["alpha_pattern"] == {"o_proj": 6, "gate_up_proj": 12, "down_proj": 6}
    stem = "base_model.model.model.layers.0.self_attn.qkv_proj."
    change = tensors[stem + "lora_B.weight"] @ tensors[stem + "lora_A.weight"]
    parts = [
        np.einsum("ir,rnh->nhi", update["a"][0], update["b"][0])
        for update in (adapter["layers"]["attn"][name] for name in "qkv")
    ]
    np.testing.assert_allclose(
        change, np.concatenate([part.reshape(-1, 32) for part in parts]), rtol=1e-5, atol=1e-6
    )


def test_gpt2s_two_c_proj_modules_are_distinguished(tmp_path: Path) -> None:
    written(tmp_path / "o", "gpt2", targets=["o"])
    config = json.loads((tmp_path / "o" / CONFIG).read_text())
    assert (
        config["target_modules"] == ["attn.c_proj"] and config["fan_in_fan_out"]
    )  # c_proj alone would mean the MLP's too
    written(tmp_path / "both", "gpt2", targets=["c_proj", "c_attn"])
    assert json.loads((tmp_path / "both" / CONFIG).read_text())["target_modules"] == [
        "c_attn",
        "c_proj",
    ]
    assert set(load_file(tmp_path / "o" / WEIGHTS)) == {
        f"base_model.model.transformer.h.{layer}.attn.c_proj.lora_{factor}.weight"
        for layer in range(4)
        for factor in "AB"
    }


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_module_that_peft_trained_is_split_exactly(tmp_path: Path, name: str) -> None:
    """As PEFT trains it: one A for q, k and v, and a full B."""
    config, some = tiny(name), lora(name, targets=["q", "k", "v"])
    written(tmp_path, name, targets=["q", "k", "v"])
    rng, tensors = np.random.default_rng(0), load_file(tmp_path / WEIGHTS)
    whole = {
        key: rng.standard_normal((4, 32) if "lora_A" in key else (len(value), 4)).astype(np.float32)
        for key, value in tensors.items()
    }
    save_file(whole, tmp_path / WEIGHTS)
    raw = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(raw | {"r": 4, "lora_alpha": 6}))
    found = read_peft(tmp_path, config)
    assert found.lora == some
    base = params(0, config)
    merged = merge(base, found.adapter, some.scale)
    for layer in range(4):
        stem = next(iter(whole)).replace(".0.", f".{layer}.").rsplit(".lora_", 1)[0]
        wanted = some.scale * whole[f"{stem}.lora_B.weight"] @ whole[f"{stem}.lora_A.weight"]
        got = [
            np.asarray(merged["layers"]["attn"][part][layer] - base["layers"]["attn"][part][layer])
            .reshape(32, -1)
            .T
            for part in "qkv"
        ]
        np.testing.assert_allclose(np.concatenate(got), wanted, rtol=1e-4, atol=1e-4)


def test_other_ranks_and_alphas_of_single_modules_are_understood(tmp_path: Path) -> None:
    config = tiny("llama")
    adapter, _ = written(tmp_path, "llama", targets=["q", "v"])
    tensors = load_file(tmp_path / WEIGHTS)
    halved = {
        key: np.ascontiguousarray(
            value[:2]
            if "v_proj.lora_A" in key
            else value[:, :2]
            if "v_proj.lora_B" in key
            else value
        )
        for key, value in tensors.items()
    }
    save_file(halved, tmp_path / WEIGHTS)
    raw = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(
        json.dumps(raw | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"self_attn.v_proj": 1}})
    )
    found = read_peft(tmp_path, config)
    assert (found.lora.rank, found.lora.scale) == (4, 1.5)
    q, v = (by_target(found.adapter)[f"attn/{name}"] for name in "qv")
    np.testing.assert_array_equal(q["b"], adapter["layers"]["attn"]["q"]["b"])
    cut = adapter["layers"]["attn"]["v"]
    change = 0.5 * np.einsum(
        "lir,lrkh->likh", cut["a"][..., :2], cut["b"][:, :2]
    )  # alpha 1, rank 2
    np.testing.assert_allclose(
        1.5 * np.einsum("lir,lrkh->likh", v["a"], v["b"]), change, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "ranks", "alphas"),
    [
        ("llama", {"model.layers.1.self_attn.q_proj": 2}, {}),
        ("llama", {"layers.0.self_attn.v_proj": 7, "q_proj": 3}, {"layers.2.self_attn.q_proj": 5}),
        ("llama", {}, {"^model.layers.0.self_attn.v_proj": 1}),
        ("phi3", {"layers.3.self_attn.qkv_proj": 5}, {"layers.1.self_attn.qkv_proj": 2}),
        ("gpt2", {"h.0.attn.c_attn": 1, "h.1.attn.c_attn": 6}, {}),
    ],
)
def test_ranks_and_alphas_may_differ_between_layers(
    tmp_path: Path, name: str, ranks: dict[str, int], alphas: dict[str, float]
) -> None:
    config = tiny(name)
    written(tmp_path, name, targets=["q", "k", "v"])
    raw = json.loads((tmp_path / CONFIG).read_text())
    raw |= {"r": 4, "lora_alpha": 6, "rank_pattern": ranks, "alpha_pattern": alphas}
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    rng, tensors, wanted = np.random.default_rng(0), {}, {}
    for key, value in load_file(tmp_path / WEIGHTS).items():
        if "lora_A" not in key:
            continue
        b_key = key.replace("lora_A", "lora_B")
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")

        def named(pattern: dict[str, Any], default: float, module: str = module) -> Any:
            found = [value for end, value in pattern.items() if module.endswith(end.strip("^"))]
            return found[0] if found else default

        rank = named(ranks, 4)
        outputs = load_file(tmp_path / WEIGHTS)[b_key].shape[0]
        tensors[key] = rng.standard_normal((rank, value.shape[1])).astype(np.float32)
        tensors[b_key] = rng.standard_normal((outputs, rank)).astype(np.float32)
        wanted[module] = named(alphas, 6) / rank * tensors[b_key] @ tensors[key]
    save_file(tensors, tmp_path / WEIGHTS)
    found = read_peft(tmp_path, config)
    for module, change in wanted.items():
        layer = int(next(word for word in module.split(".") if word.isdecimal()))
        own = [target for target in ("q", "k", "v") if module.endswith(f"{target}_proj")]
        if not module.endswith(("q_proj", "k_proj", "v_proj")) or "qkv" in module:
            own = ["q", "k", "v"]
        got = []
        for target in own:
            update = by_target(found.adapter)[f"attn/{target}"]
            product = np.einsum("ir,rnh->nhi", update["a"][layer], update["b"][layer])
            got.append(found.lora.scale * product.reshape(-1, product.shape[-1]))
        np.testing.assert_allclose(np.concatenate(got), change, rtol=1e-4, atol=1e-4)


# --- what is refused ---


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(
            json.dumps({key: value for key, value in raw.items() if value is not ...})
        )

    return change


def tensors(
    edit: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> Callable[[Path], None]:
    return lambda folder: save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def one_of(name: str, value: np.ndarray | None) -> Callable[[Path], None]:
    def edit(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rest = {key: array for key, array in found.items() if key != name}
        return rest if value is None else rest | {name: value}

    return tensors(edit)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
CORRUPT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "pickle only": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "adapter_model.bin may run code when opened",
    ),
    "config is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is not valid JSON"),
    "truncated": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5]),
        "its safetensors header is malformed",
    ),
    "prompt tuning": (
        settings(peft_type="PROMPT_TUNING"),
        "peft_type='PROMPT_TUNING': only LORA is implemented",
    ),
    "DoRA": (
        settings(use_dora=True),
        r"use_dora=True: weight-decomposed adapters \(DoRA\) are not implemented",
    ),
    "modules to save": (settings(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
    "bias": (settings(bias="all"), "bias='all': trained biases are not implemented"),
    "PiSSA": (settings(init_lora_weights="pissa_niter_4"), "it changed the base's weights"),
    "rank 0": (settings(r=0), "r=0: must be a whole number above 0"),
    "no rank": (settings(r=...), "r=None: must be a whole number above 0"),
    "alpha a word": (settings(lora_alpha="many"), "lora_alpha='many': must be a number above 0"),
    "a pattern that is an expression": (
        settings(rank_pattern={"(a+)+$": 3}),
        "rank_pattern: must be an object whose keys are names of modules",
    ),
    "another rank": (settings(r=5), r"q_proj.lora_A: has shape \[4, 32\], must have \[5, 32\]"),
    "a wider base": (
        one_of(Q0 + "A.weight", np.zeros((4, 48), np.float32)),
        r"q_proj.lora_A: has shape \[4, 48\], must have \[4, 32\]",
    ),
    "a factor missing": (
        one_of(Q0 + "B.weight", None),
        r"layers.0.self_attn.q_proj.lora_B: is missing, though other layers have it",
    ),
    "a deeper base": (
        one_of(Q0.replace(".0.", ".4.") + "A.weight", np.zeros((4, 32), np.float32)),
        r"not a projection of this model: base_model.model.model.layers.4.self_attn.q_proj.lora_A",
    ),
    "another family": (
        one_of(
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
            np.zeros((4, 32), np.float32),
        ),
        "not a projection of this model: base_model.model.transformer.h.0.attn.c_attn.lora_A",
    ),
    "integers": (
        one_of(Q0 + "A.weight", np.zeros((4, 32), np.int8)),
        "has type I8, which is not implemented",
    ),
    "empty": (tensors(lambda _: {}), "adapter_model.safetensors holds no adapter"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_what_is_no_adapter_for_the_model_is_refused_by_name(tmp_path: Path, case: str) -> None:
    written(tmp_path, "llama", targets=["q", "v"])
    corrupt, told = CORRUPT[case]
    corrupt(tmp_path)
    with pytest.raises(ValueError, match=told) as caught:
        read_peft(tmp_path, tiny("llama"))
    assert str(tmp_path) in str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    written(tmp_path, "llama")
    settings(use_dora=True, bias="all", r=-1)(tmp_path)
    with pytest.raises(ValueError) as caught:
        read_peft(tmp_path, tiny("llama"))
    assert len(str(caught.value).split("\n")) == 4
    settings(use_dora=False, bias="none", r=4)(tmp_path)
    with pytest.raises(ValueError) as caught:
        read_peft(tmp_path, tiny("gemma2"))  # heads of another size
    assert len(str(caught.value).split("\n")) > 8


def test_the_fingerprint_tells_adapters_apart(tmp_path: Path) -> None:
    written(tmp_path / "a", "llama")
    written(tmp_path / "b", "llama")
    assert adapter_fingerprint(tmp_path / "a") == adapter_fingerprint(tmp_path / "b")
    settings(lora_alpha=7)(tmp_path / "b")
    assert adapter_fingerprint(tmp_path / "a") != adapter_fingerprint(tmp_path / "b")
