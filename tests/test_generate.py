"""`python -m jaxdpo.generate`: from models and prompts to answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdpo import export, generate
from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.config import cli
from jaxdpo.config.schema import LoraSection
from jaxdpo.inference.model import Answer, LoadedModel, Sampling, Source
from jaxdpo.inference.options import GenerateConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.lora_targets import lora_of
from jaxdpo.models.hf.weight_files import weights_fingerprint
from jaxdpo.models.lora import adapter_shapes
from jaxdpo.models.sampling import generate as generate_ids
from jaxdpo.training.trainer import Trainer
from tests.inference.models import STOP, greedy, words, write_chat_model
from tests.tiny import config, mesh, model, params, write_model, write_rows

Command = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command uses one of the eight devices."""
    one = mesh()
    monkeypatch.setattr("jaxdpo.distributed.sharding.make_mesh", lambda *_: one)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def chatty(base: Path) -> Path:
    """Other weights, and a chat template."""
    folder = base.parent / "chatty"
    write_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(base: Path) -> Path:
    """A run from `base` with checkpoints of steps 3 and 6, whose weights are of those seeds."""
    folder = base.parent / "run"
    with Checkpoints(folder) as checkpoints:
        for step in (3, 6):
            state = {
                "params": jax.tree.map(jax.numpy.asarray, params(step)),
                "step": np.int32(step),
            }
            checkpoints.save(step, state, {})
    started = config(base.parent, run_dir=str(folder), model__path=str(base))
    (folder / "config.yaml").write_text(cli.to_yaml(started))
    return folder


