"""Margins of pairs (ODPO): which losses take them, and how."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.losses.pair_logps import PairLogps
from jaxdpo.losses.registry import LOSSES, numerators, takes_margins


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, row in LOSSES.items()
        if takes_margins(LossSection(name=name)) and row.divisor == "pairs"
    ],
)
def test_a_margin_is_taken_from_the_logit(name: str) -> None:
    """Odds of exp(-margin) against the pair: the same as a chosen answer whose log-ratio is less by
    margin / beta."""
    pair = PairLogps.of([-3.0, -4.0], [-5.0, -4.5], [-2.8, -4.1], [-3.2, -4.4])
    with_margin = dataclasses.replace(pair, margins_P=jnp.array([0.3, 0.0]))
    section = LossSection(name=name)
    found = numerators(with_margin, section).pairs_P
    plain = numerators(pair, section).pairs_P
    assert found[1] == plain[1] and found[0] != plain[0]
    if name in ("sigmoid", "cdpo", "robust", "hinge"):
        lowered = dataclasses.replace(
            pair, chosen_logps_P=pair.chosen_logps_P - jnp.array([0.3 / 0.1, 0.0])
        )
        np.testing.assert_allclose(found, numerators(lowered, section).pairs_P, rtol=1e-5)


def test_losses_without_a_logit_take_no_margin() -> None:
    refused = {name for name in LOSSES if not takes_margins(LossSection(name=name))}
    assert {"ipo", "sigmoid_norm", "aot"} & set(LOSSES) <= refused and "sigmoid" not in refused
    assert takes_margins(LossSection(name=["sigmoid", "sft"])) and not takes_margins(
        LossSection(name=["sigmoid", "ipo"])
    )
