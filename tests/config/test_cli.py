"""Reading options: every kind of mistake is told, all at once; what is printed can be read back."""

import dataclasses
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.config import cli, sections
from jaxdpo.config.cross_checks import cross_check
from jaxdpo.config.data_options import DataSection
from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import Config, ModelSection, OptimSection, TrainSection
from jaxdpo.utils.tree import flatten
from tests.config.command_line import NEEDED, complaints, load


def test_arguments_become_a_config() -> None:
    config = load(
        "model.path=m",
        "data.train=[a.jsonl,hh-rlhf:train:50]",
        "optim.learning_rate=1e-4",
        "data.shuffle=false",
        "train.steps=3",
    )
    assert config.model.path == "m" and config.data.train == ["a.jsonl", "hh-rlhf:train:50"]
    assert (config.optim.learning_rate, config.data.shuffle, config.train.steps) == (1e-4, False, 3)
    assert config.loss == LossSection() and config.seed == 0


@pytest.mark.parametrize(
    "text",
    ["007", "1e5", "2.50", "12:30", "a=b", "a: b", "a #b", "0123456", "true", "~/x", "*x", "{a}"],
)
def test_text_stays_as_it_was_typed(text: str) -> None:
    config = load("data.train=[a]", f"model.path={text}", f"model.revision={text}")
    assert config.model.path == config.model.revision == text


def test_text_lists_and_nulls() -> None:
    config = load(
        "model.path=m",
        "data.train=[007, 'a,b', c]",
        "train.compilation_cache=null",
        "loss.name=[sigmoid,sft]",
        "loss.weights=[1,2]",
    )
    assert config.data.train == ["007", "a,b", "c"] and config.train.compilation_cache is None
    assert (config.loss.name, config.loss.weights) == (["sigmoid", "sft"], [1.0, 2.0])
    assert load("data.train=[a]", "model.path='null'").model.path == "null"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.train=pairs.jsonl", ["pairs.jsonl"]),
        ("data.train=007", ["007"]),
        ("data.train=[pairs.jsonl]", ["pairs.jsonl"]),
        ("data.train='[a].jsonl'", ["[a].jsonl"]),
        ("data.train=a,b", ["a,b"]),
        ("data.eval=hh-rlhf:test:50", ["hh-rlhf:test:50"]),
        ("data.weights=2", [2.0]),
        ("loss.weights=0.5", [0.5]),
        ("data.oasst.languages=en", ["en"]),
        ("train.offload=moments", ["moments"]),
        ("lora.targets=q", "q"),
        ("loss.name=ipo", "ipo"),
    ],
)
def test_one_value_of_a_list_is_written_bare(tmp_path: Path, word: str, value: object) -> None:
    key, _, text = word.partition("=")
    words = [one for one in [*NEEDED, "lora.rank=2"] if not one.startswith(f"{key}=")]
    section, _, name = key.rpartition(".")
    assert getattr(operator.attrgetter(section)(load(*words, word)), name) == value
    path = tmp_path / "c.yaml"
    nested: dict = {name: value[0] if isinstance(value, list) else value}
    for part in reversed(section.split(".")):
        nested = {part: nested}
    path.write_text(yaml.safe_dump(nested))
    config = load("--config", str(path), *words)
    assert getattr(operator.attrgetter(section)(config), name) == value, text


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.weights=1,2", "data.weights=1,2: input should be a valid number"),
        ("data.train=null", "data.train=null: input should be a valid list"),
        ("data.train=", "data.train=: input should be a valid list"),
    ],
)
def test_what_is_no_list_and_no_bare_value_is_refused(
    capsys: pytest.CaptureFixture[str], word: str, told: str
) -> None:
    (found,) = complaints(capsys, "model.path=m", *["data.train=[a]"][: "weights" in word], word)
    assert found.startswith(told) and found.endswith(". Lists are written [a,b]")


def test_a_file_and_arguments_over_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\nmodel: {path: m}\ndata:\n  train: [a]\n  max_length: 64\n")
    for words in (["--config", str(path)], [f"--config={path}"]):
        config = load(*words, "data.max_length=128")
        assert (config.seed, config.data.max_length, config.data.train) == (3, 128, ["a"])


