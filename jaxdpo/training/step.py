"""One optimizer step as one program: policy and reference log-probs, loss, gradients, clipping, AdamW.

A step's microbatches are scanned; what is added up are sums, and each sum is divided once, by a count known from the
whole batch. Dimension names: M microbatches, B rows, T slots, S scored tokens, P pair places of a row (flattened with B
where the losses see them).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdpo.config.loss_options import REF_MIXUP_ALPHA, LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.data.packing import Batch
from jaxdpo.distributed import offload
from jaxdpo.distributed.sharding import replicated, rows, summed_over_data
from jaxdpo.losses import registry
from jaxdpo.losses.pair_logps import PairLogps
from jaxdpo.models.params import Params
from jaxdpo.training import optim
from jaxdpo.training.completion_logps import (
    CompletionLogps,
    CompletionTokens,
    StepOptions,
    all_answers,
    answers,
    real_slots,
    reference_logps,
)

Sums = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a step changes; donated to it."""

    params: Params
    """What is trained: all of the policy's weights, or its adapter."""
    opt: dict[str, Any]
    """AdamW's count and moments."""
    step: jax.Array
    """int32: steps taken, skipped ones included."""
    bad_steps: jax.Array
    """int32: steps in a row that were skipped because loss or gradient was not finite."""


class FrozenState(NamedTuple):
    """What a step reads and leaves as it is: not donated, without gradients and moments, not in checkpoints."""

    base: Params | None = None
    """The weights under an adapter; None: the state has all the weights."""
    reference: Params | None = None
    """What the reference has over the base: all weights (frozen), or an adapter or nothing (adapter_off). None: no reference runs."""
    ref_logps: jax.Array | None = None
    """The log-probs of the batch at hand under a reference that ran before (cached); float32 [M, B, P, 2]."""

    def policy_view(self, params: Params) -> Params:
        """The policy as the decoder takes it, from what is trained."""
        return params if self.base is None else self.base | {"lora": params}

    def reference_view(self) -> Params | None:
        """The reference as the decoder takes it; None where none runs. Of what waits on the hosts, the layers are left there."""
        if self.reference is None:
            return None
        return (self.base or {}) | {
            name: part if name == "layers" else offload.fetched(part)
            for name, part in self.reference.items()
        }


def init_state(params: Params, section: OptimSection) -> TrainState:
    """The state before the first step."""
    return TrainState(
        params, optim.init(params, section), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    )


def compile_steps(
    options: StepOptions, mesh: Mesh, state_shardings: Any, fixed_shardings: Any
) -> tuple[Callable, Callable]:
    """The jitted (train_step, eval_step); see there for what they take. The state given to train_step is donated."""
    everywhere, batch = replicated(mesh), rows(mesh, 1)

    def train(
        state: TrainState, fixed: FrozenState, batch: Batch, apply: jax.Array
    ) -> tuple[TrainState, Sums]:
        return train_step(state, fixed, batch, apply, options)

    def evaluate(params: Params, fixed: FrozenState, batch: Batch) -> Sums:
        return eval_step(params, fixed, batch, options)

    taken = (state_shardings, fixed_shardings, batch, everywhere)
    return (
        jax.jit(
            train, donate_argnums=0, in_shardings=taken, out_shardings=(state_shardings, everywhere)
        ),
        jax.jit(
            evaluate,
            in_shardings=(state_shardings.params, fixed_shardings, batch),
            out_shardings=everywhere,
        ),
    )


def train_step(
    state: TrainState, fixed: FrozenState, batch: Batch, apply: jax.Array, options: StepOptions
) -> tuple[TrainState, Sums]:
    """One optimizer step.

    Args:
        state: what is trained, and its optimizer.
        fixed: base and reference.
        batch: all pairs of the step.
        apply: bool scalar; False measures only and leaves the state as it is.

    Returns:
        (new state, metrics). A step whose loss or gradient is not finite changes no weight; metrics["nonfinite"] is then 1.
    """
    sums, grads = loss_and_grads(state.params, fixed, batch, options)
    metrics = averages(sums)
    grad_norm = optim.global_norm(grads)
    learning_rate = jnp.asarray(
        optim.schedule(options.optim, options.total_steps)(state.step.astype(jnp.float32)),
        jnp.float32,
    )
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    accept = finite & apply
    params, opt = optim.update(
        grads, grad_norm, state.opt, state.params, learning_rate, options.optim, accept
    )
    bad_steps = jnp.where(apply, jnp.where(finite, 0, state.bad_steps + 1), state.bad_steps)
    metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
    metrics |= (
        {}
        if fixed.base is None
        else {
            f"grad_norm/lora_{name}": optim.global_norm(optim.leaves_named(grads, name))
            for name in "ab"
        }
    )
    metrics |= {"nonfinite": 1.0 - finite.astype(jnp.float32), "bad_steps": bad_steps}
    return TrainState(params, opt, state.step + apply.astype(jnp.int32), bad_steps), metrics


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _mix(reference: Params, params: Params, share: float) -> Params:
    def mix(ref: jax.Array, w: jax.Array) -> jax.Array:
        return ((1.0 - share) * ref.astype(jnp.float32) + share * w.astype(jnp.float32)).astype(
            ref.dtype
        )

    def change(reference: Params, params: Params) -> tuple[Params]:
        return (jax.tree.map(mix, reference, params),)

    return offload.changed(change, (reference,), params)[0]


