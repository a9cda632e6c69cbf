"""Reading options: every kind of mistake is told, all at once; what is printed can be read back."""

import dataclasses
import operator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.config import cli, sections
from jaxdpo.config.cross_checks import cross_check
from jaxdpo.config.data_options import DataSection
from jaxdpo.config.foreign_names import FOREIGN_NAMES, foreign_hint
from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import Config, ModelSection, OptimSection, TrainSection
from jaxdpo.losses.rules import check
from jaxdpo.utils.tree import flatten

NEEDED = ["model.path=m", "data.train=[a]"]


def load(*words: str) -> Config:
    config, given_flags = cli.load(Config, words, command="train", checks=[cross_check])
    assert given_flags <= {"--config"}
    return config


def complaints(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What a wrong command line is told, one item a problem."""
    with pytest.raises(SystemExit) as ended:
        cli.load(
            Config,
            words,
            command="train",
            checks=[cross_check, lambda config: check(config.loss, config.reference)],
        )
    out = capsys.readouterr()
    assert ended.value.code == 2 and not out.out
    first, *problems, last = out.err.rstrip("\n").split("\n")
    assert first == f"jaxdpo.train: {len(problems)} wrong option{'s' * (len(problems) != 1)}:"
    assert last == "`python -m jaxdpo.train --help` lists all."
    return [problem.strip() for problem in problems]


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
    config = load("data.train=[a]", f"model.path={text}", f"run_dir={text}")
    assert config.model.path == config.run_dir == text


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


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("data.tran=[a]", "data.train"),
        ("optim.learning_rate_=1", "optim.learning_rate"),
        ("modl.path=x", "model.path"),
        ("learning_rate=1", "optim.learning_rate"),
        ("Seed=1", "seed"),
    ],
)
def test_unknown_options_get_the_nearest_name(
    capsys: pytest.CaptureFixture[str], word: str, near: str
) -> None:
    (told,) = complaints(capsys, *NEEDED, word)
    assert told == f"{word.partition('=')[0]}: there is no such option. Did you mean {near}?"


@pytest.mark.parametrize("word", ["zzz=1", "data.abc=1", "log.bucket=1", "loss.reward=1"])
def test_nothing_is_guessed_where_no_name_is_similar(
    capsys: pytest.CaptureFixture[str], word: str
) -> None:
    (told,) = complaints(capsys, *NEEDED, word)
    assert told == f"{word.partition('=')[0]}: there is no such option."


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("optim.lr=1e-6", "Did you mean optim.learning_rate?"),
        ("optim.warmup_ratio=0.1", "Did you mean optim.warmup_steps (a number of steps)?"),
        (
            "per_device_train_batch_size=2",
            "Did you mean train.batch_size (the global batch, over all devices and microbatches)?",
        ),
        (
            "train.gradient_accumulation_steps=4",
            "It is computed from train.batch_size and data.packed_length (gradient accumulation)",
        ),
        (
            "log.wandb=true",
            "Did you mean log.tensorboard (TensorBoard and metrics.jsonl; W&B is not supported)?",
        ),
        ("bf16=true", "Did you mean model.compute_dtype (bfloat16 or float32)?"),
        ("precompute_ref_log_probs=true", "Did you mean reference=cached?"),
        ("beta=0.1", "Did you mean loss.beta?"),
    ],
)
def test_names_of_other_frameworks_get_ours(
    capsys: pytest.CaptureFixture[str], word: str, hint: str
) -> None:
    (told,) = complaints(capsys, *NEEDED, word)
    assert told == f"{word.partition('=')[0]}: there is no such option. {hint}"


def test_arguments_as_other_frameworks_write_them_are_answered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert complaints(capsys, *NEEDED, "--per-device-eval-batch-size", "--learning_rate=1e-6") == [
        "--per-device-eval-batch-size: not understood. Options are written section.field=value. "
        "It is computed from train.batch_size",
        "--learning_rate=1e-6: not understood. Options are written section.field=value. "
        "Did you mean optim.learning_rate?",
    ]


def test_the_file_of_another_framework_is_answered_name_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "levanter.yaml"
    path.write_text("trainer:\n  train_batch_size: 64\n  mp: f32\nbeta: 0.1\n")
    told = complaints(capsys, *NEEDED, "--config", str(path))
    assert [line.split(":")[0] for line in told] == [
        "beta",
        "trainer.train_batch_size",
        "trainer.mp",
    ]
    assert all("Did you mean" in line for line in told)


def test_answers_to_other_frameworks_name_options_that_exist() -> None:
    options = {name for name, *_ in cli.fields(Config)}
    for name in FOREIGN_NAMES:
        hint = foreign_hint(name, options)
        assert hint is not None, f"{name}: mentions what is no option"
        assert name not in options or hint == f"Did you mean {name}?"


def test_answers_to_other_frameworks_do_not_name_options_of_other_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Small:
        """A command's options."""

        __pydantic_config__ = sections.STRICT_KEYS
        step: int = 0

    with pytest.raises(SystemExit):
        cli.load(Small, ["learning_rate=1"], command="small")
    assert "learning_rate: there is no such option.\n" in capsys.readouterr().err


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
    assert {name for name, *_ in cli.fields(Config)} == set(flatten(printed))


PRINTABLE = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])


