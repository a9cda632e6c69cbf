"""The references: they differ in what they hold, and in nothing that they compute."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdpo.distributed import sharding
from jaxdpo.models.hf.peft import write_peft
from jaxdpo.models.lora import Lora
from jaxdpo.models.params import Params
from jaxdpo.training import step
from jaxdpo.training.loop import train
from jaxdpo.training.reference_cache import CachedLogps
from jaxdpo.training.state import FrozenState, TrainState
from jaxdpo.training.trainer import Trainer
from tests.models.test_lora import random_adapter
from tests.runs import MAKE_MESH, folder_with_inputs, metrics, settings
from tests.tiny import host, model, write_model

pytestmark = pytest.mark.usefixtures("one_device")

ADAPTER = Lora(rank=3, alpha=6.0, rslora=True, targets=("attn/q", "attn/k", "attn/o", "mlp/down"))
STARTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora__rank": 4},
    "from an adapter": {"lora__path": "adapter"},
}
KINDS = {
    "full": ("frozen", "cached"),
    "lora": ("frozen", "adapter_off", "cached"),
    "from an adapter": ("frozen", "adapter_off", "cached"),
}
CASES = []
for _start, _kinds in KINDS.items():
    for _kind in _kinds[1:]:
        is_quick = (_start, _kind) == ("full", "cached")
        marks = () if is_quick else (pytest.mark.slow,)
        CASES.append(pytest.param(_start, _kind, marks=marks))
RATE = {"full": 1e-3, "lora": 3e-2, "from an adapter": 3e-2}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of these tests' runs, with an adapter in it."""
    folder = folder_with_inputs(tmp_path_factory.mktemp("session"))
    (folder / "adapter").mkdir()
    write_peft(
        folder / "adapter",
        model(),
        random_adapter(model(), ADAPTER, 0.1),
        ADAPTER,
        base="elsewhere/model",
    )
    return folder


def options(shared: Path, start: str, kind: str, **changes: Any) -> Any:
    values = STARTS[start] | {"reference": kind, "optim__learning_rate": RATE[start]} | changes
    if "lora__path" in values:
        values["lora__path"] = str(shared / values["lora__path"])
    return settings(shared, shared / f"{start} {kind}".replace(" ", "-"), **values)


class Opened:
    """A session at its start, as the runner has it."""

    def __init__(self, session: Trainer):
        self.session, weights = session, session.weights
        params, base = weights.initial(), weights.base()
        self.cached: CachedLogps | None = None
        if weights.reference_kind == "cached":
            self.cached = session.cache_reference(
                lambda: weights.start_view(params, base), lambda _: None, lambda: False
            )
        self.state, self.fixed = session.start(params, base)

    def fixed_for(self, number: int) -> FrozenState:
        logps = (
            None if self.cached is None else self.cached.train[self.session.loader.pairs_of(number)]
        )
        return self.session.with_logps(self.fixed, logps, self.session.loader.batch(number))


@functools.cache
def five_steps(shared: Path, start: str, kind: str) -> tuple[Params, list[dict[str, Any]]]:
    """Gradients of the first step, and the metrics of five."""
    opened = Opened(Trainer.open(options(shared, start, kind, optim__max_grad_norm=0.0)))
    session, state, grads, rows = opened.session, opened.state, {}, []
    for number in range(1, 6):
        apply = session.put_scalar(True, np.bool_)
        state, found = session.train_step(
            state, opened.fixed_for(number), session.put_batch(session.loader.batch(number)), apply
        )
        rows.append(host(found))
        if number == 1:
            grads = jax.tree.map(
                lambda mean: np.asarray(mean) / np.float32(0.1), state.opt["mu"]
            )  # b1 is 0.9
    return grads, rows


@pytest.mark.parametrize(("start", "kind"), CASES)
def test_every_reference_gives_the_same_loss_and_gradients(
    shared: Path, start: str, kind: str
) -> None:
    (grads, rows), (wanted_grads, wanted_rows) = (
        five_steps(shared, start, kind),
        five_steps(shared, start, "frozen"),
    )
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(1.0, np.abs(theirs).max()))
    for ours, theirs in zip(rows, wanted_rows, strict=True):
        for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected"):
            # Rewards are differences of sums of some 50 nats, whose last float32 digit is 4e-6.
            assert ours[key] == pytest.approx(
                theirs[key], rel=1e-6, abs=4e-6 if "rewards" in key else 1e-6
            ), key
    assert abs(rows[4]["rewards/chosen"]) > 0.01  # policy and reference have parted by then


