"""Resume: a run that was interrupted ends with the same bits as one that was not."""

import hashlib
import io
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

import jaxdpo.training.reference_cache
from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.config.schema import Config
from jaxdpo.data.loader import Loader
from jaxdpo.distributed import sharding
from jaxdpo.training.loop import train
from jaxdpo.training.startup_checks import Fault
from jaxdpo.training.trainer import Trainer
from jaxdpo.training.weights import PolicyWeights
from tests.runs import (
    MAKE_MESH,
    RUNS,
    STOPPED,
    interrupt,
    replaced,
    same_bits,
    settings,
    stopped_copy,
    untimed,
    whole,
)

pytestmark = pytest.mark.usefixtures("one_device")


def test_resume_after_sigterm_ends_as_if_nothing_had_happened(shared: Path, tmp_path: Path) -> None:
    some = stopped_copy(shared, tmp_path)
    assert [row["step"] for row in untimed(tmp_path) if "loss" in row] == list(
        range(1, STOPPED + 1)
    )
    assert train(some) is True
    assert same_bits(tmp_path, whole(shared))


def test_sigterm_where_an_evaluation_is_due_resumes_with_it(shared: Path, tmp_path: Path) -> None:
    some = settings(shared, tmp_path)
    interrupt(some, 4)
    assert untimed(tmp_path)[-1]["step"] == 4 and "eval/loss" not in untimed(tmp_path)[-1]
    assert train(some) is True
    assert same_bits(tmp_path, whole(shared))


