"""A run: what it leaves on disk, that it resumes bit for bit, and what makes it stop."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxdpo import options, runner, sharding
from jaxdpo.checkpoint import Checkpoints, restore_params
from jaxdpo.config import Config, MeshSection
from jaxdpo.data.loader import Loader
from jaxdpo.metrics import TIME_KEYS
from jaxdpo.runner import Fault, Run, train
from jaxdpo.session import Session
from jaxdpo.step import StepOptions, compile_steps
from tests.tiny import config, rows, write_model, write_rows

TOTAL, STOPPED = 8, 7  # 2 pairs a step: the run is stopped in its second epoch
Params = dict[str, Any]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, its rows, and the programs that these tests compile."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", rows(13))
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs use one of the eight devices, and those with the same options share their programs."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda section: make_mesh(MeshSection(), jax.devices()[:1]))
    monkeypatch.setattr("jaxdpo.session.compile_steps", compiled_once)


PROGRAMS: dict[str, tuple[Callable, Callable]] = {}


def compiled_once(options: StepOptions, mesh: jax.sharding.Mesh, shardings: Any) -> tuple[Callable, Callable]:
    """compile_steps that remembers."""
    key = repr(options)
    if key not in PROGRAMS:
        PROGRAMS[key] = compile_steps(options, mesh, shardings)
    return PROGRAMS[key]


def settings(shared: Path, run_dir: Path, **changes: Any) -> Config:
    """A run of TOTAL steps that evaluates and saves every other one."""
    common = {
        "run_dir": str(run_dir),
        "train__steps": TOTAL,
        "data__eval_fraction": 0.3,
        "eval__every": 2,
        "checkpoint__save_every": 3,
    }
    return config(shared, **common | changes)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that must be the same bits whenever and however often the run was interrupted."""
    return [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in metrics(run_dir)]


def final_params(run_dir: Path) -> Params:
    step, params, _ = restore_params(run_dir)
    assert step == TOTAL
    return params


def same_bits(ours: Path, theirs: Path) -> bool:
    """Whether two runs ended with the same parameters and metrics."""
    equal = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), final_params(ours), final_params(theirs))
    return all(jax.tree.leaves(equal)) and untimed(ours) == untimed(theirs)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A SIGTERM during this step."""
    advance = Run.advance

    def advance_and_signal(self: Run, now: int, *args: Any) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(self, now, *args)

    monkeypatch.setattr(Run, "advance", advance_and_signal)


@functools.cache
def stopped(shared: Path) -> Path:
    """The plain run up to STOPPED, to be copied."""
    some = settings(shared, shared / "stopped")
    interrupt(some, STOPPED)
    return shared / "stopped"


def stopped_copy(shared: Path, run_dir: Path) -> Config:
    """A copy of the stopped run, and its config."""
    shutil.copytree(stopped(shared), run_dir, dirs_exist_ok=True)
    return settings(shared, run_dir)


def interrupt(some: Config, step: int) -> None:
    """The part of a run up to a SIGTERM, saved."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        assert train(some) is False
    assert restore_params(some.run_dir)[0] == step
    assert step != STOPPED or Session.open(some).loader.epoch(step) > 1


@functools.cache
def whole(shared: Path, kind: str = "plain") -> Path:
    """The uninterrupted run."""
    changes = {"plain": {}, "tr": {"loss__tr_every": 2, "loss__tr_alpha": 0.5, "eval__every": 0}}[kind]
    assert train(settings(shared, shared / kind, **changes)) is True
    return shared / kind


# --- what a run leaves ---


def test_the_files_of_a_run_folder(shared: Path) -> None:
    run_dir = whole(shared)
    found = {path.name for path in run_dir.iterdir()}
    assert found == {"config.yaml", "metrics.jsonl", "data_report.json", "checkpoints", "model"}
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} >= {"6", "8"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (run_dir / "model").iterdir()}
    report = json.loads((run_dir / "data_report.json").read_text())
    assert report["train"]["pairs"] + report["eval"]["pairs"] == 13 and report["sets"]["train"][0]["kept"] == 13
    saved, problems = options.validate(Config, yaml.safe_load((run_dir / "config.yaml").read_text()))
    assert not problems and saved is not None and saved.optim == settings(shared, run_dir).optim
    assert (saved.model.compute_dtype, saved.data.max_prompt_length) == ("float32", 16)  # as settled for this run


