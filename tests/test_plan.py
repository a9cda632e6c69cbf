"""The command that plans a run, and the presets for real machines."""

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from jaxdpo.config import cli
from jaxdpo.plan import PlanConfig, check, main, plan_of
from jaxdpo.planning.aot_compile import refused_bytes
from jaxdpo.planning.machines import GIB, topology
from jaxdpo.planning.target import Target
from tests.planning.llama import LLAMA
from tests.tiny import HF, rows, write_model, write_rows

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(HF | {"max_position_embeddings": 4096}))
    return tmp_path


def lines_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_plan_needs_only_config_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "topology=cpu-2",
        f"model.path={folder}",
        "mesh.fsdp=2",
        "train.batch_size=4",
        "price=2",
        "pairs=3600",
        "pair_tokens=[64,64,64]",
    ]
    assert main(arguments) == 0
    out = lines_of(capsys)
    for part in ("parameters", "reference", "optimizer moments", "activations", "at most ("):
        assert re.search(rf"^  {re.escape(part)}.* GiB", out, re.M), part
    assert (
        "cpu-2: 2 x CPU" in out
        and "4 pairs in 1 microbatch of 2 packed sequences of 384 tokens, at most 4096" in out
    )
    assert "compiled ahead of time:" in out and "all-gather:" in out
    hours, dollars = (
        re.search(r"([\d.e-]+) h for 3600 pairs", out),
        re.search(r": \$([\d.]+) for 3600 pairs", out),
    )
    assert hours and dollars and float(dollars[1]) == pytest.approx(4 * float(hours[1]), abs=0.01)
    assert "recommended: mesh.data=" in out


def test_without_a_compiler_the_estimate_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (
        main(
            [
                "topology=v5e-8",
                f"model_config={folder / 'config.json'}",
                "mesh.fsdp=8",
                "search=false",
            ]
        )
        == 0
    )
    out = lines_of(capsys)
    assert (
        'not compiled: the TPU compiler is not installed: pip install "jax[tpu]"' in out
        and "all of the above is an estimate" in out
    )
    assert "search:" not in out
    assert main(["topology=h100-8", f"model_config={folder}", "search=false"]) == 0
    assert (
        'not compiled: the CUDA compiler is not installed: pip install "jax[cuda12]"'
        in lines_of(capsys)
    )
    assert (
        main(
            ["topology=h100-8", f"model_config={folder}", "search=false", "train.offload=[moments]"]
        )
        == 0
    )
    out = lines_of(capsys)
    assert "not compiled: without a GPU" in out and re.search(
        r"^  optimizer moments \(host\) .* GiB$", out, re.M
    )
    assert re.search(
        r"^fetched from the host by a device: optimizer moments .* GB, in .* s$", out, re.M
    )


def test_where_nothing_fits_a_remedy_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        )
    )
    assert main(["topology=l4-1", f"model_config={tmp_path}", "compile=false"]) == 1
    out = lines_of(capsys)
    assert (
        "does NOT fit into" in out and "search: no mesh, remat policy or packed length fits" in out
    )
    assert re.search(r"^this fits: lora.rank=16 .*mesh.data=1 model.remat=", out, re.M)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["topology=v5e-15", "model_config=FOLDER"],
            1,
            "topology=v5e-15: is not known. Did you mean",
        ),
        (
            ["topology=v5e-8", "model_config=FOLDER", "mesh.fsdp=3"],
            1,
            "mesh.fsdp=3: must multiply to the 8 devices here",
        ),
        (["topology=v5e-8", "model_config=FOLDER/nothing"], 1, "has no config.json"),
        (["model_config=FOLDER"], 2, "topology=null: name a machine"),
        (
            ["topology=v5e-8"],
            2,
            "model.path=null: name a Hugging Face folder or hub id, or model_config=",
        ),
        (
            ["topology=v5e-8", "model_config=FOLDER", "read_data=true"],
            2,
            "read_data=true: there is nothing to read",
        ),
        (
            [
                "topology=v5e-8",
                "model_config=FOLDER",
                "pair_tokens=[1,2]",
                "efficiency=2",
                "price=0",
            ],
            2,
            "3 wrong options",
        ),
        (["topology=v5e-8", "model_config=FOLDER", "topologie=v5e-8"], 2, "Did you mean topology?"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    folder: Path,
    arguments: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        ended = main([argument.replace("FOLDER", str(folder)) for argument in arguments])
    except SystemExit as end:
        ended = end.code
    assert ended == status
    assert message in capsys.readouterr().err


def test_read_data_gives_the_packed_lengths_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model", None)
    write_rows(tmp_path / "rows.jsonl", rows(40))
    arguments = [
        f"model.path={tmp_path / 'model'}",
        f"data.train=[{tmp_path / 'rows.jsonl'}]",
        "read_data=true",
        "train.batch_size=8",
    ]
    assert (
        main(["topology=cpu-1", *arguments, "data.cache=null", "compile=false", "search=false"])
        == 0
    )
    shapes = re.search(
        r"8 pairs in 1 microbatch of 1 packed sequence of (\d+) tokens, at most (\d+)",
        lines_of(capsys),
    )
    assert shapes and 128 <= int(shapes[1]) <= int(shapes[2]) <= 256


def test_help_lists_its_own_options_and_those_of_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = lines_of(capsys)
    assert "topology=null" in out and "The machine (required): v5e-8" in out
    assert (
        "Folder of this run: config, metrics, checkpoints." in out
    )  # the doc of an inherited field


# --- presets ---


def llama(**sizes: int) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    )
    return HF | {"max_position_embeddings": 8192} | dict(zip(names, sizes.values(), strict=True))