def move_reference(reference: Params, params: Params, section: LossSection) -> Params:
    """TR-DPO (2404.09656): reference <- a * policy + (1 - a) * reference. The reference given is donated."""
    share = REF_MIXUP_ALPHA if section.ref_mixup_alpha is None else section.ref_mixup_alpha
    return _mix(reference, params, share)


def eval_step(params: Params, fixed: FrozenState, batch: Batch, options: StepOptions) -> Sums:
    """Sums over a batch of validation pairs; add those of several batches, then take `averages`."""
    policy_weights, ref_weights = fixed.policy_view(params), fixed.reference_view()

    def measure(
        args: tuple[Batch, jax.Array | None],
    ) -> tuple[CompletionLogps, jax.Array | None, Sums]:
        micro, ref_logps = args
        scored, kl = CompletionTokens.of(policy_weights, micro, options), {}
        if ref_weights is not None:
            ref_scored = CompletionTokens.of(ref_weights, micro, options)
            ref_logps = ref_scored.answers(micro, options.loss).logps
            kl = {"kl/token_exact": scored.exact_kl(ref_scored)}
        policy = scored.answers(micro, options.loss)
        return policy, ref_logps, _report(policy, ref_logps, micro, options.loss) | kl

    policy, ref_logps, sums = jax.lax.map(measure, (batch, fixed.ref_logps))
    return jax.tree.map(lambda x: x.sum(0), sums) | _loss_sums(
        policy, ref_logps, batch, options.loss
    )


def averages(sums: Sums) -> Sums:
    """Means from sums: each divided once by the count it belongs to, and the loss put together."""
    counts = {"kl": sums["tokens"], "router": sums["slots"]}
    means = {
        key: sum_ / jnp.maximum(counts.get(key.split("/")[0], sums["pairs"]), 1.0)
        for key, sum_ in sums.items()
        if "/" in key
    }
    return {"loss": _loss_of(sums, sums)} | means


def loss_and_grads(
    params: Params, fixed: FrozenState, batch: Batch, options: StepOptions
) -> tuple[Sums, Params]:
    """Loss sums of a whole batch, and the gradients of the loss; float32, like params.

    The microbatches are scanned; where adds_up_once says so, the devices along `data` each do that alone. A loss that mixes pairs of the
    whole batch is differentiated by its log-probs first (one forward pass more), and its gradient then carried back through each
    microbatch.
    """
    totals, section, ref_weights = _totals(batch), options.loss, fixed.reference_view()
    coupled = registry.coupled(section)
    ref_all, policy_all, pull_all = fixed.ref_logps, None, None
    if coupled:
        policy_all = all_answers(fixed.policy_view(params), batch, options)
        ref_all = ref_all if ref_weights is None else reference_logps(ref_weights, batch, options)
        pull_all = jax.grad(
            lambda policy: _loss_of(_loss_sums(policy, ref_all, batch, section), totals)
        )(policy_all)

    def objective(
        params: Params, micro: Batch, ref_logps: jax.Array | None, pull: CompletionLogps | None
    ) -> tuple[jax.Array, Sums]:
        policy = answers(fixed.policy_view(params), micro, options)
        sums = _report(policy, ref_logps, micro, section)
        if pull is not None:
            return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, pull, policy)), sums
        policy, ref_logps, micro = jax.tree.map(lambda x: x[None], (policy, ref_logps, micro))
        sums |= _loss_sums(policy, ref_logps, micro, section)
        return _loss_of(sums, totals), sums

    def micro_step(grads: Params, args: tuple) -> tuple[Params, Sums]:
        micro, ref_logps, pull = args
        if ref_weights is not None and not coupled:
            ref_logps = answers(ref_weights, micro, options).logps
        (_, sums), micro_grads = jax.value_and_grad(objective, has_aux=True)(
            params, micro, ref_logps, pull
        )
        return jax.tree.map(
            lambda total, g: total + g.astype(jnp.float32), grads, micro_grads
        ), sums

    def all_steps(args: tuple) -> tuple[Params, Sums]:
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
        grads, sums = jax.lax.scan(micro_step, zeros, args)
        return grads, jax.tree.map(lambda x: x.sum(0), sums)

    mesh = options.forward.mesh if adds_up_once(options, len(batch.tokens_MBT)) else None
    grads, sums = summed_over_data(all_steps, mesh, (batch, ref_all, pull_all))
    if policy_all is not None:
        sums |= _loss_sums(policy_all, ref_all, batch, section)
    return sums, grads