def test_the_metrics_of_a_run(shared: Path) -> None:
    found = metrics(whole(shared))
    steps, evaluations = [row for row in found if "loss" in row], [row for row in found if "eval/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, TOTAL + 1))
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6, 8]
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert rewards | {"epoch", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected", "lengths/chosen"} <= set(steps[0])
    assert {"tokens_per_second", "pairs_per_second", "padding_fraction"} <= set(steps[0])
    assert {"eval/rewards/accuracies", "eval/rewards/margins", "eval/kl/token_exact", "eval/lengths/rejected"} <= set(evaluations[0])
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and steps[0]["rewards/chosen"] == 0
    assert evaluations[0]["eval/kl/token_exact"] == 0 < evaluations[-1]["eval/kl/token_exact"]
    session = Session.open(settings(shared, shared / "plain"))
    pairs = len(session.data.train)
    assert steps[-1]["epoch"] == pytest.approx(1 + (TOTAL - session.loader.steps_per_epoch) * 2 / pairs)
    assert steps[-1]["tokens"] == sum(session.loader.num_tokens(step) for step in range(1, TOTAL + 1))
    assert all(0 <= row["padding_fraction"] < 1 for row in steps)


def test_an_evaluation_does_not_depend_on_how_many_pairs_it_takes_at_once(shared: Path, tmp_path: Path) -> None:
    (first, *_) = metrics(whole(shared))
    train(settings(shared, tmp_path, train__pairs_per_step=5, train__steps=1))
    (again, *_) = metrics(tmp_path)
    for key in first.keys() - TIME_KEYS:
        assert again[key] == pytest.approx(first[key], rel=1e-6, abs=1e-6), key


def test_validation_pairs_may_be_sampled(shared: Path, tmp_path: Path) -> None:
    train(settings(shared, tmp_path, eval__samples=2, eval__sample_tokens=3, train__steps=2))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 0, 2, 2]
    assert all(row["policy"] == row["reference"] and len(row["policy"].split()) <= 3 for row in samples[:2])


# --- resuming ---


def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(shared: Path, tmp_path: Path) -> None:
    some = stopped_copy(shared, tmp_path)
    assert [row["step"] for row in untimed(tmp_path) if "loss" in row] == list(range(1, STOPPED + 1))
    assert train(some) is True
    assert same_bits(tmp_path, whole(shared))


def test_a_stop_where_an_evaluation_was_due_loses_nothing(shared: Path, tmp_path: Path) -> None:
    some = settings(shared, tmp_path)
    interrupt(some, 4)
    assert untimed(tmp_path)[-1]["step"] == 4 and "eval/loss" not in untimed(tmp_path)[-1]
    assert train(some) is True
    assert same_bits(tmp_path, whole(shared))


