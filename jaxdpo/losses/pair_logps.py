"""What a preference loss sees of a batch, and the quantities that the losses share.

Legend of suffixes: P pairs. Everything is float32; log-probs are in nats, lengths in tokens.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdpo.config.loss_options import LossOptions

LARGEST_EXPONENT = 40.0
"""exp() is capped here: e^40 and its square are finite in float32 (the largest is e^88.7), and no
log-ratio of a healthy run comes near."""
LARGEST_MEAN_LOGP = -(2.0**-23)
"""A mean log-prob closer to 0 than this is beyond the resolution of float32 probabilities."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Sums of log-probs over the completion tokens of P pairs; every array is float32 [P].

    Where mask_P is 0 there is padding. Its values must be finite; they reach no real pair's loss.
    """

    chosen_logps_P: jax.Array
    """Policy, chosen answer, in nats; with loss.ld_alpha the weighted sum."""
    rejected_logps_P: jax.Array
    """Policy, rejected answer."""
    ref_chosen_logps_P: jax.Array
    """Reference, chosen answer; zeros when there is no reference."""
    ref_rejected_logps_P: jax.Array
    """Reference, rejected answer; zeros when there is no reference."""
    chosen_lengths_P: jax.Array
    """Completion tokens of the chosen answer."""
    rejected_lengths_P: jax.Array
    """Completion tokens of the rejected answer."""
    mask_P: jax.Array
    """1 for a real pair, 0 for padding."""
    chosen_nll_P: jax.Array | None = None
    """Negative log-likelihood of the chosen answer, with all its tokens. None: -chosen_logps_P,
    which is the same unless loss.ld_alpha is set."""
    margins_P: jax.Array | None = None
    """By how much the chosen answer should win, in units of the logit. None: by nothing."""

    @classmethod
    def of(
        cls,
        chosen: Sequence[float],
        rejected: Sequence[float],
        ref_chosen: Sequence[float] | None = None,
        ref_rejected: Sequence[float] | None = None,
        chosen_lengths: Sequence[float] | None = None,
        rejected_lengths: Sequence[float] | None = None,
        mask: Sequence[float] | None = None,
    ) -> "PairLogps":
        """Pairs from plain numbers: reference log-probs default to 0, lengths and mask to 1."""

        def column(values: Sequence[float] | None, default: float) -> jax.Array:
            if values is None:
                values = [default] * len(chosen)
            return jnp.asarray(values, jnp.float32)

        return cls(
            chosen_logps_P=column(chosen, 0.0),
            rejected_logps_P=column(rejected, 0.0),
            ref_chosen_logps_P=column(ref_chosen, 0.0),
            ref_rejected_logps_P=column(ref_rejected, 0.0),
            chosen_lengths_P=column(chosen_lengths, 1.0),
            rejected_lengths_P=column(rejected_lengths, 1.0),
            mask_P=column(mask, 1.0),
        )

    @classmethod
    def example(cls) -> "PairLogps":
        """One pair for the examples in docstrings: log-probs -3 and -5, reference -2.8 and -3.2, 3
        and 5 tokens."""
        return cls.of([-3.0], [-5.0], [-2.8], [-3.2], [3.0], [5.0])


def log_ratios(pair: PairLogps) -> tuple[jax.Array, jax.Array]:
    """r = log-prob under the policy minus under the reference: (chosen_P, rejected_P), in nats."""
    return (
        pair.chosen_logps_P - pair.ref_chosen_logps_P,
        pair.rejected_logps_P - pair.ref_rejected_logps_P,
    )


def scores(pair: PairLogps, options: LossOptions) -> tuple[jax.Array, jax.Array]:
    """f'(u) at u = policy / reference for the chosen f-divergence: (chosen_P, rejected_P).

    For reverse_kl these are the log-ratios. f-DPO (2309.16240), as TRL computes it. Exponents are
    capped at 40 (TRL: at 80 for alpha, not at all for forward_kl).

    >>> options = LossOptions(f_divergence="forward_kl")
    >>> [round(score.item(), 4) for score in scores(PairLogps.example(), options)]
    [-0.2214, -5.0496]
    """
    divergence, alpha = options.f_divergence, options.alpha_divergence
    chosen_P, rejected_P = log_ratios(pair)
    return _score(divergence, alpha, chosen_P), _score(divergence, alpha, rejected_P)


def _score(divergence: str, alpha: float, ratio_P: jax.Array) -> jax.Array:
    """f'(exp(ratio)), 0 at ratio 0."""
    if divergence == "js":
        return math.log(2.0) + jax.nn.log_sigmoid(ratio_P)
    # The alpha family (u^(alpha-1) - 1) / (alpha-1) has the other two as members: alpha 0 is
    # forward_kl, and the limit at 1 is reverse_kl.
    power = {"forward_kl": -1.0, "reverse_kl": 0.0, "alpha": alpha - 1.0}[divergence]
    if abs(power) < 1e-6:
        return ratio_P
    return jnp.expm1(jnp.minimum(power * ratio_P, LARGEST_EXPONENT)) / power


