"""The metrics of a step: sums over the pairs of each microbatch, divided once for the whole step.

One more metric a step: add its value per pair to `metric_sums`, under a name with a slash. It is
then summed over microbatches and devices, averaged over the pairs, and logged (metric_logger.py).
"""

import jax
import jax.numpy as jnp

from jaxdpo.config.loss_options import LossSection
from jaxdpo.data.packing import Batch
from jaxdpo.losses import registry
from jaxdpo.training.completion_logps import CompletionLogps
from jaxdpo.training.step_loss import Sums, divided_loss, pair_logps

COUNTS = {"kl": "tokens", "router": "sequence_tokens"}
"""First part of a metric's name -> the count that its sum is divided by. All others: "pairs"."""

PAIR_LOGPS = "pair_logps"
"""Key of `logps_of_pairs` among the metrics of a train step: the only one that is no scalar."""


def logps_of_pairs(policy: CompletionLogps, ref_logps: jax.Array | None, micro: Batch) -> jax.Array:
    """Log-probs of a microbatch's pairs, each at its number within the step and 0 elsewhere.

    A sum over microbatches and devices then holds all pairs of the step.

    Returns:
        float32 [P, 2 (chosen, rejected), 2 (policy, reference)], nats; P is at least the pairs of a
        step. A reference that there is none of is 0.
    """
    if ref_logps is None:
        ref_logps = jnp.zeros_like(policy.logps)
    values = jnp.stack([policy.logps, ref_logps], axis=-1).reshape(-1, 2, 2)
    num_pairs = micro.index_MBP.shape[-1]
    # Padding's number is beyond the last pair's, and dropped.
    numbers = jnp.where(micro.index_MBP < 0, num_pairs, micro.index_MBP).reshape(-1)
    return jnp.zeros((num_pairs, 2, 2), jnp.float32).at[numbers].add(values, mode="drop")


def metric_sums(
    policy: CompletionLogps, ref_logps: jax.Array | None, micro: Batch, section: LossSection
) -> Sums:
    """Metrics of a microbatch, as sums over its pairs, and the counts of its pairs and tokens."""
    pair = pair_logps(policy, ref_logps, micro)
    chosen_P, rejected_P = registry.rewards(pair, section)
    lengths = micro.lengths_MBP2.astype(jnp.float32)
    values = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).astype(jnp.float32),
        "rewards/accuracies_ties_half": 0.5 * (1.0 + jnp.sign(chosen_P - rejected_P)),
        "logps/chosen": pair.chosen_logps_P,
        "logps/rejected": pair.rejected_logps_P,
        "logps/ref_chosen": pair.ref_chosen_logps_P,
        "lengths/chosen": lengths[..., 0].reshape(-1),
        "lengths/rejected": lengths[..., 1].reshape(-1),
    }
    counts = {"pairs": jnp.sum(pair.mask_P), "tokens": jnp.sum(lengths)}
    return {key: jnp.sum(pair.mask_P * value_P) for key, value_P in values.items()} | counts


def averages(sums: Sums) -> Sums:
    """Means from the sums of a whole batch: each divided once by its count; and the loss."""
    means = {}
    for key, total in sums.items():
        group, slash, _ = key.partition("/")
        if slash:
            means[key] = total / jnp.maximum(sums[COUNTS.get(group, "pairs")], 1.0)
    return {"loss": divided_loss(sums, sums)} | means