def test_all_problems_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaints(
        capsys,
        "optim.learning_rat=1",
        "train.steps=many",
        "data.max_length=1",
        "loss.beta=-1",
        "mesh.data=0",
        "reference=nothing",
        "--dry-runn",
        "zzz=1",
    )
    assert told == [
        "--dry-runn: not understood. Options are written section.field=value",
        "data.max_length=1: must be 0 (automatic) or at least 2",
        "loss.beta=-1.0: must be above 0",
        "mesh.data=0: must be -1 (what is left) or at least 1",
        "optim.learning_rat: there is no such option. Did you mean optim.learning_rate?",
        "reference=nothing: input should be 'auto', 'frozen', 'adapter_off', 'cached' or 'none'",
        "train.steps=many: input should be a valid integer, unable to parse string as an integer",
        "zzz: there is no such option.",
    ]


def test_checks_run_once_all_values_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaints(capsys, "loss.name=sigmiod", "loss.ref_sync_every=2", "reference=none")
    assert [line.split(":")[0] for line in told] == [
        "model.path=null",
        "data.train=[]",
        "loss.ref_sync_every=2",
        "loss.name=sigmiod",
    ]
    assert "Did you mean sigmoid?" in told[3]


def test_several_problems_of_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaints(capsys, *NEEDED, "optim.b1=1", "optim.b2=2", "optim.eps=0")
    assert told == [
        "optim.b1=1.0: must be at least 0 and below 1",
        "optim.b2=2.0: must be at least 0 and below 1",
        "optim.eps=0.0: must be above 0",
    ]


def test_switches_get_the_nearest_name_too(capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = complaints(capsys, *NEEDED, "--print-confg")
    assert told == "--print-confg: not understood. Did you mean --print-config?"


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", ".nan", ".inf"])
def test_numbers_must_be_finite(capsys: pytest.CaptureFixture[str], word: str) -> None:
    (told,) = complaints(capsys, *NEEDED, f"optim.learning_rate={word}")
    assert told.startswith("optim.learning_rate=")


def test_an_option_set_twice_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (told,) = complaints(capsys, *NEEDED, "seed=1", "seed=1")
    assert told == "seed=1: seed is set twice. Keep one"
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {train: [a]}\n")
    (told,) = complaints(capsys, "--config", str(path), "--config", str(path))
    assert told == f"--config {path}: given twice. Keep one"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nmodel: {path: m}\nseed: 2\n", "line 1: set twice: seed. Keep one"),
        ("model:\n  path: m\n  path: n\n", "line 2: set twice: path. Keep one"),
        ("- 1\n", "must hold `section:` and indented `field: value` lines"),
        ("a: [", "while parsing"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_files_that_cannot_be_read_are_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, told: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        cli.load(Config, [*NEEDED, "--config", str(path)], command="train")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert f"--config {path}: " in err and told in err


def test_numbers_where_a_file_should_hold_text_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {path: m, revision: 0123456}\ndata: {train: [a]}\n"
    )  # YAML reads this revision as 42798
    assert complaints(capsys, "--config", str(path)) == [
        "model.revision=42798: input should be a valid string"
    ]


def test_a_file_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = complaints(capsys, *NEEDED, "--config", "no/such.yaml")
    assert "no/such.yaml" in told and "No such file" in told


def test_sections_and_values_in_each_others_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(capsys, *NEEDED, "seed.x=1") == [
        "seed={'x': 1}: input should be a valid integer"
    ]
    assert complaints(capsys, *NEEDED, "optim=3")[0].startswith("optim=3")
    assert complaints(capsys, *NEEDED, "seed=1", "seed.x=1")[0] == "seed.x: seed is not a section"


@pytest.mark.parametrize(
    ("written", "items"),
    [
        ("[Who are you?]", ["Who are you?"]),
        ("[Who are you?, What's new?]", ["Who are you?", "What's new?"]),
        ("[a: b?,c]", ["a: b?", "c"]),
        ('["Who, me?",b]', ["Who, me?", "b"]),
    ],
)
def test_a_list_of_questions_is_read_as_written(written: str, items: list[str]) -> None:
    config, _ = cli.load(Config, [f"data.train={written}"], command="train")
    assert config.data.train == items


@pytest.mark.parametrize("written", ["[Who?,]", "['a?,b]", "[[a?]]", "[a?"])
def test_a_broken_list_of_questions_is_refused(
    written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert any("not a YAML list" in line for line in complaints(capsys, f"data.train={written}"))


def test_a_broken_list_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaints(capsys, "model.path=m", "data.train=[a")
    assert told[0] == "data.train=[a: not a YAML list. Write [a,b]"


def test_print_config_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "model.path=süß: 'x' #1",
        "run_dir=007",
        "data.train=[a,'b:c#d']",
        "optim.learning_rate=1e-7",
        "loss.name=[sigmoid,sft]",
        "train.compilation_cache=null",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.load(Config, [*words, "--print-config"], command="train", checks=[cross_check])
    assert ended.value.code == 0
    path = tmp_path / "c.yaml"
    path.write_text(capsys.readouterr().out)
    assert load("--config", str(path)) == load(*words)
    printed = yaml.safe_load(path.read_text())
    mapping = "data.chat_template_kwargs"  # empty, so that flatten finds no value in it
    assert {name for name, *_ in cli.fields(Config)} == {*flatten(printed), mapping}


PRINTABLE = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])