@pytest.fixture(scope="module")
def lora_run(base: Path) -> tuple[Path, list[int]]:
    """A run over `base` that trained an adapter, and the adapter's answer to w5 w9 w3."""
    folder, section = base.parent / "lora-run", LoraSection(rank=3, alpha=6.0)
    lora = lora_of(section, model())
    rng = np.random.default_rng(6)
    adapter = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 4,
        adapter_shapes(model(), lora),
    )
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(
            2,
            {"params": jax.tree.map(jax.numpy.asarray, adapter)},
            {"identity": {"weights": weights_fingerprint(base)}},
        )
    started = config(
        base.parent,
        run_dir=str(folder),
        model__path=str(base),
        reference="adapter_off",
        lora={"rank": 3, "alpha": 6.0},
    )
    (folder / "config.yaml").write_text(cli.to_yaml(started))
    (ids,) = generate_ids(
        params(0) | {"lora": adapter},
        model(),
        [np.array([5, 9, 3], np.int32)],
        max_new_tokens=5,
        options=ForwardOptions(lora_scale=lora.scale),
        stop_ids=(0,),
    )
    return folder, ids.tolist()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run the command with `out`; its exit code and the objects written."""

    def call(*arguments: str, new: int = 5) -> tuple[int, list[dict[str, Any]]]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        status = generate.main(
            [f"out={out}", f"max_new_tokens={new}", "compilation_cache=null", *arguments]
        )
        assert not list(tmp_path.glob(".*"))
        return status, [
            json.loads(line) for line in out.read_text().splitlines()
        ] if out.exists() else []

    return call


def test_plain_text_is_continued(base: Path, command: Command, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": "w5 w9 w3"}, {"prompt": "w7", "id": 1}]
    )
    status, rows = command(f"model.path={base}", f"prompts={path}")
    assert status == 0
    for row, prompt in zip(rows, ([5, 9, 3], [7]), strict=True):
        answer = greedy(0, prompt)
        wanted = {
            "prompt": words(prompt),
            "text": " " + words(answer),
            "tokens": 5,
            "finish": "length",
        }
        assert row == wanted | {"prompt_tokens": len(prompt), "prompt_truncated": False}


def test_the_chat_template_formats_messages_and_strings_of_users(
    chatty: Path, command: Command, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "w5 w9"}]
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": turns}, {"prompt": "w5 w9"}])
    _, (messages, string) = command(f"model.path={chatty}", f"prompts={path}")
    _, (_, verbatim) = command(f"model.path={chatty}", f"prompts={path}", "strings=verbatim")
    answer = greedy(1, [61, 5, 9, 62], stop_ids=(0, STOP))
    assert (
        messages["text"].split() == string["text"].split() == words(answer).split()
        and messages["prompt"] == turns
    )
    assert verbatim["text"].split() == words(greedy(1, [5, 9], stop_ids=(0, STOP))).split()


def test_an_answer_ends_at_every_eos_that_the_model_files_name(base: Path, chatty: Path) -> None:
    def stops(folder: Path) -> set[int]:
        return set(
            LoadedModel.open(
                Source(path=str(folder)), Sampling(max_new_tokens=4), mesh(), "float32"
            ).stop_ids
        )

    assert stops(base) == {0} and stops(chatty) == {0, STOP}
    (chatty / "generation_config.json").write_text('{"eos_token_id": [17, 0]}')
    assert stops(chatty) == {0, STOP, 17}
    (chatty / "generation_config.json").unlink()


def test_eos_is_cut_off_and_reported_as_stop(
    base: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = greedy(0, [5, 9, 3])
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": answer[2]}))
    _, (row,) = command(f"model.path={base}", "prompts=[w5 w9 w3]")
    (base / "generation_config.json").unlink()
    cut = answer[: answer.index(answer[2])]
    assert (row["text"].split(), row["tokens"], row["finish"]) == (
        words(cut).split(),
        len(cut) + 1,
        "stop",
    )


def test_a_run_answers_with_its_newest_checkpoint_or_the_step_asked_for(
    run_dir: Path, command: Command
) -> None:
    for arguments, seed in (((), 6), (("step=3",), 3)):
        _, (row,) = command(f"model.path={run_dir}", "prompts=[w5 w9 w3]", *arguments)
        assert row["text"].split() == words(greedy(seed, [5, 9, 3])).split()


def test_an_adapter_answers_over_its_base(
    base: Path,
    lora_run: tuple[Path, list[int]],
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    run, answer = lora_run
    assert answer != greedy(0, [5, 9, 3]) and len(answer) == 5
    assert export.main([f"run_dir={run}", f"out={tmp_path / 'adapter'}"]) == 0
    shutil.copytree(base, tmp_path / "moved")
    asked = "prompts=[w5 w9 w3]"
    for arguments in (
        [f"model.path={run}"],
        [f"model.path={tmp_path / 'adapter'}", f"model.base={base}"],
        [f"model.path={run}", f"model.base={tmp_path}/moved"],
    ):
        _, (row,) = command(asked, *arguments)
        assert row["text"].split() == words(answer).split()
    capsys.readouterr()
    write_model(tmp_path / "other", seed=1)
    assert command(asked, f"model.path={run}", f"model.base={tmp_path}/other")[0] == 1
    assert "has other weights than the adapter was trained on" in capsys.readouterr().err
    assert command(asked, f"model.path={tmp_path / 'adapter'}")[0] == 1
    assert "names the base 'base', which is no folder here" in capsys.readouterr().err


def test_several_models_answer_side_by_side(
    base: Path, chatty: Path, run_dir: Path, command: Command
) -> None:
    names = {"base": base, "chatty": chatty, "run": run_dir}
    status, (row,) = command(
        f"model.path=[{','.join(map(str, names.values()))}]",
        "prompts=[w5 w9 w3]",
        "strings=verbatim",
    )
    assert (
        status == 0
        and row["prompt"] == "w5 w9 w3"
        and list(row["text"]) == list(row["finish"]) == list(names)
    )
    for (name, text), seed in zip(row["text"].items(), (0, 1, 6), strict=True):
        answer = greedy(seed, [5, 9, 3], stop_ids=(0, STOP) if name == "chatty" else (0,))
        assert text.split() == words(i for i in answer if name != "chatty" or i != STOP).split(), (
            name
        )


@pytest.mark.slow
def test_samples_follow_the_seed_and_not_the_batch(base: Path, command: Command) -> None:
    arguments = (
        f"model.path={base}",
        "prompts=[w5 w9 w3, w7, w5 w9 w3]",
        "temperature=1.5",
        "top_p=0.95",
        "top_k=30",
    )
    first = command(*arguments, "seed=1")
    assert first == command(*arguments, "seed=1", "batch_size=1") != command(*arguments, "seed=2")
    assert first[1][0]["text"] != first[1][2]["text"]


def test_a_long_prompt_is_truncated_at_its_beginning(
    base: Path, command: Command, capsys: pytest.CaptureFixture
) -> None:
    prompt = [1 + i % 60 for i in range(40)]
    _, (row,) = command(f"model.path={base}", f"prompts=[{words(prompt)}]", "max_prompt_length=8")
    assert (
        row["prompt_truncated"]
        and row["prompt_tokens"] == 8
        and row["text"].split() == words(greedy(0, prompt[-8:])).split()
    )
    assert "1 prompts lost their beginning" in capsys.readouterr().err
    _, (row,) = command(
        f"model.path={base}", f"prompts=[{words(prompt * 13)}]", new=500
    )  # 520 tokens, 512 positions
    assert row["prompt_tokens"] == 256 and (row["finish"] == "stop" or row["tokens"] == 256)


def test_without_a_file_prompts_and_answers_are_printed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w5 \x1b[2J w9"}])
    monkeypatch.setattr(
        LoadedModel,
        "answer",
        lambda *_, **__: [Answer("bad \x1b[31m\x07\x9b news", 3, "stop", 1, False)],
    )
    assert generate.main([f"model.path={base}", f"prompts={path}", "compilation_cache=null"]) == 0
    assert capsys.readouterr().out == "> w5 [2J w9\nbad [31m news\n\n"


def test_a_fault_while_answering_is_exit_code_1_and_leaves_no_file(
    base: Path, chatty: Path, command: Command, capsys: pytest.CaptureFixture
) -> None:
    assert command(f"model.path={chatty}", "prompts=[w5, w6 <|stop|>, w7]") == (1, [])
    assert "prompts:2: text spells a special token of the chat template" in capsys.readouterr().err
    assert (
        generate.main([f"model.path={base}", "prompts=[w5]", f"out={base}/config.json/x.jsonl"])
        == 1
    )


def test_ctrl_c_between_batches_is_exit_code_130(
    base: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxdpo.inference.model.generate", interrupted)
    assert command(f"model.path={base}", "prompts=[w5]") == (130, [])


@pytest.mark.parametrize(
    ("prompts", "places"),
    [
        ([{"prompt": "w5 w64 w3"}], (":1",)),
        ([{"prompt": "w5"}, {"prompt": "w64"}, {"prompt": "w6 w65"}], (":2", ":3")),
    ],
)
def test_prompts_with_ids_beyond_the_embedding_are_refused(
    base: Path,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    prompts: list[dict[str, str]],
    places: tuple[str, ...],
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(base, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"w64": 64, "w65": 65}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = write_rows(tmp_path / "prompts.jsonl", prompts)
    status, _ = command(f"model.path={folder}", f"prompts={path}")
    error = capsys.readouterr().err
    assert status == 1 and "but the model's vocab_size is 64" in error
    assert all(f"{path}{place}" in error or place[1:] in error for place in places), error
    assert error.count("vocab_size") == len(places)
    fine = write_rows(tmp_path / "fine.jsonl", [{"prompt": "w5 w63"}])
    assert command(f"model.path={folder}", f"prompts={fine}")[0] == 0


def test_a_folder_of_full_weights_and_an_adapter_is_refused(
    base: Path, lora_run: tuple[Path, list[int]], command: Command, tmp_path: Path
) -> None:
    """As a merge leaves it that is written over its adapter: as model, and as an adapter's base."""
    adapter, mixed, over_mixed = (tmp_path / name for name in ("adapter", "mixed", "over"))
    export.main([f"run_dir={lora_run[0]}", f"out={adapter}"])
    shutil.copytree(base, mixed)
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, mixed)
    shutil.copytree(adapter, over_mixed)
    settings = json.loads((over_mixed / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(mixed)
    (over_mixed / "adapter_config.json").write_text(json.dumps(settings))
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w5"}])
    told = r"has full weights \(model.safetensors\) and an adapter .* move the adapter_\* files"
    for folder in (mixed, over_mixed):
        options, _ = cli.validate(
            GenerateConfig,
            {"model": {"path": str(folder)}, "prompts": path, "out": str(tmp_path / "o.jsonl")},
        )
        assert options is not None
        with pytest.raises(ValueError, match=told):
            generate.generate(options)
    with pytest.raises(ValueError, match=told):
        Trainer.open(config(tmp_path, model__path=str(mixed)))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=told):
        export.export_run(
            export.ExportConfig(
                run_dir=str(lora_run[0]), out=str(out), form="merged", base=str(mixed)
            )
        )
    (mixed / "adapter_config.json").unlink()
    assert command(f"model.path={mixed}", f"prompts={path}")[0] == 0
