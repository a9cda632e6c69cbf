"""The loss of a step from log-probs, as numerators and divisors: a step divides once, at the end.

Sums over microbatches and devices can be added in any order; means could not, as microbatches hold
different numbers of pairs and tokens.

Dimension names: M microbatches, B packed sequences, T token positions, P pairs of a sequence
(here flattened with M and B where a suffix is P alone).
"""

import functools

import jax
import jax.numpy as jnp

from jaxdpo.config.loss_options import LossSection
from jaxdpo.data.packing import Batch
from jaxdpo.losses import registry
from jaxdpo.losses.pair_logps import PairLogps
from jaxdpo.training.completion_logps import CompletionLogps, token_mask

Sums = dict[str, jax.Array]
"""Scalars, float32. Names with a slash are metrics (step_metrics.py)."""

DIVISORS = {
    "loss_pairs": "weight",
    "loss_tokens": "chosen_tokens",
    "loss_router": "sequence_tokens",
}
"""Numerator of a part of the loss -> what it is divided by."""


def pair_logps(policy: CompletionLogps, ref_logps: jax.Array | None, batch: Batch) -> PairLogps:
    """What the losses see: the leading dimensions and the pairs of a sequence as one, P."""
    lengths = batch.lengths_MBP2.astype(jnp.float32)
    if ref_logps is None:
        ref_logps = jnp.zeros_like(policy.logps)
    else:
        ref_logps = jax.lax.stop_gradient(ref_logps)
    return PairLogps(
        chosen_logps_P=policy.logps[..., 0].reshape(-1),
        rejected_logps_P=policy.logps[..., 1].reshape(-1),
        ref_chosen_logps_P=ref_logps[..., 0].reshape(-1),
        ref_rejected_logps_P=ref_logps[..., 1].reshape(-1),
        chosen_lengths_P=lengths[..., 0].reshape(-1),
        rejected_lengths_P=lengths[..., 1].reshape(-1),
        mask_P=(batch.index_MBP >= 0).astype(jnp.float32).reshape(-1),
        chosen_nll_P=-policy.plain_logps[..., 0].reshape(-1),
        margins_P=batch.margins_MBP.reshape(-1),
    )


def loss_sums(
    policy: CompletionLogps, ref_logps: jax.Array | None, batch: Batch, section: LossSection
) -> Sums:
    """Numerators and divisors of the loss over all microbatches given, [M, B, P, ...]."""
    pair = pair_logps(policy, ref_logps, batch)
    terms = registry.numerators(pair, section)
    weights_P = batch.weights_MBP.reshape(-1)
    pair_weights_P = weights_P
    if policy.collisions is not None:
        pair_weights_P = weights_P * _wpo_weights(policy.plain_logps - policy.collisions, pair)
    sums = {
        "loss_pairs": jnp.sum(pair_weights_P * terms.pairs_P),
        "loss_tokens": jnp.sum(weights_P * terms.chosen_tokens_P),
    }
    if policy.balance is not None:
        # One value a microbatch; weighted with its tokens, it becomes a sum like the others.
        tokens_M = jnp.sum(token_mask(batch), axis=(1, 2)).astype(jnp.float32)
        balance = jnp.sum(policy.balance * tokens_M)
        sums["router/balance"] = balance
        sums["loss_router"] = (section.router_aux_coef or 0.0) * balance
    return sums | loss_divisors(batch)


def _wpo_weights(excess: jax.Array, pair: PairLogps) -> jax.Array:
    """WPO (2406.11827 eq. 2, 4): weights of the pairs, [P]; no gradient flows through them.

    exp of the sum over both completions of the mean of log p(token) - log sum_v p(v)^2.
    """
    excess = jax.lax.stop_gradient(excess)
    chosen_P = excess[..., 0].reshape(-1) / jnp.maximum(pair.chosen_lengths_P, 1.0)
    rejected_P = excess[..., 1].reshape(-1) / jnp.maximum(pair.rejected_lengths_P, 1.0)
    return jnp.exp(chosen_P + rejected_P)


def loss_divisors(batch: Batch) -> Sums:
    """Sum of pair weights, of weight * chosen tokens, and number of tokens (prompts included)."""
    chosen_tokens = jnp.sum(batch.weights_MBP * batch.lengths_MBP2[..., 0].astype(jnp.float32))
    tokens = jnp.sum(token_mask(batch)).astype(jnp.float32)
    weight = jnp.sum(batch.weights_MBP)
    return {"weight": weight, "chosen_tokens": chosen_tokens, "sequence_tokens": tokens}


def divided_loss(sums: Sums, divisors: Sums) -> jax.Array:
    """The loss, or a microbatch's part of it, by the divisors of the whole batch."""
    parts = []
    for numerator, divisor in DIVISORS.items():
        if numerator in sums:
            # tiny: a batch whose weights are all 0 has a loss of 0, not NaN.
            at_least = jnp.finfo(jnp.float32).tiny
            parts.append(sums[numerator] / jnp.maximum(divisors[divisor], at_least))
    return functools.reduce(jnp.add, parts)
