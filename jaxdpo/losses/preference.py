"""The preference losses: pure functions of a batch's log-probs. docs/losses.md compares them.

Every function takes (pair: PairLogps, options: LossOptions) and returns one loss per pair, float32
[P], in nats or in its own unit. Symbols of the equations:

  w, l     the chosen ("winner") and the rejected answer ("loser"), |y| its number of tokens
  r_w      log-ratio: log-prob of the chosen answer, policy minus reference; r_l likewise
  d        score_w - score_l, which is r_w - r_l unless loss.f_divergence says otherwise
  b, e, s  loss.beta, loss.label_smoothing, the logistic sigmoid
  b d      `scaled_margin`, which adds loss.length_penalty and the data's margins where they are set
"""

import math

import jax
import jax.numpy as jnp

from jaxdpo.config.loss_options import LossOptions
from jaxdpo.losses.pair_logps import (
    LARGEST_EXPONENT,
    PairLogps,
    chosen_nll,
    log_odds,
    log_ratios,
    logit,
    mean_logps,
    per_token,
    scaled_margin,
    scores,
    smoothed_log_loss,
    sorted_real,
)


def sigmoid(pair: PairLogps, options: LossOptions) -> jax.Array:
    """DPO: -log s(b d).

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    >>> round(sigmoid(PairLogps.example(), LossOptions()).item(), 4)
    0.6163
    """
    return -jax.nn.log_sigmoid(scaled_margin(pair, options))


def cdpo(pair: PairLogps, options: LossOptions) -> jax.Array:
    """Conservative DPO: -(1-e) log s(b d) - e log s(-b d).

    For labels that are wrong with probability e. Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO".

    >>> round(cdpo(PairLogps.example(), LossOptions(label_smoothing=0.1)).item(), 4)
    0.6323
    """
    return smoothed_log_loss(scaled_margin(pair, options), options.label_smoothing)


def robust(pair: PairLogps, options: LossOptions) -> jax.Array:
    """Robust DPO: [-(1-e) log s(b d) + e log s(-b d)] / (1-2e).

    Unbiased where labels are flipped with probability e; may be negative. Chowdhury et al. 2024,
    arXiv 2403.00409.

    >>> round(robust(PairLogps.example(), LossOptions(label_smoothing=0.1)).item(), 4)
    0.5963
    """
    smoothing = options.label_smoothing
    margin_P = scaled_margin(pair, options)
    clean_P = -jax.nn.log_sigmoid(margin_P)
    flipped_P = -jax.nn.log_sigmoid(-margin_P)
    return ((1.0 - smoothing) * clean_P - smoothing * flipped_P) / (1.0 - 2.0 * smoothing)


def hinge(pair: PairLogps, options: LossOptions) -> jax.Array:
    """Hinge: max(0, 1 - b d).

    SLiC-HF, Zhao et al. 2023, arXiv 2305.10425; on log-ratios: RSO, Liu et al. 2023, arXiv
    2309.06657.

    >>> round(hinge(PairLogps.example(), LossOptions()).item(), 4)
    0.84
    """
    return jax.nn.relu(1.0 - scaled_margin(pair, options))


def ipo(pair: PairLogps, options: LossOptions) -> jax.Array:
    """IPO: (d' - 1/(2b))^2, d' from scores per token (ipo_length mean) or per answer (sum).

    Azar et al. 2023, arXiv 2310.12036, eq. 17. The mean is TRL's, as the authors asked; the sum is
    of the original DPO code.

    >>> round(ipo(PairLogps.example(), LossOptions(ipo_length="mean")).item(), 4)
    22.1527
    >>> round(ipo(PairLogps.example(), LossOptions(ipo_length="sum")).item(), 4)
    11.56
    """
    chosen_P, rejected_P = scores(pair, options)
    if options.ipo_length == "mean":
        chosen_P, rejected_P = per_token(chosen_P, rejected_P, pair)
    return jnp.square(chosen_P - rejected_P - 1.0 / (2.0 * options.beta))


def sigmoid_norm(pair: PairLogps, options: LossOptions) -> jax.Array:
    """Length-normalized DPO: -log s(b (r_w/|y_w| - r_l/|y_l|)).

    Tulu 3, Lambert et al. 2024, arXiv 2411.15124.

    >>> round(sigmoid_norm(PairLogps.example(), LossOptions()).item(), 4)
    0.6786
    """
    chosen_P, rejected_P = scores(pair, options)
    chosen_P, rejected_P = per_token(chosen_P, rejected_P, pair)
    return -jax.nn.log_sigmoid(options.beta * (chosen_P - rejected_P))