@settings(max_examples=300)
@given(
    rate=st.floats(0, 1e3, allow_nan=False),
    path=st.text(PRINTABLE, min_size=1, max_size=20),
    steps=st.none() | st.integers(1, 10**12),
    beta=st.none() | st.floats(1e-300, 1e300),
    names=st.lists(st.text(PRINTABLE, max_size=8), min_size=1, max_size=4),
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


# --- what the sections refuse ---


@pytest.mark.parametrize(
    "words",
    [
        "data.eval_fraction=1",
        "data.max_dropped_fraction=2",
        "data.weights=[0]",
        "data.shp.min_score_ratio=0.5",
        "data.max_pairs_per_prompt=-1",
        "data.max_prompt_length=-1",
        "data.num_packed_lengths=0",
        "loss.name=[]",
        "loss.name=[sigmoid,sigmoid]",
        "loss.label_smoothing=0.5",
        "loss.ld_alpha=1.5",
        "loss.ref_sync_every=-1",
        "loss.ref_mixup_alpha=0.5",
        "loss.alpha_divergence=2",
        "loss.discopop_tau=0",
        "loss.router_aux_coef=-1",
        "lora.rank=-1",
        "lora.alpha=2",
        "lora.rslora=true",
        "lora.targets=q",
        "model.quantize=nf4",
        "reference=adapter_off",
        "loss.weights=[1,2]",
        "optim.learning_rate=-1",
        "optim.weight_decay=-1",
        "optim.warmup_steps=-1",
        "optim.max_grad_norm=-1",
        "train.batch_size=0",
        "train.steps=0",
        "train.epochs=0",
        "mesh.fsdp=0",
        "mesh.tensor=0",
        "eval.every=-1",
        "checkpoint.save_every=-1",
        "checkpoint.keep=0",
        "checkpoint.keep_best=-1",
        "log.every=0",
    ],
)
def test_values_out_of_range_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], words: str
) -> None:
    told = complaints(capsys, *NEEDED, words)
    assert len(told) == 1 and told[0].startswith(words.partition("=")[0] + "="), told


def test_options_that_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(capsys, *NEEDED, "train.steps=5", "train.epochs=1")[0].startswith(
        "train.steps=5: train.epochs=1 is given too"
    )
    assert complaints(capsys, *NEEDED, "train.steps=5", "optim.warmup_steps=5")[0].startswith(
        "optim.warmup_steps=5: must be fewer"
    )
    assert complaints(capsys, *NEEDED, "data.eval_fraction=0", "eval.every=50")[0].startswith(
        "eval.every=50: there are no validation pairs"
    )
    assert complaints(capsys, *NEEDED, "data.max_length=10", "data.max_prompt_length=10")[
        0
    ].startswith("data.max_prompt_length=10: must be below data.max_length=10")
    lengths = ["data.max_length=3000", "data.packed_length=4096"]
    assert complaints(capsys, *NEEDED, *lengths)[0].startswith(
        "data.packed_length=4096: must be at least twice"
    )
    assert complaints(capsys, *NEEDED, "mesh.context=4", "data.packed_length=4098") == [
        "mesh.context=4: does not divide data.packed_length=4098. Use data.packed_length=4160"
    ]
    assert complaints(capsys, *NEEDED, "data.weights=[1,2]")[0].startswith(
        "data.weights=[1.0, 2.0]: must hold one weight for each of the 1 sets"
    )
    assert load(*NEEDED, "data.eval_fraction=0", "eval.every=0").eval.every == 0


