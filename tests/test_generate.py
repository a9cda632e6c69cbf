"""`python -m jaxdpo.generate`: from models and prompts to answers."""

import builtins
import json
import shutil
from collections.abc import Callable, Iterator
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
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.lora_targets import lora_of
from jaxdpo.models.hf.weight_files import weights_fingerprint
from jaxdpo.models.lora import adapter_shapes
from jaxdpo.models.sampling import generate as generate_ids
from tests.tiny import config, mesh, model, params, write_model, write_rows

TEMPLATE = (
    "{% for m in messages %}{{ 'w61 ' if m.role == 'user' else 'w62 ' }}{{ m.content }} {% if m.role == 'assistant' %}<|stop|> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}w62 {% endif %}"
)
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
    """Other weights, and a chat template whose turns end with a special token that is not the end of text."""
    folder = base.parent / "chatty"
    write_model(folder, seed=1)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        word: number for word, number in tokenizer["model"]["vocab"].items() if number != 63
    } | {"<|stop|>": 63}
    tokenizer["added_tokens"].append(
        tokenizer["added_tokens"][0] | {"id": 63, "content": "<|stop|>"}
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": TEMPLATE})
    )
    return folder


@pytest.fixture(scope="module")
def run_dir(base: Path) -> Path:
    """A run with checkpoints of steps 3 and 6, whose weights are of those seeds, started from the model without a template."""
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
    """A run over the first model with an adapter in its checkpoint, and the adapter's answer to w5 w9 w3."""
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
    """Run the command with `out`; its exit status and the objects written."""

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


def words(ids: Any) -> str:
    return " ".join(f"w{i}" for i in ids)


def greedy(
    seed: int, prompt: list[int], new: int = 5, stop_ids: tuple[int, ...] = (0,)
) -> list[int]:
    """The likeliest answer of the tiny model's weights of this seed."""
    (ids,) = generate_ids(
        params(seed),
        model(),
        [np.array(prompt, np.int32)],
        max_new_tokens=new,
        options=ForwardOptions(),
        stop_ids=stop_ids,
    )
    return ids.tolist()


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


def test_messages_go_through_the_template_and_a_string_is_what_a_user_says(
    chatty: Path, command: Command, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "w5 w9"}]
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": turns}, {"prompt": "w5 w9"}])
    _, (messages, string) = command(f"model.path={chatty}", f"prompts={path}")
    _, (_, verbatim) = command(f"model.path={chatty}", f"prompts={path}", "strings=verbatim")
    answer = greedy(1, [61, 5, 9, 62], stop_ids=(0, 63))
    assert (
        messages["text"].split() == string["text"].split() == words(answer).split()
        and messages["prompt"] == turns
    )
    assert verbatim["text"].split() == words(greedy(1, [5, 9], stop_ids=(0, 63))).split()


def test_an_answer_ends_at_every_end_that_the_model_knows(base: Path, chatty: Path) -> None:
    def stops(folder: Path) -> set[int]:
        return set(
            LoadedModel.open(
                Source(path=str(folder)), Sampling(max_new_tokens=4), mesh(), "float32"
            ).stop_ids
        )

    assert stops(base) == {0} and stops(chatty) == {0, 63}
    (chatty / "generation_config.json").write_text('{"eos_token_id": [17, 0]}')
    assert stops(chatty) == {0, 63, 17}
    (chatty / "generation_config.json").unlink()


