"""The state of training: what a step changes, and what it only reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdpo.config.schema import OptimSection
from jaxdpo.distributed import offload
from jaxdpo.models.params import Params
from jaxdpo.training import optim


class TrainState(NamedTuple):
    """What a step changes; donated to it, and saved in checkpoints."""

    params: Params
    """The trained parameters: all of the policy's weights, or its adapter."""
    opt: dict[str, Any]
    """AdamW's count and moments."""
    step: jax.Array
    """int32: steps taken, skipped ones included."""
    bad_steps: jax.Array
    """int32: consecutive steps that were skipped because loss or gradient was NaN or infinite."""


class FrozenState(NamedTuple):
    """What a step reads and does not change: not donated, no gradients or moments, not saved."""

    base: Params | None = None
    """The weights under an adapter. None: the state has all the weights."""
    reference: Params | None = None
    """The reference's own weights over the base: all of them (reference=frozen), or an adapter or
    nothing (adapter_off). None: no reference model runs."""
    ref_logps: jax.Array | None = None
    """Log-probs of this batch under a reference that ran before (cached); float32 [M, B, P, 2]."""

    def policy_view(self, params: Params) -> Params:
        """The policy as the decoder takes it, from the trained parameters."""
        return params if self.base is None else self.base | {"lora": params}

    def reference_view(self) -> Params | None:
        """The reference as the decoder takes it; None where no reference model runs."""
        if self.reference is None:
            return None
        weights = dict(self.base or {})
        for name, part in self.reference.items():
            # Offloaded layers stay in host memory: the decoder fetches them one at a time.
            weights[name] = part if name == "layers" else offload.to_device(part)
        return weights


def init_state(params: Params, section: OptimSection) -> TrainState:
    """The state before the first step."""
    opt = optim.init(params, section)
    step, bad_steps = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(params, opt, step, bad_steps)