SIZES = {
    "Qwen/Qwen2.5-0.5B-Instruct": llama(D=896, F=4864, L=24, N=14, K=2, V=151936, H=64)
    | {"tie_word_embeddings": True},
    "meta-llama/Llama-3.2-3B-Instruct": llama(D=3072, F=8192, L=28, N=24, K=8, V=128256, H=128)
    | {"tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B-Instruct": llama(D=4096, F=14336, L=32, N=32, K=8, V=128256, H=128),
    "meta-llama/Llama-3.3-70B-Instruct": llama(D=8192, F=28672, L=80, N=64, K=8, V=128256, H=128),
}
PRESETS = sorted(path for path in CONFIGS.glob("*.yaml") if "jaxdpo.plan" in path.read_text())


def planned_topology(path: Path) -> str:
    """The machine that the preset's first lines name."""
    found = re.search(rf"jaxdpo.plan --config configs/{path.name} topology=(\S+)", path.read_text())
    assert found, path
    return found[1]


def test_there_is_a_preset_for_every_machine() -> None:
    assert {planned_topology(path) for path in PRESETS} == {
        "l4-1",
        "h100-1",
        "h100-8",
        "v5e-8",
        "v5e-16",
        "v5p-8",
        "v5p-128",
        "v6e-8",
    }


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_fits_its_machine_by_the_estimate(path: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(path), f"topology={planned_topology(path)}"]
    config, _ = cli.load(PlanConfig, arguments, command="plan", checks=[check])
    target = Target.of(topology(planned_topology(path)), SIZES[config.model.path or ""])
    plan = plan_of(config, target)
    assert plan.fits and plan.time.mfu > 0.3
    assert cli.load(PlanConfig, arguments, command="train")[
        0
    ].data.train  # there is something to train on


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Used 25.50G of 15.75G hbm. Exceeded hbm capacity by 9.75G.", 25.5),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
            "HLO temporaries (512.00M) exceeds available",
            0.5,
        ),
        ("RESOURCE_EXHAUSTED: in words that are new", math.inf),
    ],
)
def test_a_refusal_says_how_much_memory_is_needed(message: str, gib: float) -> None:
    assert refused_bytes(message) == gib * GIB


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ["topology=v5e-4", "mesh.fsdp=4"],
        [
            "topology=v5e-4",
            "mesh.fsdp=4",
            "train.offload=[reference,moments]",
            "model.param_dtype=bfloat16",
        ],
        ["topology=v5e-4", "mesh.fsdp=2", "mesh.context=2"],
        ["topology=2xv5e-4", "mesh.fsdp=4"],
    ],
)
def test_a_step_is_compiled_ahead_of_time_for_tpus(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(HF | sizes | {"max_position_embeddings": 4096}))
    assert main([*arguments, f"model_config={folder}", "train.batch_size=16", "search=false"]) == 0
    assert re.search(
        r"compiled ahead of time: 0\.\d+ GiB of a device at most, fits into 15.75 GiB",
        lines_of(capsys),
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="the CUDA plugin is not installed"
)
def test_a_step_is_compiled_ahead_of_time_for_gpus(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "topology=h100-8",
                f"model_config={folder}",
                "mesh.fsdp=8",
                "train.batch_size=16",
                "search=false",
            ]
        )
        == 0
    )
    out = lines_of(capsys)
    assert (
        re.search(
            r"compiled ahead of time: 0\.\d+ GiB of a device at most, fits into 73.23 GiB", out
        )
        and "reduce-scatter:" in out
    )