@settings(max_examples=40)
@given(
    rate=st.floats(0, 1e3, allow_nan=False),
    path=st.text(PRINTABLE, min_size=1, max_size=20).filter(lambda path: path[0] != "~"),
    steps=st.none() | st.integers(1, 10**12),
    beta=st.none() | st.floats(1e-300, 1e38),
    names=st.lists(st.text(PRINTABLE, max_size=8).map("n".__add__), min_size=1, max_size=4),
)
def test_any_config_survives_yaml(
    rate: float, path: str, steps: int | None, beta: float | None, names: list[str]
) -> None:
    config = Config(
        run_dir=path,
        model=ModelSection(path=path),
        data=DataSection(train=names),
        loss=LossSection(beta=beta),
        optim=OptimSection(learning_rate=rate),
        train=TrainSection(steps=steps),
    )
    again, problems = cli.validate(Config, yaml.safe_load(cli.to_yaml(config)))
    assert not problems and again == config


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.load(Config, ["--help"], command="train", flags={"--dry-run": "Show."})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("python -m jaxdpo.train [--config FILE.yaml] [option=value ...]")
    assert "  --dry-run        Show." in text
    for name, _, _, doc in cli.fields(Config):
        assert f"\n  {name}=" in text and doc and doc.split()[0] in text
    assert (
        "optim.learning_rate=5.0e-06   (float)" in text and "model.path=null   (str | null)" in text
    )
    assert "data.share_prefix=true   (bool)" in text


def test_every_option_has_its_documentation() -> None:
    assert [name for name, _, _, doc in cli.fields(Config) if len(doc) < 10] == []


def test_required_options_of_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Small:
        """A command's options."""

        __pydantic_config__ = sections.STRICT_KEYS
        out: str
        step: int = 0

    with pytest.raises(SystemExit) as ended:
        cli.load(Small, ["step=x"], command="small")
    assert ended.value.code == 2
    assert "out=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("train.steps=true", "must be a number, not true or false"),
        ("optim.b1=false", "must be a number, not true or false"),
        ("data.weights=[1,true]", "must be a number, not true or false"),
        ("optim.learning_rate=1e300", "is beyond the numbers of float32"),
        ("loss.beta=4e38", "is beyond the numbers of float32"),
        ("checkpoint.keep=100000000000000000000000", "is beyond 64 bits"),
        ("run_dir=runs/\udcff", "is not valid UTF-8"),
        ("model.path=~no-such-user/m", "there is no user of that name"),
        ("data.packed_length=9000000000000000", "must be at most 33,554,432"),
        ("data.max_length=4000000000", "must be at most 16,777,216"),
        ("train.batch_size=10000000000", "must be at most 1,048,576"),
    ],
)
def test_values_that_no_option_can_have_are_refused(
    capsys: pytest.CaptureFixture[str], word: str, reason: str
) -> None:
    (told,) = complaints(capsys, *(one for one in NEEDED if one[:9] != word[:9]), word)
    assert told.startswith(word.split("=")[0] + "=") and reason in told


def test_deep_yaml_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: " + "[" * 2000)
    (told,) = complaints(capsys, *NEEDED, "--config", str(path))
    assert told == f"--config {path}: nested too deeply"
    path.write_text("data: " + "{a: " * 1500)
    (told,) = complaints(capsys, *NEEDED, "--config", str(path))
    assert told == f"--config {path}: nested too deeply"
    told = complaints(capsys, *NEEDED[:1], "data.train=" + "[" * 2000)[0]
    assert told.endswith("not a YAML list. Write [a,b]")


def test_a_config_without_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = complaints(capsys, *NEEDED, "--config", "/dev/zero")
    assert told == ("--config /dev/zero: longer than 1,048,576 bytes. Is it the right file?")


@pytest.mark.slow
def test_an_argument_in_a_locale_without_utf8_is_read_all_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxdpo.train", "--print-config", *NEEDED, "run_dir=rün"],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    assert "run_dir: rün\n" in done.stdout