def adds_up_once(options: StepOptions, num_microbatches: int) -> bool:
    """Whether gradients are added up along `data` once a step, and not by the compiler in each layer of each microbatch.

    Not with one microbatch, where each layer's sum can be under way beside the work on the next; nor with experts, as how unevenly they
    are used is measured over all rows of a microbatch.
    """
    mesh = options.forward.mesh
    return (
        mesh is not None
        and mesh.shape["data"] > 1
        and num_microbatches > 1
        and not options.model.num_experts
    )


def _pair_logps(policy: CompletionLogps, ref_logps: jax.Array | None, batch: Batch) -> PairLogps:
    """What the losses see; leading dimensions and pair places become one dimension P."""
    lengths = batch.lengths_MBP2.astype(jnp.float32)
    ref_logps = (
        jnp.zeros_like(policy.logps) if ref_logps is None else jax.lax.stop_gradient(ref_logps)
    )
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


def _loss_sums(
    policy: CompletionLogps, ref_logps: jax.Array | None, batch: Batch, section: LossSection
) -> Sums:
    """Numerators and divisors of the loss over all microbatches given, [M, B, P, ...]."""
    pair = _pair_logps(policy, ref_logps, batch)
    terms = registry.numerators(pair, section)
    weights_P = batch.weights_MBP.reshape(-1)
    shared_P = (
        weights_P
        if policy.collisions is None
        else weights_P * _wpo_weights(policy.plain_logps - policy.collisions, pair)
    )
    sums = {
        "loss_pairs": jnp.sum(shared_P * terms.pairs_P),
        "loss_tokens": jnp.sum(weights_P * terms.chosen_tokens_P),
    }
    if (
        policy.balance is not None
    ):  # of each microbatch, as a mean over them that counts their tokens
        uneven = jnp.vdot(
            policy.balance, jnp.sum(real_slots(batch), axis=(1, 2)).astype(jnp.float32)
        )
        sums |= {
            "router/balance": uneven,
            "loss_slots": (section.router_aux_coef or 0.0) * uneven,
        }
    return sums | _totals(batch)


def _wpo_weights(excess: jax.Array, pair: PairLogps) -> jax.Array:
    """WPO (2406.11827 eq. 2, 4): exp of both sides' mean of log p(token) - log sum_v p(v)^2, not differentiated."""
    excess = jax.lax.stop_gradient(excess)
    chosen_P = excess[..., 0].reshape(-1) / jnp.maximum(pair.chosen_lengths_P, 1.0)
    rejected_P = excess[..., 1].reshape(-1) / jnp.maximum(pair.rejected_lengths_P, 1.0)
    return jnp.exp(chosen_P + rejected_P)


def _totals(batch: Batch) -> Sums:
    """Divisors of the loss: sum of pair weights, sum of weight * chosen tokens, and number of tokens."""
    chosen_tokens = jnp.sum(batch.weights_MBP * batch.lengths_MBP2[..., 0].astype(jnp.float32))
    slots = jnp.sum(real_slots(batch)).astype(jnp.float32)
    return {"weight": jnp.sum(batch.weights_MBP), "chosen_tokens": chosen_tokens, "slots": slots}


def _loss_of(sums: Sums, totals: Sums) -> jax.Array:
    """The loss from its numerators and the divisors of the whole batch."""
    divisors = {"loss_pairs": "weight", "loss_tokens": "chosen_tokens", "loss_slots": "slots"}
    parts = [
        sums[key] / jnp.maximum(totals[by], jnp.finfo(jnp.float32).tiny)
        for key, by in divisors.items()
        if key in sums
    ]
    return functools.reduce(jnp.add, parts)


def _report(
    policy: CompletionLogps, ref_logps: jax.Array | None, micro: Batch, section: LossSection
) -> Sums:
    """What is told about a microbatch's pairs, as sums."""
    pair = _pair_logps(policy, ref_logps, micro)
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