@pytest.mark.parametrize(
    "words",
    [
        ["data.eval_fraction=0"],
        ["eval.every=0"],
        ["data.eval_fraction=0", "checkpoint.keep_best=0"],
        ["data.max_length=4096"],
        ["data.max_length=100000"],
        ["data.max_length=77", "mesh.context=64"],
        ["mesh.context=64"],
        ["data.max_prompt_length=2000"],
        ["data.packed_length=64"],
        ["optim.warmup_steps=1000"],
        ["lora.path=x"],
        ["train.steps=1"],
    ],
)
def test_no_error_about_an_option_that_was_not_set(words: list[str]) -> None:
    load(*NEEDED, *words)


def test_without_validation_pairs_evaluation_is_off() -> None:
    config = load(*NEEDED, "data.eval_fraction=0")
    assert config.eval.every is None and not config.data.has_eval
    assert load(*NEEDED, "data.eval_fraction=0", "data.eval=b").data.has_eval


def test_automatic_lengths_fit_each_other() -> None:
    for max_length in (0, 2, 77, 1024, 2048, 2049, 100_000):
        data = load(*NEEDED, f"data.max_length={max_length}").data.with_lengths(2**20)
        assert data.max_length == (max_length or 1024)
        assert data.packed_length >= max(4096, 2 * data.max_length)
        assert data.packed_length % 64 == 0
    assert load(*NEEDED).data.with_lengths(512).max_length == 512
    with pytest.raises(ValueError, match=r"^data.max_prompt_length=2000: must be below"):
        load(*NEEDED, "data.max_prompt_length=2000").data.with_lengths(8192)
    with pytest.raises(ValueError, match=r"^data.packed_length=64: must be at least twice"):
        load(*NEEDED, "data.packed_length=64").data.with_lengths(8192)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lora.alpha=0"], "lora.alpha=0.0: must be above 0"),
        (["lora.targets=[]"], "lora.targets=[]: name at least one"),
        (["model.param_dtype=bfloat16"], "model.param_dtype=bfloat16: adapters are float32"),
        (["model.quantize=int8", "model.remat=none"], "model.quantize=int8: with model.remat=none"),
        (
            ["loss.ref_sync_every=2"],
            "loss.ref_sync_every=2: a reference cannot move towards adapters",
        ),
        (
            ["loss.ref_sync_every=2", "reference=cached"],
            "loss.ref_sync_every=2: a reference cannot move towards adapters",
        ),
    ],
)
def test_what_does_not_go_with_adapters(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    (found,) = complaints(capsys, *NEEDED, "lora.rank=4", *words)
    assert found.startswith(told)


def test_a_cached_reference_cannot_move(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(capsys, *NEEDED, "loss.ref_sync_every=2", "reference=cached") == [
        "loss.ref_sync_every=2: moves a reference, but reference=cached. Use reference=frozen"
    ]
    assert load(*NEEDED, "loss.ref_sync_every=2").reference == "auto"


def test_adapters_are_asked_for_by_rank_or_by_path() -> None:
    config = load(
        *NEEDED,
        "lora.rank=8",
        "lora.targets=[q_proj,v]",
        "lora.rslora=true",
        "model.quantize=nf4",
        "reference=cached",
    )
    assert config.lora.enabled and config.lora.targets == ["q_proj", "v"]
    assert (
        load(*NEEDED, "lora.path=x").lora.enabled
        and load(*NEEDED, "lora.rank=2", "lora.targets=all-linear").lora.targets == "all-linear"
    )
    assert not load(*NEEDED).lora.enabled
