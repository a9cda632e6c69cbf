"""The registry of losses: which exist, what each reads, how they are mixed, and their rewards.

Adding a loss: write the function in preference.py with a doctest, add its row to LOSSES here, add
its row to docs/losses.md. Nothing else compares a loss's name. Suffix P: pairs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdpo.config.loss_options import LossOptions, LossSection
from jaxdpo.losses import preference as fn
from jaxdpo.losses.pair_logps import PairLogps, chosen_nll, log_ratios, mean_logps

LossFn = Callable[[PairLogps, LossOptions], jax.Array]
FromOptions = Callable[[LossOptions], float]

MODIFIERS = ("f_divergence", "alpha_divergence", "ld_alpha", "length_penalty", "wpo")
"""Options that change the meaning of a pair's term: mixed losses on pairs accept them all, or
none."""

LN2 = math.log(2.0)
"""-log sigmoid(0): the loss of DPO and its kin where policy and reference agree."""

COMMON_DEFAULTS = LossOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """One row of the table."""

    fn: LossFn
    """(pair, options) -> float32 [P]: numerators, one a pair."""
    options: frozenset[str]
    """Fields of LossSection that it reads or, for ld_alpha and wpo, lets the step apply."""
    defaults: LossOptions = COMMON_DEFAULTS
    """Its constants where the section leaves them open."""
    paper: str
    """arXiv number, or name and year."""
    equation: str
    """The loss of one pair, in the symbols of preference.py."""
    needs_reference: bool = True
    divisor: Literal["pairs", "chosen_tokens"] = "pairs"
    """What the sum of `fn` over the global batch is divided by."""
    coupled: bool = False
    """The terms mix pairs: `fn` needs the global batch at once, and pairs cannot be weighted."""
    closed_form: FromOptions | None = None
    """Its value where policy and reference agree (without a length penalty). None: that depends on
    the data."""
    nll_weight: FromOptions | None = None
    """Weight of the chosen answers' NLL per chosen token that is part of the loss."""
    needs_smoothing: bool = False
    """loss.label_smoothing=0 has no meaning for it."""
    reward_kind: Literal["ratio", "sum", "mean"] = "ratio"
    """The logged reward: log-ratio to the reference, log-prob, or mean log-prob per token, times
    `reward_scale`."""
    reward_scale: FromOptions = lambda options: options.beta
    """Beta, or what the loss has in its place."""


class Numerators(NamedTuple):
    """Per-pair terms by what their weighted sum is divided by; both float32 [P]."""

    pairs_P: jax.Array
    """Divide sum(weight * wpo_weight * term) by sum(weight)."""
    chosen_tokens_P: jax.Array
    """Divide sum(weight * term) by sum(weight * chosen tokens)."""


def _options(*names: str) -> frozenset[str]:
    return frozenset(names)


_MARGIN = _options("beta", "f_divergence", "alpha_divergence", "length_penalty", "ld_alpha", "wpo")
"""Read by every loss on beta (score_w - score_l)."""
_PER_TOKEN = _MARGIN - _options("length_penalty")
"""Read by the losses that are normalized by length already."""
_RATIOS = _options("beta", "ld_alpha", "wpo")
"""Read by the losses on each side's log-ratio; f-divergences hold only for differences, where log Z
cancels."""


def _ln2(options: LossOptions) -> float:
    del options
    return LN2


