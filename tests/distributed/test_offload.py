"""What waits on the hosts: the steps are the same, it is there before and after them, and runs save
and resume it."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.training.loop import train
from jaxdpo.training.ref_sync import sync_reference
from jaxdpo.training.trainer import Trainer
from tests.runs import (
    STOPPED,
    final_params,
    folder_with_inputs,
    interrupt,
    same_bits,
    settings,
    use_one_device,
)
from tests.tiny import Setup, Stepper, config, pairs, params

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with_inputs(tmp_path_factory.mktemp("offload"))


def kinds(tree: object) -> set[str]:
    """Where the matrices of a tree are; its vectors are on the devices."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    vectors = {
        leaf.sharding.memory_kind
        for path, leaf in leaves
        if leaf.ndim < 3 and "layers" in jax.tree_util.keystr(path)
    }
    assert vectors == {"device"}
    return {
        leaf.sharding.memory_kind
        for path, leaf in leaves
        if leaf.ndim > 2 or "layers" not in jax.tree_util.keystr(path)
    }


def trained(
    what: tuple[str, ...], sizes: tuple[int, ...]
) -> tuple[Stepper, list[dict[str, float]]]:
    optim = OptimSection(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    run = Stepper(Setup(mesh=sizes, offload=what, optim=optim))
    batches = [run.pack(pairs(4, seed=seed)) for seed in range(2)]
    return run, [run.train(batches[step % 2]) for step in range(STEPS)] + [run.evaluate(batches[0])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "sizes"),
    [
        (("reference",), (1,)),
        pytest.param(("moments",), (1,), marks=pytest.mark.slow),
        pytest.param(("reference", "moments"), (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_offload_changes_no_step(what: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    (ours, waited), (theirs, plain) = trained(what, sizes), trained((), sizes)
    for one, other in zip(waited, plain, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
    for one, other in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert kinds(ours.state.params) == {"device"}
    assert kinds((ours.state.opt["mu"], ours.state.opt["nu"])) == {
        "pinned_host" if "moments" in what else "device"
    }
    assert kinds(ours.reference) == {"pinned_host" if "reference" in what else "device"}


@pytest.mark.parametrize("what", [(), ("reference",), ("moments",), ("reference", "moments")])
def test_a_program_reads_offloaded_arrays_from_the_host_and_leaves_them_there(
    what: tuple[str, ...],
) -> None:
    """As the compiler is told; the memory analysis of CPUs does not tell the kinds apart."""
    run = Stepper(Setup(offload=what))
    text = run.train_step.lower(
        run.state, run.frozen, run.pack(pairs(2)), np.asarray(True)
    ).as_text()
    found = re.search(r"func.func public @main\((.*?)\) -> \((.*?)\) \{\n", text, re.S)
    assert found
    taken, given = found.groups()
    weights = len(jax.tree.leaves(params())) - 2  # two norms of all layers stay
    from_hosts = [one for one in taken.split("%arg") if "pinned_host" in one]
    assert len(from_hosts) == weights * (("reference" in what) + 2 * ("moments" in what))
    in_place = [one for one in from_hosts if "aliasing_output" in one or "buffer_donor" in one]
    assert len(in_place) == given.count("pinned_host") == weights * 2 * ("moments" in what)


def test_ref_sync_of_an_offloaded_reference_equals_one_on_the_devices() -> None:
    section = LossSection(ref_sync_every=1, ref_mixup_alpha=0.3)
    runs = [Stepper(Setup(offload=what)) for what in (("reference",), ())]
    there, here = (sync_reference(run.reference or {}, run.state.params, section) for run in runs)
    assert kinds(there) == {"pinned_host"} and kinds(here) == {"device"}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), there, here)


RUNS_WITH = {
    "full": {"eval__samples": 1, "eval__sample_tokens": 2},
    "tr": {"loss__ref_sync_every": 2, "eval__every": 0},
    "lora": {
        "lora__rank": 4,
        "optim__learning_rate": 1e-2,
        "reference": "frozen",
        "model__quantize": "int8",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["full", "tr", "lora"],
)
def test_resume_with_offloaded_reference_and_moments_is_bit_exact(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_one_device(monkeypatch)
    some = settings(
        folder, folder / kind, train__offload=["reference", "moments"], **RUNS_WITH[kind]
    )
    assert train(some) is True
    again = dataclasses.replace(some, run_dir=str(folder / f"{kind}-again"))
    interrupt(again, STOPPED)
    assert train(again) is True
    assert same_bits(Path(again.run_dir), Path(some.run_dir))


@pytest.mark.slow
def test_resume_may_change_the_offload_of_moments(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_one_device(monkeypatch)
    some = settings(folder, folder / "there", train__offload=["moments"])
    interrupt(some, STOPPED)
    assert train(settings(folder, folder / "there")) is True
    whole_run = settings(folder, folder / "here")
    assert train(whole_run) is True
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7),
        *(final_params(folder / name) for name in ("there", "here")),
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"reference": "cached"}, "holds no weights"),
        ({"lora__rank": 4}, "is the policy's own base"),
        ({"loss__name": "simpo"}, "does not exist"),
    ],
)
def test_a_reference_without_weights_cannot_be_offloaded(
    folder: Path, changes: dict[str, object], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        Trainer.open(config(folder, train__offload=["reference"], **changes))