def test_rows_beyond_the_checkpoint_are_told_once(shared: Path, tmp_path: Path) -> None:
    """As after a SIGKILL: metrics of steps after the last save are on disk."""
    some = settings(shared, tmp_path, checkpoint__save_every=3)
    interrupt(some, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 123}\n{"step": 5, "lo')
    (tmp_path / "nonfinite.jsonl").write_text('{"step": 2, "ids": ["a"]}\n{"step": 4, "ids": ["b"]}\n')
    assert train(some) is True
    assert same_bits(tmp_path, whole(shared))
    assert (tmp_path / "nonfinite.jsonl").read_text() == '{"step": 2, "ids": ["a"]}\n'


def test_a_finished_run_stays_as_it_is(shared: Path) -> None:
    run_dir = whole(shared)
    before = untimed(run_dir)
    assert train(settings(shared, run_dir)) is True
    assert untimed(run_dir) == before


def restoring(change: Callable[[dict[str, Any]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Have the restored state changed."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        restore = Checkpoints.restore

        def changed(self: Checkpoints, abstract: Any) -> Any:
            found = restore(self, abstract)
            assert found is not None
            change(found[1])
            return found

        monkeypatch.setattr(Checkpoints, "restore", changed)

    return patch


def zeroed(tree: dict[str, Any], *path: str) -> None:
    for name in path[:-1]:
        tree = tree[name]
    tree[path[-1]] = jax.tree.map(jnp.zeros_like, tree[path[-1]])


def from_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Loader.stream
    monkeypatch.setattr(Loader, "stream", lambda self, first, last: stream(self, 1, last - first + 1))


LOSSES_ON_RESUME = {
    "first moments": restoring(lambda tree: zeroed(tree, "opt", "mu")),
    "second moments": restoring(lambda tree: zeroed(tree, "opt", "nu")),
    "optimizer's count": restoring(lambda tree: zeroed(tree, "opt", "count")),
    "step": restoring(lambda tree: zeroed(tree, "step")),
    "position in the data": from_the_first_batch,
}


@pytest.mark.parametrize("lost", LOSSES_ON_RESUME)
def test_the_comparison_sees_what_a_resume_loses(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    some = stopped_copy(shared, tmp_path)
    LOSSES_ON_RESUME[lost](monkeypatch)
    assert train(some) is True
    assert not same_bits(tmp_path, whole(shared))


def test_a_moved_reference_is_saved_and_restored(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = whole(shared, "tr")
    changes: dict[str, Any] = {"loss__tr_every": 2, "loss__tr_alpha": 0.5, "eval__every": 0}
    some = settings(shared, tmp_path / "kept", **changes)
    interrupt(some, STOPPED)
    shutil.copytree(tmp_path / "kept", tmp_path / "lost")
    assert train(some) is True and same_bits(tmp_path / "kept", theirs)
    other = settings(shared, tmp_path / "lost", **changes)
    forget = restoring(lambda tree: tree.update(reference=Session.open(other).starting_reference()))  # what is there without it
    forget(monkeypatch)
    assert train(other) is True and not same_bits(tmp_path / "lost", theirs)


def test_a_reference_is_the_same_after_a_resume_whatever_the_types(shared: Path, tmp_path: Path) -> None:
    """Weights held in bfloat16 are rounded before the reference is taken from them, also on resume."""
    for param_dtype, compute_dtype in (("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float32")):
        some = settings(shared, tmp_path, model__param_dtype=param_dtype, model__compute_dtype=compute_dtype)
        session = Session.open(some)
        _, reference = session.start()
        for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(session.starting_reference()), strict=True):
            assert a.dtype == b.dtype == compute_dtype and (a == b).all()


# --- what a resume refuses ---


@pytest.fixture(scope="module")
def halfway(shared: Path) -> Config:
    """A run that was stopped after its second step."""
    some = settings(shared, shared / "halfway")
    interrupt(some, 2)
    return some


def replaced(some: Config, **changes: dict[str, Any]) -> Config:
    return dataclasses.replace(some, **{name: dataclasses.replace(getattr(some, name), **fields) for name, fields in changes.items()})


def test_another_config_is_refused_with_every_field(halfway: Config) -> None:
    other = replaced(halfway, optim={"learning_rate": 0.5}, loss={"beta": 0.3}, log={"every": 2}, train={"steps": 9})
    with pytest.raises(ValueError) as caught:
        train(other)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"run_dir={halfway.run_dir}: holds checkpoints of a different run:"
    assert lines[1:-1] == [
        "  loss.beta: None in the checkpoint, 0.3 now",
        "  optim.learning_rate: 0.001 in the checkpoint, 0.5 now",
        "  train.steps: 8 in the checkpoint, 9 now",
    ]


def test_another_type_of_products_is_refused_although_both_say_auto(halfway: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_a_gpu(some: Config, mesh: object) -> Config:
        return replaced(some, model={"compute_dtype": "bfloat16"})

    monkeypatch.setattr("jaxdpo.session.settle_dtype", as_on_a_gpu)
    with pytest.raises(ValueError, match=r"model.compute_dtype: float32 in the checkpoint, bfloat16 now"):
        train(halfway)


@pytest.mark.parametrize(
    ("what", "key"), [("rows", "pairs"), ("weights", "weights"), ("tokenizer", "tokenizer"), ("template", "chat_template")]
)
def test_other_data_or_models_are_refused(halfway: Config, shared: Path, what: str, key: str) -> None:
    model = Path(str(halfway.model.path))
    path = {
        "rows": shared / "rows.jsonl",
        "weights": model / "model.safetensors",
        "tokenizer": model / "tokenizer.json",
        "template": model / "tokenizer_config.json",
    }[what]
    before = path.read_bytes()
    changes = {
        "rows": lambda: write_rows(path, [*rows(12), {"prompt": "w1", "chosen": " w2", "rejected": " w3"}]),
        "weights": lambda: write_model(model, seed=5),
        "tokenizer": lambda: path.write_bytes(before.replace(b'"w63": 63', b'"w63": 63, "w64": 63')),
        "template": lambda: path.write_text(json.dumps(json.loads(before) | {"chat_template": "{{ messages }}"})),
    }
    try:
        changes[what]()
        with pytest.raises(ValueError, match=f"\n  {key}: not what the checkpoint was trained with"):
            train(halfway)
    finally:
        path.write_bytes(before)
    Session.open(halfway)


def test_what_only_changes_where_things_are_computed_may_change(shared: Path, tmp_path: Path) -> None:
    some = settings(shared, tmp_path, eval__every=0)
    interrupt(some, STOPPED)
    other = replaced(some, model={"attention": "dense"}, data={"layout": "separate", "max_row_tokens": 96}, log={"every": 1})
    assert train(other) is True
    wanted = [row["loss"] for row in untimed(whole(shared)) if "loss" in row]
    assert [row["loss"] for row in untimed(tmp_path)] == pytest.approx(wanted, rel=1e-5)


def test_pair_weights_are_refused_by_losses_that_mix_pairs(shared: Path, tmp_path: Path) -> None:
    weighted = write_rows(tmp_path / "rows.jsonl", [row | {"weight": 1 + i % 2} for i, row in enumerate(rows(13))])
    with pytest.raises(ValueError, match=r"loss.name=aot: .* the rows of data.train differ in their column 'weight'"):
        Session.open(settings(shared, tmp_path, data__train=[weighted], loss__name="aot"))
    Session.open(settings(shared, tmp_path, data__train=[weighted]))
    Session.open(settings(shared, tmp_path, loss__name="aot"))


# --- what goes wrong ---


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Give the pairs of these steps an infinite weight."""
    batch = Loader.batch

    def poisoned(self: Loader, step: int) -> Any:
        good = batch(self, step)
        return good._replace(weights_MBP=np.where(good.weights_MBP > 0, np.float32(np.inf), 0)) if step in steps else good

    monkeypatch.setattr(Loader, "batch", poisoned)


def test_updates_that_are_not_finite_are_skipped_and_told(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, 4, 6})
    some = settings(shared, tmp_path, eval__every=0, checkpoint__save_every=1, checkpoint__keep=9)
    assert train(some) is True
    found = metrics(tmp_path)
    assert [row["nonfinite"] for row in found] == [0, 0, 1, 1, 0, 1, 0, 0]
    assert [row["loss"] is None for row in found] == [bool(row["nonfinite"]) for row in found]
    told = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    session = Session.open(some)
    wanted = {step: [str(session.data.train.ids[i]) for i in session.loader.pairs_of(step)] for step in (3, 4, 6)}
    assert {row["step"]: row["ids"] for row in told} == wanted and all(len(ids) == 2 for ids in wanted.values())
    saved = {step: [leaf.tobytes() for leaf in jax.tree.leaves(restore_params(tmp_path, step)[1])] for step in range(1, TOTAL + 1)}
    assert saved[2] == saved[3] == saved[4] != saved[5] == saved[6] != saved[7]


def test_three_in_a_row_stop_the_run(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {4, 5, 6})
    some = settings(shared, tmp_path, eval__every=0)
    with pytest.raises(Fault, match=r"3 steps in a row had no finite loss or gradient. .* nonfinite.jsonl"):
        train(some)
    assert [json.loads(line)["step"] for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()] == [4, 5, 6]
    assert restore_params(tmp_path)[0] == 3
    monkeypatch.undo()


def test_a_learning_rate_that_blows_up_stops_the_run(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"Lower optim.learning_rate"):
        train(settings(shared, tmp_path, eval__every=0, optim__learning_rate=1e30, optim__schedule="constant"))
    found = metrics(tmp_path)
    assert found[0]["nonfinite"] == 0 and [row["nonfinite"] for row in found[-3:]] == [1, 1, 1]


@pytest.mark.parametrize("size", [0.01, np.nan])
def test_a_reference_that_differs_stops_the_run_before_it_starts(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    start = Session.start

    def start_apart(self: Session) -> Any:
        state, reference = start(self)
        return state, jax.tree.map(lambda w: w + jnp.float32(size) * jnp.sign(w), reference)

    monkeypatch.setattr(Session, "start", start_apart)
    with pytest.raises(Fault, match=r"policy and reference should agree before the first step, but loss is .*, not 0.693147"):
        train(settings(shared, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists() and not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["ipo", "bco_pair"])
def test_the_closed_form_of_other_losses_holds(shared: Path, tmp_path: Path, name: str) -> None:
    train(settings(shared, tmp_path, loss__name=name, train__steps=1, eval__every=0))
    assert len(metrics(tmp_path)) == 1


def test_stop_restores_the_handlers_and_a_second_signal_is_the_systems() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with runner.stop_on_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) is stop and not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