def scaled_margin(pair: PairLogps, options: LossOptions) -> jax.Array:
    """The logit of the log-sigmoid losses, [P]: `logit` of the two sides' scores."""
    chosen_P, rejected_P = scores(pair, options)
    return logit(chosen_P, rejected_P, pair, options)


def logit(
    chosen_P: jax.Array, rejected_P: jax.Array, pair: PairLogps, options: LossOptions
) -> jax.Array:
    """beta (chosen - rejected) + length_penalty (|y_w| - |y_l|) - margin, [P].

    The second term is R-DPO's (2403.19159): the reward of a longer answer is lowered, so a pair
    whose chosen answer is the longer one already counts as partly won and is pushed less. The third
    is the offset of ODPO (2402.10571 eq. 8), from the data.

    >>> pair = PairLogps.example()
    >>> round(logit(*log_ratios(pair), pair, LossOptions(length_penalty=0.01)).item(), 4)
    0.14
    """
    logit_P = options.beta * (chosen_P - rejected_P)
    if options.length_penalty != 0.0:
        logit_P += options.length_penalty * (pair.chosen_lengths_P - pair.rejected_lengths_P)
    if pair.margins_P is not None:
        logit_P = logit_P - pair.margins_P
    return logit_P


def per_token(
    chosen_P: jax.Array, rejected_P: jax.Array, pair: PairLogps
) -> tuple[jax.Array, jax.Array]:
    """Both sides divided by their number of completion tokens (padding by 1)."""
    chosen_lengths_P = jnp.maximum(pair.chosen_lengths_P, 1.0)
    rejected_lengths_P = jnp.maximum(pair.rejected_lengths_P, 1.0)
    return chosen_P / chosen_lengths_P, rejected_P / rejected_lengths_P


def mean_logps(pair: PairLogps) -> tuple[jax.Array, jax.Array]:
    """Policy log-prob per completion token: (chosen_P, rejected_P)."""
    return per_token(pair.chosen_logps_P, pair.rejected_logps_P, pair)


def chosen_nll(pair: PairLogps) -> jax.Array:
    """Negative log-likelihood of the chosen answers, summed over their tokens, [P]."""
    if pair.chosen_nll_P is not None:
        return pair.chosen_nll_P
    return -pair.chosen_logps_P


def smoothed_log_loss(logit_P: jax.Array, smoothing: float) -> jax.Array:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x): cross-entropy against a label that is wrong with
    probability e."""
    right_P = -(1.0 - smoothing) * jax.nn.log_sigmoid(logit_P)
    wrong_P = smoothing * jax.nn.log_sigmoid(-logit_P)
    return right_P - wrong_P


def log1mexp(x_P: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0 without cancellation, its gradient finite on both branches.

    >>> [round(log1mexp(jnp.float32(x)).item(), 3) for x in (-1e-6, -1.0)]
    [-13.816, -0.459]
    """
    near = x_P > -math.log(2.0)
    # Each branch gets a harmless argument where the other one is taken: in the backward pass, a NaN
    # times 0 would stay NaN.
    near_P = jnp.log(-jnp.expm1(jnp.where(near, x_P, -1.0)))
    far_P = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x_P)))
    return jnp.where(near, near_P, far_P)


def log_odds(mean_logp_P: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of p = exp(mean log-prob), capped where float32 cannot tell p from 1."""
    capped_P = jnp.minimum(mean_logp_P, LARGEST_MEAN_LOGP)
    return capped_P - log1mexp(capped_P)


def sorted_real(x_P: jax.Array, mask_P: jax.Array) -> jax.Array:
    """The real pairs' values in rising order, at the places of real pairs; zeros at padding.

    >>> sorted_real(jnp.array([3.0, 9.0, 1.0]), jnp.array([1.0, 0.0, 1.0])).tolist()
    [1.0, 0.0, 3.0]
    """
    real = mask_P > 0
    # Padding last. The order is a constant for the gradient.
    order_P = jnp.argsort(jax.lax.stop_gradient(jnp.where(real, x_P, jnp.inf)))
    rising_P = x_P[order_P]
    # The k-th real pair gets the k-th value.
    rank_P = jnp.cumsum(real, dtype=jnp.int32) - 1
    return jnp.where(real, rising_P[rank_P], 0.0)