def test_resume_cuts_logged_rows_beyond_the_checkpoint(shared: Path, tmp_path: Path) -> None:
    """As after a SIGKILL: metrics of steps after the last save are on disk."""
    some = settings(shared, tmp_path, checkpoint__save_every=3)
    interrupt(some, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 123}\n{"step": 5, "lo')
    (tmp_path / "nonfinite.jsonl").write_text(
        '{"step": 2, "ids": ["a"]}\n{"step": 4, "ids": ["b"]}\n'
    )
    assert train(some) is True
    assert same_bits(tmp_path, whole(shared))
    assert (tmp_path / "nonfinite.jsonl").read_text() == '{"step": 2, "ids": ["a"]}\n'


def test_resume_of_a_finished_run_changes_nothing(shared: Path) -> None:
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
    monkeypatch.setattr(
        Loader, "stream", lambda self, first, last: stream(self, 1, last - first + 1)
    )


LOSSES_ON_RESUME = {
    "first moments": restoring(lambda tree: zeroed(tree, "opt", "mu")),
    "second moments": restoring(lambda tree: zeroed(tree, "opt", "nu")),
    "optimizer's count": restoring(lambda tree: zeroed(tree, "opt", "count")),
    "step": restoring(lambda tree: zeroed(tree, "step")),
    "position in the data": from_the_first_batch,
}


@pytest.mark.parametrize("lost", LOSSES_ON_RESUME)
def test_the_comparison_notices_what_a_resume_loses(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    some = stopped_copy(shared, tmp_path)
    LOSSES_ON_RESUME[lost](monkeypatch)
    assert train(some) is True
    assert not same_bits(tmp_path, whole(shared))


def stopped_as(shared: Path, run_dir: Path, kind: str) -> Config:
    """A run of this kind, stopped in its second epoch."""
    some = settings(shared, run_dir, **RUNS[kind])
    interrupt(some, STOPPED)
    return some


@pytest.mark.slow
def test_resume_restores_a_synced_reference(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = whole(shared, "tr")
    some = stopped_as(shared, tmp_path / "kept", "tr")
    shutil.copytree(tmp_path / "kept", tmp_path / "lost")
    assert train(some) is True and same_bits(tmp_path / "kept", theirs)
    other = settings(shared, tmp_path / "lost", **RUNS["tr"])
    forget = restoring(
        lambda tree: tree.update(reference=Trainer.open(other).reference_again(None))
    )  # what is there without it
    forget(monkeypatch)
    assert train(other) is True and not same_bits(tmp_path / "lost", theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("lora", marks=pytest.mark.slow),
        "cached",
        pytest.param("lora-cached", marks=pytest.mark.slow),
        pytest.param("lora-nf4", marks=pytest.mark.slow),
    ],
)
def test_resume_of_adapters_and_cached_references_is_exact(
    shared: Path, tmp_path: Path, kind: str
) -> None:
    some = stopped_as(shared, tmp_path, kind)
    assert train(some) is True
    assert same_bits(tmp_path, whole(shared, kind))


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["first moments", "second moments", "position in the data"])
def test_the_comparison_notices_what_the_resume_of_an_adapter_loses(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    some = stopped_as(shared, tmp_path, "lora")
    LOSSES_ON_RESUME[lost](monkeypatch)
    assert train(some) is True
    assert not same_bits(tmp_path, whole(shared, "lora"))


@pytest.mark.slow
def test_a_checkpoint_of_an_adapter_holds_no_base(shared: Path) -> None:
    run_dir = whole(shared, "lora")
    _, adapter, meta = restore_params(run_dir)
    assert (
        set(adapter) == {"layers"}
        and set(adapter["layers"]) == {"attn", "mlp"}
        and set(adapter["layers"]["attn"]["q"]) == {"a", "b"}
    )
    saved = json.loads((run_dir / "checkpoints" / "8" / "state" / "_METADATA").read_text())[
        "tree_metadata"
    ]
    matrices = [
        tuple(key["key"] for key in item["key_metadata"])
        for item in saved.values()
        if len(item["key_metadata"]) > 2
    ]
    assert (
        len(matrices) == 3 * 7 * 2
        and {path[0] for path in matrices} == {"params", "opt"}
        and {path[-1] for path in matrices} == {"a", "b"}
    )
    assert meta["identity"]["weights"].startswith("sha256:") and meta["config"]["lora"]["rank"] == 4


def changed_cache(run_dir: Path) -> None:
    """Log-probs that are off, in a part that says it is whole."""
    for path in run_dir.glob("reference_cache/train-*/*.npy"):
        buffer = io.BytesIO()
        np.save(buffer, np.load(path) + np.float32(0.5) * np.eye(1, 2, dtype=np.float32))
        path.unlink()
        path.with_name(
            f"00000-{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.npy"
        ).write_bytes(buffer.getvalue())


@pytest.mark.slow
def test_resume_reads_a_cached_reference_or_computes_it_from_the_starting_policy(
    shared: Path, tmp_path: Path
) -> None:
    theirs = whole(shared, "cached")
    stopped_as(shared, tmp_path / "a", "cached")
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PolicyWeights, "initial", lambda self: pytest.fail("loaded although the cache is whole")
        )
        assert train(settings(shared, tmp_path / "a", **RUNS["cached"])) is True
    shutil.rmtree(tmp_path / "b" / "reference_cache")  # as if it had been on a scratch disk
    assert train(settings(shared, tmp_path / "b", **RUNS["cached"])) is True
    assert same_bits(tmp_path / "a", theirs) and same_bits(tmp_path / "b", theirs)
    changed_cache(tmp_path / "c")
    # What is read is what is used, and so it is compared with what the run started with.
    with pytest.raises(Fault, match="not the one that this run started with"):
        train(settings(shared, tmp_path / "c", **RUNS["cached"]))


@pytest.mark.slow
def test_sigterm_while_the_reference_is_cached_keeps_complete_parts(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    some = settings(shared, tmp_path, **RUNS["cached"])
    with monkeypatch.context() as patch:
        patch.setattr("jaxdpo.training.reference_cache.BATCHES_PER_PART", 2)
        patch.setattr(
            "jaxdpo.training.reference_cache._write",
            signalled(jaxdpo.training.reference_cache._write),
        )
        assert train(some) is False
        assert len(list(tmp_path.glob("reference_cache/train-*/*.npy"))) == 1 and not list(
            (tmp_path / "checkpoints").iterdir()
        )
        assert "the reference log-probs computed so far are saved" in capsys.readouterr().out
        patch.undo()
        patch.setattr("jaxdpo.training.reference_cache.BATCHES_PER_PART", 2)
        assert train(some) is True
    assert "1 parts read and verified" in capsys.readouterr().out
    assert same_bits(tmp_path, whole(shared, "cached"))


def signalled(write: Callable[..., None]) -> Callable[..., None]:
    """`write`, with a SIGTERM after it."""

    def write_and_signal(*args: Any) -> None:
        write(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    return write_and_signal


def test_resume_loads_the_same_reference_whatever_the_dtypes(shared: Path, tmp_path: Path) -> None:
    """Weights in bfloat16 are rounded before the reference is copied from them, also on resume."""
    for param_dtype, compute_dtype in (
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float32"),
    ):
        some = settings(
            shared, tmp_path, model__param_dtype=param_dtype, model__compute_dtype=compute_dtype
        )
        session = Trainer.open(some)
        _, fixed = session.start(session.weights.initial(), None)
        for a, b in zip(
            jax.tree.leaves(fixed.reference),
            jax.tree.leaves(session.reference_again(None)),
            strict=True,
        ):
            assert a.dtype == b.dtype == compute_dtype and (a == b).all()


@pytest.mark.slow
def test_resume_may_change_where_and_in_which_order_things_are_computed(
    shared: Path, tmp_path: Path
) -> None:
    some = settings(shared, tmp_path, eval__every=0)
    interrupt(some, STOPPED)
    other = replaced(
        some,
        model={"attention": "dense"},
        data={"share_prefix": False, "packed_length": 96},
        log={"every": 1},
    )
    assert train(other) is True
    wanted = [row["loss"] for row in untimed(whole(shared)) if "loss" in row]
    assert [row["loss"] for row in untimed(tmp_path)] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_resume_on_one_device_of_a_run_on_eight(shared: Path, tmp_path: Path) -> None:
    some = settings(
        shared, tmp_path, mesh__fsdp=2, mesh__tensor=2, eval__samples=1, eval__sample_tokens=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", MAKE_MESH)
        interrupt(some, STOPPED)
    assert train(settings(shared, tmp_path)) is True
    ours, theirs = (
        [row for row in untimed(run) if "loss" in row] for run in (tmp_path, whole(shared))
    )
    for key in ("loss", "grad_norm", "logps/chosen"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-5)
