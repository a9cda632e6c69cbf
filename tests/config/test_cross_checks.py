"""What the sections refuse, alone and together; nothing about an option that was not set."""

import pytest

from tests.config.command_line import NEEDED, complaints, load


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
        "loss.weights=[0]",
        "loss.weights=[-1]",
        "seed=-1",
        "seed=4294967296",
        "optim.warmup_ratio=1",
        "optim.warmup_ratio=-0.1",
        "train.epochs=-0.5",
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
        "run_dir=exp[1]",
    ],
)
def test_values_out_of_range_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], words: str
) -> None:
    told = complaints(capsys, *NEEDED, words)
    assert len(told) == 1 and told[0].startswith(words.partition("=")[0] + "="), told


def test_options_that_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(capsys, *NEEDED, "train.steps=5", "train.epochs=1")[0].startswith(
        "train.steps=5: train.epochs=1"
    )
    both = ("optim.warmup_steps=5", "optim.warmup_ratio=0.1")
    assert complaints(capsys, *NEEDED, *both)[0].startswith("optim.warmup_ratio=0.1: optim.warmup")
    zeros = ("loss.name=[sigmoid,sft]", "loss.weights=[0,0.0]")
    assert "nothing would be trained" in complaints(capsys, *NEEDED, *zeros)[0]
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