def exo_pair(pair: PairLogps, options: LossOptions) -> jax.Array:
    """EXO: s(bd)[log s(bd) - log(1-e)] + s(-bd)[log s(-bd) - log e], e > 0.

    The reverse KL divergence from the smoothed labels. Ji et al. 2024, arXiv 2402.00856, eq. 16.

    >>> round(exo_pair(PairLogps.example(), LossOptions(label_smoothing=0.001)).item(), 4)
    2.4887
    """
    smoothing = options.label_smoothing
    margin_P = scaled_margin(pair, options)
    won_P = jax.nn.log_sigmoid(margin_P)
    lost_P = jax.nn.log_sigmoid(-margin_P)
    won_term_P = jnp.exp(won_P) * (won_P - math.log1p(-smoothing))
    lost_term_P = jnp.exp(lost_P) * (lost_P - math.log(smoothing))
    return won_term_P + lost_term_P


def nca_pair(pair: PairLogps, options: LossOptions) -> jax.Array:
    """NCA: -log s(b r_w) - 1/2 log s(-b r_w) - 1/2 log s(-b r_l).

    Chen et al. 2024, arXiv 2402.05369.

    >>> round(nca_pair(PairLogps.example(), LossOptions()).item(), 4)
    1.3484
    """
    chosen_P, rejected_P = _rewards(pair, options)
    return (
        -jax.nn.log_sigmoid(chosen_P)
        - 0.5 * jax.nn.log_sigmoid(-chosen_P)
        - 0.5 * jax.nn.log_sigmoid(-rejected_P)
    )


def bco_pair(pair: PairLogps, options: LossOptions) -> jax.Array:
    """BCO: -log s(b r_w) - log s(-b r_l), without its running reward shift.

    Jung et al. 2024, arXiv 2404.04656.

    >>> round(bco_pair(PairLogps.example(), LossOptions()).item(), 4)
    1.3104
    """
    chosen_P, rejected_P = _rewards(pair, options)
    return -jax.nn.log_sigmoid(chosen_P) - jax.nn.log_sigmoid(-rejected_P)


def sppo_hard(pair: PairLogps, options: LossOptions) -> jax.Array:
    """SPPO with win probabilities 1 and 0: (r_w - 1/(2b))^2 + (r_l + 1/(2b))^2.

    Wu et al. 2024, arXiv 2405.00675, eq. 4.7.

    >>> round(sppo_hard(PairLogps.example(), LossOptions()).item(), 4)
    37.28
    """
    chosen_P, rejected_P = log_ratios(pair)
    target = 1.0 / (2.0 * options.beta)
    return jnp.square(chosen_P - target) + jnp.square(rejected_P + target)


def aot(pair: PairLogps, options: LossOptions) -> jax.Array:
    """AOT: cdpo on the differences of the sorted w - l of policy and reference.

    Melnyk et al. 2024, arXiv 2406.05882. The k-th real pair's place has the loss of the k-th
    smallest values: read it as a batch, not pair by pair. e = 0 by default.

    >>> two = PairLogps.of([-3.0, -2.5], [-5.0, -3.5], [-2.8, -2.3], [-3.2, -2.7])
    >>> [round(loss, 4) for loss in aot(two, LossOptions()).tolist()]
    [0.6636, 0.6163]
    """
    policy_P = sorted_real(pair.chosen_logps_P - pair.rejected_logps_P, pair.mask_P)
    reference_P = sorted_real(pair.ref_chosen_logps_P - pair.ref_rejected_logps_P, pair.mask_P)
    return _transport(policy_P - reference_P, options)


def aot_unpaired(pair: PairLogps, options: LossOptions) -> jax.Array:
    """AOT, unpaired: cdpo on the differences of sorted r_w and sorted r_l.

    The answers need not be of the same prompts. Melnyk et al. 2024, arXiv 2406.05882. e = 0 by
    default.

    >>> two = PairLogps.of([-3.0, -2.5], [-5.0, -3.5], [-2.8, -2.3], [-3.2, -2.7])
    >>> [round(loss, 4) for loss in aot_unpaired(two, LossOptions()).tolist()]
    [0.6163, 0.6636]
    """
    chosen_P, rejected_P = log_ratios(pair)
    chosen_P = sorted_real(chosen_P, pair.mask_P)
    rejected_P = sorted_real(rejected_P, pair.mask_P)
    return _transport(chosen_P - rejected_P, options)


def apo_zero(pair: PairLogps, options: LossOptions) -> jax.Array:
    """APO-zero: 1 - s(b r_w) + s(b r_l); raises chosen, lowers rejected.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7.

    >>> round(apo_zero(PairLogps.example(), LossOptions()).item(), 4)
    0.9601
    """
    chosen_P, rejected_P = _rewards(pair, options)
    return jax.nn.sigmoid(-chosen_P) + jax.nn.sigmoid(rejected_P)