def _exo_start(options: LossOptions) -> float:
    smoothing = options.label_smoothing
    return -LN2 - 0.5 * (math.log(smoothing) + math.log1p(-smoothing))


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        fn=fn.sigmoid,
        options=_MARGIN,
        paper="2305.18290 eq. 7",
        equation="-log s(b d)",
        closed_form=_ln2,
    ),
    "cdpo": Loss(
        fn=fn.cdpo,
        options=_MARGIN | _options("label_smoothing"),
        defaults=LossOptions(label_smoothing=0.1),
        paper="Mitchell 2023",
        equation="-(1-e) log s(b d) - e log s(-b d)",
        closed_form=_ln2,
    ),
    "robust": Loss(
        fn=fn.robust,
        options=_MARGIN | _options("label_smoothing"),
        defaults=LossOptions(label_smoothing=0.1),
        paper="2403.00409",
        equation="[-(1-e) log s(b d) + e log s(-b d)] / (1-2e)",
        closed_form=_ln2,
    ),
    "hinge": Loss(
        fn=fn.hinge,
        options=_MARGIN,
        paper="2305.10425, 2309.06657",
        equation="max(0, 1 - b d)",
        closed_form=lambda options: 1.0,
    ),
    "ipo": Loss(
        fn=fn.ipo,
        options=_PER_TOKEN | _options("ipo_length"),
        paper="2310.12036 eq. 17",
        equation="(d' - 1/(2b))^2",
        closed_form=lambda options: (0.5 / options.beta) ** 2,
    ),
    "sigmoid_norm": Loss(
        fn=fn.sigmoid_norm,
        options=_PER_TOKEN,
        paper="2411.15124",
        equation="-log s(b (r_w/|y_w| - r_l/|y_l|))",
        closed_form=_ln2,
    ),
    "exo_pair": Loss(
        fn=fn.exo_pair,
        options=_MARGIN | _options("label_smoothing"),
        defaults=LossOptions(label_smoothing=1e-3),
        paper="2402.00856 eq. 16",
        equation="s(bd)[log s(bd) - log(1-e)] + s(-bd)[log s(-bd) - log e]",
        closed_form=_exo_start,
        needs_smoothing=True,
    ),
    "nca_pair": Loss(
        fn=fn.nca_pair,
        options=_RATIOS,
        paper="2402.05369",
        equation="-log s(b r_w) - 1/2 log s(-b r_w) - 1/2 log s(-b r_l)",
        closed_form=lambda options: 2.0 * LN2,
    ),
    "bco_pair": Loss(
        fn=fn.bco_pair,
        options=_RATIOS,
        paper="2404.04656",
        equation="-log s(b r_w) - log s(-b r_l)",
        closed_form=lambda options: 2.0 * LN2,
    ),
    "sppo_hard": Loss(
        fn=fn.sppo_hard,
        options=_RATIOS,
        paper="2405.00675 eq. 4.7",
        equation="(r_w - 1/(2b))^2 + (r_l + 1/(2b))^2",
        closed_form=lambda options: 2.0 * (0.5 / options.beta) ** 2,
    ),
    # These mix the pairs of the global batch.
    "aot": Loss(
        fn=fn.aot,
        options=_options("beta", "label_smoothing", "ld_alpha"),
        paper="2406.05882",
        equation="cdpo on sort(logp_w - logp_l) - sort(ref_w - ref_l)",
        coupled=True,
        closed_form=_ln2,
    ),
    "aot_unpaired": Loss(
        fn=fn.aot_unpaired,
        options=_options("beta", "label_smoothing", "ld_alpha"),
        paper="2406.05882",
        equation="cdpo on sort(r_w) - sort(r_l)",
        coupled=True,
        closed_form=_ln2,
    ),
    # Again pair by pair.
    "apo_zero": Loss(
        fn=fn.apo_zero,
        options=_RATIOS,
        paper="2408.06266 eq. 7",
        equation="1 - s(b r_w) + s(b r_l)",
        closed_form=lambda options: 1.0,
    ),
    "apo_down": Loss(
        fn=fn.apo_down,
        options=_RATIOS,
        paper="2408.06266 eq. 8",
        equation="s(b r_w) + 1 - s(b (r_w - r_l))",
        closed_form=lambda options: 1.0,
    ),
    "discopop": Loss(
        fn=fn.discopop,
        options=_MARGIN | _options("discopop_tau"),
        paper="2406.08414 eq. 5",
        equation="(1-m)(-log s(b d)) + m exp(-b d), m = s(b d / tau)",
        closed_form=lambda options: 0.5 * LN2 + 0.5,
    ),
    "dpop": Loss(
        fn=fn.dpop,
        options=_options("beta", "dpop_lambda", "length_penalty", "ld_alpha", "wpo"),
        paper="2402.13228",
        equation="-log s(b (d - lambda max(0, -r_w)))",
        closed_form=_ln2,
    ),
    # Without a reference.
    "simpo": Loss(
        fn=fn.simpo,
        options=_options("beta", "simpo_gamma", "label_smoothing", "wpo"),
        defaults=LossOptions(beta=2.0),
        paper="2405.14734 eq. 6",
        equation="-log s(b (mean logp_w - mean logp_l) - gamma)",
        needs_reference=False,
        reward_kind="mean",
    ),
    "orpo": Loss(
        fn=fn.orpo,
        options=_options("orpo_lambda", "wpo"),
        paper="2403.07691 eq. 6, 7",
        equation="NLL(y_w) - lambda log s(log odds_w - log odds_l)",
        needs_reference=False,
        nll_weight=lambda options: 1.0,
        reward_kind="mean",
        reward_scale=lambda options: options.orpo_lambda,
    ),
    "cpo": Loss(
        fn=fn.cpo,
        options=_options("beta", "cpo_alpha", "label_smoothing", "wpo"),
        paper="2401.08417",
        equation="-log s(b (logp_w - logp_l)) + alpha NLL(y_w)",
        needs_reference=False,
        nll_weight=lambda options: options.cpo_alpha,
        reward_kind="sum",
    ),
    "sft": Loss(
        fn=fn.sft,
        options=_options(),
        paper="-",
        equation="NLL(y_w) / chosen tokens",
        needs_reference=False,
        divisor="chosen_tokens",
    ),
}


