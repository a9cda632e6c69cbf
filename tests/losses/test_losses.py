"""Losses: values against TRL's, closed forms, gradients, extremes, masks, options."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.losses.registry import (
    LOSSES,
    MODIFIERS,
    PairLogps,
    closed_forms,
    coupled,
    numerators,
    rewards,
)
from jaxdpo.losses.rules import check

HERE = Path(__file__).parents[1]
GOLDEN = json.loads((HERE / "goldens" / "losses.json").read_text())
DIVERGENCES = ("forward_kl", "js", "alpha")
APPLIED_BY_THE_STEP = {"ld_alpha", "wpo"}
"""Options that reach a loss through its inputs: the step weighs tokens and pairs by them."""
OTHER_VALUES = {
    "beta": 0.7,
    "label_smoothing": 0.2,
    "ipo_length": "sum",
    "f_divergence": "js",
    "alpha_divergence": 0.3,
    "ld_alpha": 0.5,
    "length_penalty": 0.05,
    "wpo": True,
    "discopop_tau": 0.5,
    "simpo_gamma": 1.5,
    "orpo_lambda": 0.7,
    "cpo_alpha": 0.3,
    "dpop_lambda": 5.0,
}
PLAIN = [LossSection(name=name) for name in LOSSES]
DIVERGENT = [
    LossSection(name=name, f_divergence=divergence)
    for name, row in LOSSES.items()
    for divergence in DIVERGENCES
    if "f_divergence" in row.options
]
SECTIONS = [*PLAIN, *(section for section in DIVERGENT if section.name in ("sigmoid", "ipo"))]
"""Every loss, and the divergences in two forms: they enter the others through the same scores."""


def pair_losses(pair: PairLogps, section: LossSection) -> dict[str, jax.Array]:
    """Each chosen loss by name, unweighted: float32 [P]."""
    rows = {name: LOSSES[name] for name in section.names}
    return {name: row.fn(pair, row.defaults.of(section)) for name, row in rows.items()}


def label(section: LossSection) -> str:
    return "-".join(filter(None, [*section.names, section.f_divergence]))


def batch(seed: int = 0, size: int = 6) -> PairLogps:
    """Random pairs without ties; log-ratios of a few nats."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, (2, size))
    logps = -rng.exponential(2.0, (2, size)) * lengths
    return PairLogps.of(*logps, *(logps + rng.normal(0, 2, (2, size))), *lengths)


def widen(pair: PairLogps) -> PairLogps:
    """The same pairs in float64; to be called under jax.enable_x64."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), pair)


def total(pair: PairLogps, section: LossSection) -> jax.Array:
    """What the step minimises: each divisor's sum over its global count."""
    terms = numerators(pair, section)
    tokens = jnp.sum(pair.mask_P * pair.chosen_lengths_P)
    return (
        jnp.sum(pair.mask_P * terms.pairs_P) / jnp.sum(pair.mask_P)
        + jnp.sum(pair.mask_P * terms.chosen_tokens_P) / tokens
    )


def golden_pair(section: LossSection) -> tuple[PairLogps, np.ndarray]:
    """The golden tokens as a loss sees them, with LD-DPO applied, and WPO's weight of each pair."""
    sides = GOLDEN["tokens"]["chosen"], GOLDEN["tokens"]["rejected"]
    lengths = [[len(side["policy"]) for side in half] for half in sides]
    shared = np.minimum(lengths[0], lengths[1])
    alpha = 1.0 if section.ld_alpha is None else section.ld_alpha

    def sums(half: int, column: str) -> list[float]:
        return [
            sum(side[column][:cut]) + alpha * sum(side[column][cut:])
            for side, cut in zip(sides[half], shared, strict=True)
        ]

    columns = [sums(0, "policy"), sums(1, "policy"), sums(0, "reference"), sums(1, "reference")]
    pair = PairLogps.of(*columns, *lengths)
    nll = [-sum(side["policy"]) for side in sides[0]]
    pair = dataclasses.replace(pair, chosen_nll_P=jnp.asarray(nll, jnp.float32))
    likeliness = [
        [np.mean(side["policy"]) - np.mean(side["log_sum_sq_probs"]) for side in half]
        for half in sides
    ]
    return pair, np.exp(np.sum(likeliness, axis=0)) if section.wpo else np.ones(len(nll))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: json.dumps(case["section"]))
