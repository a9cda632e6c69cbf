"""loss.ref_sync_every: the reference follows the policy (TR-DPO, 2404.09656)."""

import functools

import jax
import jax.numpy as jnp

from jaxdpo.config.loss_options import REF_MIXUP_ALPHA, LossSection
from jaxdpo.distributed import offload
from jaxdpo.models.params import Params


def sync_reference(reference: Params, params: Params, section: LossSection) -> Params:
    """reference <- a * policy + (1 - a) * reference. The reference given is donated."""
    alpha = REF_MIXUP_ALPHA if section.ref_mixup_alpha is None else section.ref_mixup_alpha
    return _mixed(reference, params, alpha)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _mixed(reference: Params, params: Params, alpha: float) -> Params:
    def mix(ref: jax.Array, w: jax.Array) -> jax.Array:
        mixed = (1.0 - alpha) * ref.astype(jnp.float32) + alpha * w.astype(jnp.float32)
        return mixed.astype(ref.dtype)

    def change(reference: Params, params: Params) -> tuple[Params]:
        return (jax.tree.map(mix, reference, params),)

    return offload.update_by_layer(change, (reference,), params)[0]