def apo_down(pair: PairLogps, options: LossOptions) -> jax.Array:
    """APO-down: s(b r_w) + 1 - s(b (r_w - r_l)); lowers chosen, and rejected more.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8.

    >>> round(apo_down(PairLogps.example(), LossOptions()).item(), 4)
    0.9551
    """
    chosen_P, rejected_P = _rewards(pair, options)
    return jax.nn.sigmoid(chosen_P) + jax.nn.sigmoid(rejected_P - chosen_P)


def discopop(pair: PairLogps, options: LossOptions) -> jax.Array:
    """DiscoPOP: (1-m)(-log s(l)) + m exp(-l), l = b d, m = s(l / tau).

    Lu et al. 2024, arXiv 2406.08414, eq. 5.

    >>> round(discopop(PairLogps.example(), LossOptions()).item(), 4)
    0.8429
    """
    margin_P = scaled_margin(pair, options)
    gate_P = margin_P / options.discopop_tau
    logistic_P = jax.nn.sigmoid(-gate_P) * -jax.nn.log_sigmoid(margin_P)
    # m exp(-l) as one exponential: at l = -1000 the factors are 0 and infinity.
    exponent_P = jax.nn.log_sigmoid(gate_P) - margin_P
    exponential_P = jnp.exp(jnp.minimum(exponent_P, LARGEST_EXPONENT))
    return logistic_P + exponential_P


def simpo(pair: PairLogps, options: LossOptions) -> jax.Array:
    """SimPO: -log s(b (mean logp_w - mean logp_l) - gamma); no reference.

    Meng et al. 2024, arXiv 2405.14734, eq. 6. Label smoothing as in cdpo (e = 0 by default).

    >>> round(simpo(PairLogps.example(), LossOptions(beta=2.0)).item(), 4)
    0.9741
    """
    chosen_P, rejected_P = mean_logps(pair)
    margin_P = options.beta * (chosen_P - rejected_P) - options.simpo_gamma
    return smoothed_log_loss(margin_P, options.label_smoothing)


def orpo(pair: PairLogps, options: LossOptions) -> jax.Array:
    """ORPO's odds-ratio term: -lambda log s(log odds_w - log odds_l); no reference.

    odds = p / (1-p) of p = exp(mean logp). The NLL of the chosen answers, ORPO's other term, is
    added by `nll_weight` of the registry. Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7.

    >>> round(orpo(PairLogps.example(), LossOptions()).item(), 4)
    0.0693
    """
    chosen_P, rejected_P = mean_logps(pair)
    log_odds_ratio_P = log_odds(chosen_P) - log_odds(rejected_P)
    return -options.orpo_lambda * jax.nn.log_sigmoid(log_odds_ratio_P)


def cpo(pair: PairLogps, options: LossOptions) -> jax.Array:
    """CPO's preference term: -log s(b (logp_w - logp_l)); no reference.

    alpha times the NLL of the chosen answers, CPO's other term, is added by `nll_weight` of the
    registry. Label smoothing as in cdpo (e = 0 by default). Xu et al. 2024, arXiv 2401.08417.

    >>> round(cpo(PairLogps.example(), LossOptions()).item(), 4)
    0.5981
    """
    margin_P = options.beta * (pair.chosen_logps_P - pair.rejected_logps_P)
    return smoothed_log_loss(margin_P, options.label_smoothing)


def dpop(pair: PairLogps, options: LossOptions) -> jax.Array:
    """DPO-Positive: -log s(b (d - lambda max(0, -r_w))).

    Keeps the chosen answer's log-prob at or above the reference's. Pal et al. 2024, arXiv
    2402.13228.

    >>> round(dpop(PairLogps.example(), LossOptions()).item(), 4)
    1.1989
    """
    chosen_P, rejected_P = log_ratios(pair)
    punished_P = chosen_P - options.dpop_lambda * jax.nn.relu(-chosen_P)
    return -jax.nn.log_sigmoid(logit(punished_P, rejected_P, pair, options))


def sft(pair: PairLogps, options: LossOptions) -> jax.Array:
    """Supervised fine-tuning: -logp_w, the negative log-likelihood (NLL) of the chosen answer.

    Its sum over pairs is divided by the chosen tokens of the global batch.

    >>> sft(PairLogps.example(), LossOptions()).item()
    3.0
    """
    del options
    return chosen_nll(pair)


def _rewards(pair: PairLogps, options: LossOptions) -> tuple[jax.Array, jax.Array]:
    """b r of both sides."""
    chosen_P, rejected_P = log_ratios(pair)
    beta = options.beta
    return beta * chosen_P, beta * rejected_P


def _transport(difference_P: jax.Array, options: LossOptions) -> jax.Array:
    """The log-loss on sorted differences of both forms of AOT."""
    return smoothed_log_loss(options.beta * difference_P, options.label_smoothing)