def test_equals_trl(case: dict) -> None:
    section = LossSection(**case["section"])
    assert check(section, "frozen") == []
    pair, wpo_P = golden_pair(section)
    # The inputs are multiples of 1/64, so float32 holds them exactly; LD-DPO's are not, and differ
    # in float64's last digits.
    exact = 1e-12 if section.ld_alpha is None else 1e-6
    for tolerance, convert, scope in ((1e-6, lambda x: x, False), (exact, widen, True)):
        with jax.enable_x64(scope):
            here = convert(pair)
            terms = numerators(here, section)
            # CPO's and ORPO's goldens leave out the NLL, which DPO's losses have in a term apart.
            with_nll = "mean" in case
            per_pair = np.asarray(terms.pairs_P) * wpo_P + with_nll * np.asarray(
                terms.chosen_tokens_P / here.chosen_lengths_P
            )
            tokens = (
                np.asarray(terms.chosen_tokens_P).sum() / np.asarray(here.chosen_lengths_P).sum()
            )
            mean = (np.asarray(terms.pairs_P) * wpo_P).mean() + tokens
        if "per_pair" in case:
            np.testing.assert_allclose(per_pair, case["per_pair"], rtol=tolerance, atol=tolerance)
        if "mean" in case:
            np.testing.assert_allclose(mean, case["mean"], rtol=tolerance)


def test_equals_the_shared_golden(real_data: Path) -> None:
    path = real_data.parent / "golden" / "losses.json"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    golden = json.loads(path.read_text())
    columns = (
        "policy_chosen",
        "policy_rejected",
        "ref_chosen",
        "ref_rejected",
        "len_chosen",
        "len_rejected",
    )
    divergences = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
    with jax.enable_x64(True):
        numbers = [jnp.asarray(golden["batch"][column], jnp.float64) for column in columns]
        names = [field.name for field in dataclasses.fields(PairLogps)]
        exact = PairLogps(**dict(zip(names, [*numbers, jnp.ones(4)], strict=False)))
    rounded = PairLogps.of(*(golden["batch"][column] for column in columns))
    assert len(golden["losses"]) == 18
    for key, values in golden["losses"].items():
        name, _, rest = key.partition(" ")
        found = json.loads(rest or "{}")
        divergence: Any = divergences.get(found.get("fdiv"))
        section = LossSection(
            name=name, beta=golden["beta"], label_smoothing=found.get("ls"), f_divergence=divergence
        )
        assert check(section, "frozen") == []
        with jax.enable_x64(True):
            np.testing.assert_allclose(
                pair_losses(exact, section)[name], values, atol=1e-6, rtol=0, err_msg=key
            )
        np.testing.assert_allclose(
            pair_losses(rounded, section)[name], values, rtol=1e-6, err_msg=key
        )


def test_equals_tunix() -> None:
    rng = np.random.RandomState(0)
    policy, reference = rng.normal(0, 5, (8, 4)).sum(-1), rng.normal(0, 5, (8, 4)).sum(-1)
    pair = PairLogps.of(policy[:4], policy[4:], reference[:4], reference[4:])
    for section, mean in (
        (LossSection(), 0.753059),
        (LossSection(name="cdpo", label_smoothing=0.3), 0.925447),
    ):
        np.testing.assert_allclose(jnp.mean(numerators(pair, section).pairs_P), mean, atol=1e-6)


@pytest.mark.parametrize("section", SECTIONS, ids=label)
def test_closed_form_where_policy_equals_reference(section: LossSection) -> None:
    pair = batch()
    pair = dataclasses.replace(
        pair, ref_chosen_logps_P=pair.chosen_logps_P, ref_rejected_logps_P=pair.rejected_logps_P
    )
    forms = closed_forms(section)
    assert set(forms) == {name for name in section.names if LOSSES[name].needs_reference}
    for name, value in forms.items():
        np.testing.assert_allclose(pair_losses(pair, section)[name], value, rtol=1e-6)
        assert all((reward_P == 0).all() for reward_P in rewards(pair, section))