def numerators(pair: PairLogps, section: LossSection) -> Numerators:
    """The chosen losses times loss.weights, added up by divisor.

    Args:
        pair: log-probs of P pairs; for coupled losses those of the whole global batch.
        section: the loss options, free of `check` problems.

    >>> section = LossSection(name=["sigmoid", "sft"], weights=[1.0, 0.5])
    >>> terms = numerators(PairLogps.example(), section)
    >>> [round(term.item(), 4) for term in terms]
    [0.6163, 1.5]
    """
    pairs_P = tokens_P = jnp.zeros_like(pair.chosen_logps_P)
    weights = section.weights or [1.0] * len(section.names)
    for name, weight in zip(section.names, weights, strict=True):
        row = LOSSES[name]
        options = row.defaults.of(section)
        term_P = weight * row.fn(pair, options)
        if row.divisor == "pairs":
            pairs_P = pairs_P + term_P
        else:
            tokens_P = tokens_P + term_P
        if row.nll_weight is not None:
            tokens_P = tokens_P + weight * row.nll_weight(options) * chosen_nll(pair)
    return Numerators(pairs_P, tokens_P)


def closed_forms(section: LossSection) -> dict[str, float]:
    """Value of each chosen loss where policy and reference agree, unless it depends on the data.

    >>> closed_forms(LossSection(name=["ipo", "sft"]))
    {'ipo': 25.0}
    """
    if section.length_penalty:
        return {}
    known = {}
    for name in section.names:
        row = LOSSES[name]
        if row.closed_form is not None:
            known[name] = row.closed_form(row.defaults.of(section))
    return known


def rewards(pair: PairLogps, section: LossSection) -> tuple[jax.Array, jax.Array]:
    """Implicit rewards for the metrics: (chosen_P, rejected_P), float32 [P].

    beta times the log-ratio to the reference; for losses without one beta times the log-prob (cpo)
    or its mean per token (simpo; orpo with its lambda in beta's place), as TRL reports them. Of
    mixed losses, the first on pairs decides.

    >>> [round(reward.item(), 4) for reward in rewards(PairLogps.example(), LossSection())]
    [-0.02, -0.18]
    """
    rows = [LOSSES[name] for name in section.names]
    on_pairs = [row for row in rows if row.divisor == "pairs"]
    row = (on_pairs or rows)[0]
    if row.reward_kind == "ratio":
        chosen_P, rejected_P = log_ratios(pair)
    elif row.reward_kind == "mean":
        chosen_P, rejected_P = mean_logps(pair)
    else:
        chosen_P, rejected_P = pair.chosen_logps_P, pair.rejected_logps_P
    scale = row.reward_scale(row.defaults.of(section))
    return scale * chosen_P, scale * rejected_P


def takes_margins(section: LossSection) -> bool:
    """Whether every chosen loss on pairs has the logit from which a pair's margin is subtracted."""
    rows = [LOSSES[name] for name in section.names]
    return all("length_penalty" in row.options for row in rows if row.divisor == "pairs")


def coupled(section: LossSection) -> bool:
    """Whether some chosen loss mixes the pairs of the global batch, and cannot weight single
    pairs."""
    return any(LOSSES[name].coupled for name in section.names)


def needs_reference(section: LossSection) -> bool:
    """Whether any chosen loss compares with a reference model."""
    return any(LOSSES[name].needs_reference for name in section.names)