@pytest.mark.slow
def test_the_comparison_sees_a_reference_that_is_off(shared: Path) -> None:
    """The adapter at lora.path left on in the one reference and off in the other."""
    with_it, without = (
        five_steps(shared, "from an adapter", "adapter_off")[1],
        five_steps(shared, "lora", "adapter_off")[1],
    )
    assert abs(with_it[4]["loss"] - without[4]["loss"]) > 1e-4
    opened = Opened(Trainer.open(options(shared, "from an adapter", "adapter_off")))
    session, bare = opened.session, opened.fixed._replace(reference={})
    _, eval_step = step.compile_steps(
        session.options,
        session.mesh,
        session.shardings,
        session.weights.fixed_shardings._replace(reference={}),
    )
    found = host(
        step.averages(
            eval_step(opened.state.params, bare, session.put_batch(session.loader.batch(1)))
        )
    )
    assert abs(found["rewards/chosen"]) > 1e-3 and found["kl/token_exact"] > 1e-3


@pytest.mark.parametrize("start", ["lora", "from an adapter"])
def test_gradient_norms_are_told_by_factor(shared: Path, start: str) -> None:
    grads, rows = five_steps(shared, start, "adapter_off")
    for row in rows:
        assert row["grad_norm"] ** 2 == pytest.approx(
            row["grad_norm/lora_a"] ** 2 + row["grad_norm/lora_b"] ** 2, rel=1e-5
        )
    assert (rows[0]["grad_norm/lora_a"] == 0) is (start == "lora")  # B is zero at first
    assert rows[4]["grad_norm/lora_a"] > 0 and set(grads) == {"layers"}
    assert "grad_norm/lora_a" not in five_steps(shared, "full", "frozen")[1][0]


@pytest.mark.parametrize("kind", ["frozen", "cached", "none", "auto"])
def test_a_loss_without_a_reference_holds_none(shared: Path, kind: str) -> None:
    session = Trainer.open(options(shared, "lora", kind, loss__name="simpo"))
    opened = Opened(session)
    assert opened.fixed.reference is None and opened.cached is None
    batch = session.loader.batch(1)
    _, found = session.train_step(
        opened.state, opened.fixed, session.put_batch(batch), session.put_scalar(True, np.bool_)
    )
    assert host(found)["loss"] == pytest.approx(simpo(shared), abs=1e-6)


@functools.cache
def simpo(shared: Path) -> float:
    session = Trainer.open(options(shared, "full", "none", loss__name="simpo"))
    opened = Opened(session)
    found = session.eval_step(
        opened.state.params, opened.fixed, session.put_batch(session.loader.batch(1))
    )
    return host(step.averages(found))["loss"]


# --- what is held ---


def compiled(session: Trainer) -> Any:
    """The program of the first step."""
    batch = session.loader.batch(1)
    state = TrainState(**session.abstract_state(with_reference=False))
    arguments = session.put_batch(batch), session.put_scalar(True, np.bool_)
    return session.train_step.lower(state, session.abstract_fixed(batch), *arguments).compile()


def held_bytes(session: Trainer) -> int:
    """Bytes that a step takes as arguments."""
    return compiled(session).memory_analysis().argument_size_in_bytes


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_adapter_off_holds_the_base_once_and_cached_frees_the_reference(shared: Path) -> None:
    sessions = {
        (start, kind): Trainer.open(options(shared, start, kind))
        for start, kinds in KINDS.items()
        for kind in kinds
    }
    held = {key: held_bytes(session) for key, session in sessions.items()}
    model_bytes = num_bytes(sessions["full", "frozen"].weights.trained)
    batch = sessions["full", "frozen"].loader.batch(1)
    logps, slack = batch.lengths_MBP2.size * 4, 256
    assert abs(held["full", "frozen"] - held["full", "cached"] - model_bytes + logps) < slack
    assert abs(held["lora", "frozen"] - held["lora", "adapter_off"] - model_bytes) < slack
    assert abs(held["lora", "cached"] - held["lora", "adapter_off"] - logps) < slack
    adapter = num_bytes(sessions["lora", "frozen"].weights.trained)
    assert (
        abs(held["lora", "adapter_off"] - model_bytes - 3 * adapter - num_bytes(batch)) < slack
    )  # adapter and both moments
    own = num_bytes(sessions["from an adapter", "frozen"].weights.trained)
    assert (
        abs(held["from an adapter", "adapter_off"] - model_bytes - 4 * own - num_bytes(batch))
        < slack
    )


def test_the_reference_leaves_memory_when_its_log_probs_are_known(
    shared: Path, tmp_path: Path
) -> None:
    def embeddings() -> int:
        return sum(array.shape == (64, 32) for array in jax.live_arrays())

    session, before, most = (
        Trainer.open(settings_in(options(shared, "full", "cached"), tmp_path)),
        embeddings(),
        0,
    )

    def load() -> Params:
        return session.weights.start_view(session.weights.initial(), None)

    def watch(_: str) -> None:
        nonlocal most
        most = max(most, embeddings())

    session.cache_reference(load, watch, lambda: False)
    assert most > before == embeddings()