def test_known_closed_forms() -> None:
    names = [
        "sigmoid",
        "cdpo",
        "hinge",
        "ipo",
        "sppo_hard",
        "bco_pair",
        "nca_pair",
        "apo_zero",
        "apo_down",
        "sft",
    ]
    forms = closed_forms(LossSection(name=names))
    assert {name: round(value, 6) for name, value in forms.items()} == {
        "sigmoid": 0.693147,
        "cdpo": 0.693147,
        "hinge": 1.0,
        "ipo": 25.0,
        "sppo_hard": 50.0,
        "bco_pair": 1.386294,
        "nca_pair": 1.386294,
        "apo_zero": 1.0,
        "apo_down": 1.0,
    }
    assert closed_forms(LossSection(length_penalty=0.1)) == {}


@pytest.mark.parametrize("section", SECTIONS, ids=label)
def test_gradient_equals_finite_differences(section: LossSection) -> None:
    """Along random directions, in float64; and the float32 gradient equals the float64 one."""
    step, sides = 1e-5, ("chosen_logps_P", "rejected_logps_P")
    narrow = jax.grad(total)(batch(), section)
    with jax.enable_x64(True):
        pair = widen(batch())
        exact = jax.grad(total)(pair, section)
        for seed in range(4):
            move = dict(zip(sides, np.random.default_rng(seed).normal(size=(2, 6)), strict=True))
            ends = [
                dataclasses.replace(
                    pair, **{name: getattr(pair, name) + sign * step * move[name] for name in sides}
                )
                for sign in (1, -1)
            ]
            slope = (total(ends[0], section) - total(ends[1], section)) / (2.0 * step)
            along = sum(jnp.vdot(getattr(exact, name), move[name]) for name in sides)
            np.testing.assert_allclose(along, slope, rtol=1e-6, atol=1e-8)
    for name in sides:
        assert getattr(narrow, name).dtype == jnp.float32
        np.testing.assert_allclose(
            getattr(narrow, name), getattr(exact, name), rtol=1e-5, atol=1e-7
        )


def test_sigmoid_gradient_is_the_papers() -> None:
    pair, beta = batch(), 0.3
    gradient = jax.grad(lambda pair: total(pair, LossSection(beta=beta)))(pair)
    chosen_P, rejected_P = rewards(pair, LossSection(beta=beta))
    expected = -beta * jax.nn.sigmoid(rejected_P - chosen_P) / 6
    np.testing.assert_allclose(gradient.chosen_logps_P, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient.rejected_logps_P, -expected, rtol=1e-6)


def test_jitted_equals_eager() -> None:
    """One program for all: many small ones take longer."""
    found = jax.jit(
        lambda pair: {label(section): numerators(pair, section) for section in SECTIONS}
    )(batch())
    for section in SECTIONS:
        for left, right in zip(found[label(section)], numerators(batch(), section), strict=True):
            assert left.shape == right.shape == (6,) and left.dtype == right.dtype == jnp.float32
            np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("section", [*PLAIN, *DIVERGENT], ids=label)
def test_finite_at_extremes(section: LossSection) -> None:
    corners = np.array(
        list(
            itertools.product(
                [-2e4, -1e4, -50.0, -1.0, 0.0],
                [-1e4, -1.0, 0.0],
                [-2e4, -50.0, -1.0, 0.0],
                [-1e4, -1.0],
                [1, 9],
                [1],
            )
        )
    )
    pair = PairLogps.of(*corners.T)

    def value(pair: PairLogps) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        terms = numerators(pair, section)
        return jnp.sum(terms.pairs_P) + jnp.sum(terms.chosen_tokens_P), terms

    (_, terms), gradient = jax.value_and_grad(value, has_aux=True)(pair)
    for found in (*terms, gradient.chosen_logps_P, gradient.rejected_logps_P):
        assert np.isfinite(found).all(), corners[~np.isfinite(np.asarray(found))][:5]


