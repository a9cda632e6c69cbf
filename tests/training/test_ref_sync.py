"""loss.ref_sync_every: the reference follows the policy."""

import jax
import jax.numpy as jnp

from jaxdpo.config.loss_options import LossSection
from jaxdpo.training.ref_sync import sync_reference
from tests.tiny import params
from tests.training.test_step import difference


def test_a_synced_reference_is_the_weighted_mean() -> None:
    mean = sync_reference(
        jax.tree.map(jnp.asarray, params(1)),
        params(0),
        LossSection(ref_sync_every=1, ref_mixup_alpha=0.25),
    )
    wanted = jax.tree.map(
        lambda policy, reference: 0.25 * policy + 0.75 * reference, params(0), params(1)
    )
    assert difference(mean, wanted) < 1e-6
    default = sync_reference(
        jax.tree.map(jnp.asarray, params(1)), params(0), LossSection(ref_sync_every=1)
    )
    assert (
        difference(
            default,
            jax.tree.map(
                lambda policy, reference: 0.6 * policy + 0.4 * reference, params(0), params(1)
            ),
        )
        < 1e-6
    )