def test_the_end_is_cut_off_and_told(
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


def test_a_run_answers_with_its_newest_step_or_the_one_asked_for(
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
        [f"model.path={tmp_path / 'adapter'}"],
        [f"model.path={run}", f"model.base={tmp_path}/moved"],
    ):
        _, (row,) = command(asked, *arguments)
        assert row["text"].split() == words(answer).split()
    capsys.readouterr()
    write_model(tmp_path / "other", seed=1)
    assert command(asked, f"model.path={run}", f"model.base={tmp_path}/other")[0] == 1
    assert "has other weights than the adapter was trained on" in capsys.readouterr().err


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
        answer = greedy(seed, [5, 9, 3], stop_ids=(0, 63) if name == "chatty" else (0,))
        assert text.split() == words(i for i in answer if name != "chatty" or i != 63).split(), name


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


def test_a_long_prompt_keeps_its_end(
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


def test_without_a_file_prompts_and_answers_are_shown(
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


def wrong_options(base: Path, tmp_path: Path) -> Iterator[tuple[list[str], list[str]]]:
    good, prompts = f"model.path={base}", "prompts=[w5]"
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "w5"}, {"prompt": 5}])
    (tmp_path / "empty").mkdir()
    yield [prompts], ["model.path=[]: name at least one model"]
    yield [good], ["prompts=null: there is nothing to answer"]
    yield [f"model.path={tmp_path}/none", prompts], ["no such folder"]
    yield [f"model.path={tmp_path}/empty", prompts], ["has neither config.json"]
    yield [f"model.path={rows}", prompts], ["is a file"]
    yield [f"model.path=[{base},{base}]", prompts], ["names a model twice"]
    yield (
        [good, f"prompts={rows}"],
        ["rows.jsonl:1: column 'prompt' is missing", "rows.jsonl:2: column 'prompt' is int"],
    )
    yield [good, prompts, f"out={rows}"], ["exists already"]
    yield (
        [good, prompts, "step=3", f"model.base={base}"],
        ["step=3: model.path names no run", "model.path names no adapter"],
    )
    yield (
        [good, prompts, "temperature=-1", "max_new_tokens=0", "batch_size=0"],
        ["temperature=-1", "max_new_tokens=0", "batch_size=0"],
    )
    yield (
        [good, prompts, "top_k=3", "top_p=0.5"],
        ["top_k=3: does nothing while temperature=0", "top_p=0.5: does nothing"],
    )
    yield (
        [good, prompts, "temperature=1", "top_p=0", "top_k=-1"],
        ["top_p=0.0: must be above 0", "top_k=-1: must be 0"],
    )
    yield [good, prompts, "seed=-1", "max_prompt_length=-1"], ["seed=-1", "max_prompt_length=-1"]
    yield (
        [good, prompts, "temprature=1", "strings=words"],
        ["temprature: there is no such option. Did you mean temperature", "strings="],
    )


def test_wrong_options_are_told_all_at_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for arguments, told in wrong_options(base, tmp_path):
        with pytest.raises(SystemExit) as exit_:
            generate.main(arguments)
        found = capsys.readouterr().err
        assert exit_.value.code == 2 and all(text in found for text in told), found
        assert f"{len(told)} wrong option" in found, found


def test_what_shows_later_is_a_fault_and_leaves_no_file(
    base: Path, chatty: Path, command: Command, capsys: pytest.CaptureFixture
) -> None:
    assert command(f"model.path={chatty}", "prompts=[w5, w6 <|stop|>, w7]") == (1, [])
    assert "prompts:2: text spells a special token of the chat template" in capsys.readouterr().err
    assert (
        generate.main([f"model.path={base}", "prompts=[w5]", f"out={base}/config.json/x.jsonl"])
        == 1
    )


def test_help_lists_every_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--help"])
    told = capsys.readouterr().out
    assert exit_.value.code == 0 and all(
        f"  {name}=" in told for name, *_ in cli.fields(generate.GenerateConfig)
    )


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Type these lines in a terminal; an exception is what a key does."""

    def types(*lines: str | type[BaseException]) -> None:
        typed = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr(builtins, "input", read)

    return types


def test_a_conversation_remembers_until_it_is_told_to_forget(
    chatty: Path, say: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    say("w5 w9", "", "w7 <|stop|>", "w8", "/new", "w8")
    assert (
        generate.main([f"model.path={chatty}", "max_new_tokens=5", "compilation_cache=null"]) == 0
    )
    first = greedy(1, [61, 5, 9, 62], stop_ids=(0, 63))
    kept = [i for i in first if i not in (0, 63)]
    second = greedy(1, [61, 5, 9, 62, *kept, 63, 61, 8, 62], stop_ids=(0, 63))
    anew = greedy(1, [61, 8, 62], stop_ids=(0, 63))
    told = capsys.readouterr().out.strip().split("\n")[1:]
    answers = [words(i for i in ids if i not in (0, 63)) for ids in (first, second, anew)]
    assert told == [
        answers[0],
        "that cannot be answered: text spells a special token of the chat template",
        *answers[1:],
    ]


def test_ctrl_c_ends_a_conversation(
    base: Path, say: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    say("w5", KeyboardInterrupt)
    assert (
        generate.main([f"model.path=[{base}]", "max_new_tokens=5", "compilation_cache=null"]) == 0
    )
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_between_batches_ends_the_command(
    base: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxdpo.inference.model.generate", interrupted)
    assert command(f"model.path={base}", "prompts=[w5]") == (130, [])