@pytest.mark.parametrize("section", SECTIONS, ids=label)
def test_empty_slots_and_order_change_nothing(section: LossSection) -> None:
    full = batch(seed=1, size=4)
    order = jnp.asarray([4, 2, 0, 5, 3, 1])

    def pad(filler: PairLogps) -> PairLogps:
        filler = dataclasses.replace(filler, mask_P=jnp.zeros(2))
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), full, filler)

    zeros = pad(jax.tree.map(jnp.zeros_like, batch(size=2)))
    mixed = jax.tree.map(lambda x: x[order], pad(batch(seed=3, size=2)))
    expected, slopes = jax.value_and_grad(total)(zeros, section)
    found, mixed_slopes = jax.value_and_grad(total)(mixed, section)
    np.testing.assert_allclose(expected, total(full, section), rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name in ("chosen_logps_P", "rejected_logps_P"):
        assert (getattr(slopes, name)[4:] == 0).all()
        np.testing.assert_allclose(
            getattr(mixed_slopes, name), getattr(slopes, name)[order], rtol=1e-5, atol=1e-7
        )


def test_aot_values_sit_in_real_slots() -> None:
    pair = PairLogps.of(
        [-3.0, 7.0, -2.5],
        [-5.0, -9.0, -3.5],
        [-2.8, 1.0, -2.3],
        [-3.2, 5.0, -2.7],
        mask=[1.0, 0.0, 1.0],
    )
    np.testing.assert_allclose(
        pair_losses(pair, LossSection(name="aot"))["aot"][::2], [0.6635971, 0.6163438], rtol=1e-6
    )


def test_mixing_adds_weighted_losses() -> None:
    section = LossSection(name=["sigmoid", "cpo", "sft"], weights=[0.5, 2.0, 3.0], cpo_alpha=0.25)
    terms = numerators(batch(), section)
    alone = pair_losses(batch(), section)
    np.testing.assert_allclose(
        terms.pairs_P, 0.5 * alone["sigmoid"] + 2.0 * alone["cpo"], rtol=1e-6
    )
    np.testing.assert_allclose(terms.chosen_tokens_P, (2.0 * 0.25 + 3.0) * alone["sft"], rtol=1e-6)


def test_rewards_as_trl_reports_them() -> None:
    pair = PairLogps.example()
    expected = {
        "sigmoid": (-0.02, -0.18),
        "sft": (-0.02, -0.18),
        "cpo": (-0.3, -0.5),
        "simpo": (-2.0, -2.0),
        "orpo": (-0.1, -0.1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            jnp.stack(rewards(pair, LossSection(name=name)))[:, 0], values, rtol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(rewards(pair, LossSection(name=["sft", "simpo"]))[0], [-2.0])


@pytest.mark.parametrize("option", sorted(set(OTHER_VALUES) - APPLIED_BY_THE_STEP))
@pytest.mark.parametrize("name", LOSSES)
def test_an_option_is_read_or_refused(name: str, option: str) -> None:
    base: dict[str, Any] = {"name": name} | (
        {"f_divergence": "alpha"} if option == "alpha_divergence" else {}
    )
    changed = LossSection(**base | {option: OTHER_VALUES[option]})
    plain = LossSection(**base) if option in LOSSES[name].options else LossSection(name=name)
    reads = option in LOSSES[name].options
    assert (check(changed, "frozen") == []) == reads
    assert np.allclose(total(batch(), changed), total(batch(), plain)) != reads


def test_every_field_is_somebodys_option() -> None:
    fields = {field.name for field in dataclasses.fields(LossSection)}
    common = {"name", "weights", "ref_sync_every", "ref_mixup_alpha", "router_aux_coef"}
    assert (
        set().union(*(row.options for row in LOSSES.values()))
        == fields - common
        == set(OTHER_VALUES)
    )
    assert set(MODIFIERS) < fields


def test_coupled_names_the_sorting_losses() -> None:
    assert [name for name in LOSSES if coupled(LossSection(name=name))] == ["aot", "aot_unpaired"]


def test_every_loss_has_its_row_in_the_docs() -> None:
    lines = (HERE.parent / "docs" / "losses.md").read_text().splitlines()
    for name, row in LOSSES.items():
        found = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert len(found) == 1, name
        assert row.equation in found[0].replace("\\|", "|") and row.paper in found[0], name
