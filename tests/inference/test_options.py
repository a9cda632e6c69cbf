"""The options of `python -m jaxdpo.generate`: what is refused before a model is loaded."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdpo import generate
from jaxdpo.config import cli
from jaxdpo.inference.options import GenerateConfig
from tests.house import ROOT, own_imports, parse
from tests.tiny import write_model, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model."""
    folder = tmp_path_factory.mktemp("models") / "base"
    write_model(folder)
    return folder


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


def test_wrong_options_are_reported_all_at_once_with_exit_code_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for arguments, expected in wrong_options(base, tmp_path):
        with pytest.raises(SystemExit) as exit_:
            generate.main(arguments)
        found = capsys.readouterr().err
        assert exit_.value.code == 2 and all(text in found for text in expected), found
        assert f"{len(expected)} wrong option" in found, found


def test_help_lists_every_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and all(
        f"  {name}=" in printed for name, *_ in cli.fields(GenerateConfig)
    )


def test_no_module_of_inference_imports_training() -> None:
    """Generation works where optax and the training code are not needed: nothing is pulled in."""
    modules = parse(ROOT / "jaxdpo")
    found, new = set(), {name for name in modules if name.startswith("inference.")}
    assert new
    while new:
        found |= new
        new = {other for name in new for other in own_imports(modules, name)} - found
    assert [name for name in found if name.startswith("training")] == []


def test_a_question_may_begin_with_a_tilde() -> None:
    config, _ = cli.load(
        GenerateConfig, ["model.path=m", "prompts=[~5 or ~6?]"], command="generate"
    )
    assert config.prompts == ["~5 or ~6?"]


def test_a_file_of_prompts_in_the_home_of_nobody_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.load(
            GenerateConfig, ["model.path=m", "prompts=~no-such-user/q.txt"], command="generate"
        )
    assert ended.value.code == 2
    assert "prompts=~no-such-user/q.txt: there is no user of that name" in capsys.readouterr().err