@pytest.mark.slow
def test_the_base_gets_no_gradient(shared: Path, tmp_path: Path) -> None:
    """Beside the activations, a full step has room for a gradient of every weight, and an adapter's
    step has not."""
    write_model(
        tmp_path / "wide", None, hidden_size=256, intermediate_size=1024, num_hidden_layers=6
    )
    room, model_bytes = {}, 0
    for start, kind in (("full", "cached"), ("lora", "adapter_off")):
        some = options(
            shared, start, kind, model__path=str(tmp_path / "wide"), model__init="random"
        )
        session = Trainer.open(some)
        model_bytes = 4 * session.weights.num_all()
        room[start] = compiled(session).memory_analysis().temp_size_in_bytes
    assert room["lora"] < 0.4 * model_bytes < 0.9 * model_bytes < room["full"]


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_random_weights_can_be_a_base(shared: Path, kind: str) -> None:
    session = Trainer.open(
        options(shared, "lora", "adapter_off", model__init="random", model__quantize=kind)
    )
    base = session.weights.base()
    assert jax.tree.map(lambda leaf: leaf.shape, base) == jax.tree.map(
        lambda leaf: leaf.shape, session.weights.fixed_shapes.base
    )
    assert base is not None and np.asarray(base["embed"]["weight"]).std() > 0.05


@pytest.mark.slow
def test_the_base_is_neither_changed_nor_given_away(shared: Path) -> None:
    opened = Opened(Trainer.open(options(shared, "lora", "adapter_off")))
    session, before = opened.session, jax.device_get(opened.fixed.base)
    apply = session.put_scalar(True, np.bool_)
    session.train_step(
        opened.state, opened.fixed, session.put_batch(session.loader.batch(1)), apply
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(opened.state.params))
    for ours, theirs in zip(
        jax.tree.leaves(jax.device_get(opened.fixed.base)), jax.tree.leaves(before), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes()


def test_the_base_has_the_type_of_products_and_the_adapter_float32(shared: Path) -> None:
    session = Trainer.open(options(shared, "lora", "frozen", model__compute_dtype="bfloat16"))
    opened = Opened(session)
    assert {
        leaf.dtype.name for leaf in jax.tree.leaves((opened.fixed.base, opened.fixed.reference))
    } == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(opened.state.params)} == {"float32"}
    shapes = jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype.name), (opened.fixed.base, opened.fixed.reference)
    )
    assert shapes == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype.name), session.weights.fixed_shapes[:2]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [("int8", 0.4), ("nf4", 0.3)])
def test_a_quantised_base_is_loaded_as_its_shapes_say(
    shared: Path, kind: str, share: float
) -> None:
    session, plain = (
        Trainer.open(options(shared, "lora", "adapter_off", model__quantize=name))
        for name in (kind, "none")
    )
    base, plain_base = session.weights.base(), plain.weights.fixed_shapes.base
    assert base is not None and plain_base is not None
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), base) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), session.weights.fixed_shapes.base
    )
    assert num_bytes(base["layers"]) < share * num_bytes(
        plain_base["layers"]
    )  # the tiny model's runs are short
    assert held_bytes(plain) - held_bytes(session) == pytest.approx(
        num_bytes(plain_base) - num_bytes(base), abs=256
    )


# --- meshes ---


@pytest.mark.slow
@pytest.mark.parametrize("start", ["lora", "from an adapter"])
def test_an_adapter_trains_alike_on_every_mesh(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """Twenty steps, from zero B and from a trained adapter."""
    monkeypatch.undo()
    monkeypatch.setattr(sharding, "make_mesh", MAKE_MESH)
    found = {}
    for data, fsdp, tensor in ((1, 8, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)):
        name = f"{data}x{fsdp}x{tensor}"
        sizes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
        config = options(
            shared,
            start,
            "adapter_off",
            **sizes,
            train__steps=20,
            train__batch_size=8,
            eval__every=0,
            optim__warmup_steps=2,
        )
        assert train(settings_in(config, tmp_path / name))
        found[name] = metrics(tmp_path / name)
    for name, rows in found.items():
        for row, wanted in zip(rows, found["1x8x1"], strict=True):
            for key in ("loss", "grad_norm", "grad_norm/lora_a", "grad_norm/lora_b"):
                assert row[key] == pytest.approx(wanted[key], rel=2e-4, abs=2e-6), (
                    name,
                    row["step"],
                    key,
                )
    assert found["1x8x1"][19]["loss"] < 0.8 * found["1x8x1"][0]["loss"]


def settings_in(config: Any, run_dir: Path) -> Any:
    return dataclasses.replace(config, run_dir=str(run_dir))


# --- an adapter to start from ---
