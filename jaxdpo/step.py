"""One optimizer step as one program: policy and reference log-probs, loss, gradients, clipping, AdamW.

A step's microbatches are scanned; what is added up are sums, and each sum is divided once, by a count known from the
whole batch. Dimension names: M microbatches, B rows, T slots, S scored tokens, P pair places of a row (flattened with B
where the losses see them).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdpo import losses, optim
from jaxdpo.config import LossSection, OptimSection
from jaxdpo.data.packing import Batch
from jaxdpo.logprobs import chunk_size, gather_hidden, num_chunks, sum_by_side, token_collisions, token_kl, token_logps
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions, Params, forward, head_weight
from jaxdpo.pairs import PairLogps, given
from jaxdpo.sharding import replicated, rows

Sums = dict[str, jax.Array]

TR_ALPHA = 0.6
"""loss.tr_alpha where it was left alone."""


class TrainState(NamedTuple):
    """What a step changes; donated to it."""

    params: Params
    """The policy's weights."""
    opt: dict[str, Any]
    """AdamW's count and moments."""
    step: jax.Array
    """int32: steps taken, skipped ones included."""
    bad_steps: jax.Array
    """int32: steps in a row that were skipped because loss or gradient was not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Everything that is fixed when a step is compiled."""

    model: ModelConfig
    loss: LossSection
    optim: OptimSection
    forward: ForwardOptions
    total_steps: int
    chunk: int | None = None
    """Scored tokens whose logits exist at once. Default: logprobs.chunk_size."""


class Answers(NamedTuple):
    """One model's log-probs of a microbatch's answers; float32 [B, P, 2] (chosen, rejected), nats."""

    logps: jax.Array
    """Sums over tokens; with loss.ld_alpha, tokens beyond the shorter answer count that much."""
    plain_logps: jax.Array
    """Sums in which every token counts fully."""
    collisions: jax.Array | None
    """Sums of log sum_v p(v)^2, for WPO."""


def init_state(params: Params, section: OptimSection) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optim.init(params, section), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def compile_steps(options: StepOptions, mesh: Mesh, state_shardings: Any) -> tuple[Callable, Callable]:
    """The jitted (train_step, eval_step); see there for what they take. The state given to train_step is donated."""
    everywhere, batch = replicated(mesh), rows(mesh, 1)
    reference = state_shardings.params

    def train(state: TrainState, reference_params: Params, batch: Batch, apply: jax.Array) -> tuple[TrainState, Sums]:
        return train_step(state, reference_params, batch, apply, options)

    def evaluate(params: Params, reference_params: Params, batch: Batch) -> Sums:
        return eval_step(params, reference_params, batch, options)

    needed = reference if needs_reference(options.loss) else None
    return (
        jax.jit(
            train, donate_argnums=0, in_shardings=(state_shardings, needed, batch, everywhere), out_shardings=(state_shardings, everywhere)
        ),
        jax.jit(evaluate, in_shardings=(reference, needed, batch), out_shardings=everywhere),
    )


def needs_reference(section: LossSection) -> bool:
    """Whether any chosen loss compares with a reference model."""
    return any(losses.LOSSES[name].needs_reference for name in section.names)


def train_step(
    state: TrainState, reference: Params | None, batch: Batch, apply: jax.Array, options: StepOptions
) -> tuple[TrainState, Sums]:
    """One optimizer step.

    Args:
        state: the policy and its optimizer.
        reference: the reference's weights, or None for losses without one.
        batch: all pairs of the step.
        apply: bool scalar; False measures only and leaves the state as it is.

    Returns:
        (new state, metrics). A step whose loss or gradient is not finite changes no weight; metrics["nonfinite"] is then 1.
    """
    sums, grads = loss_and_grads(state.params, reference, batch, options)
    metrics = averages(sums)
    grad_norm = optim.global_norm(grads)
    learning_rate = jnp.asarray(optim.schedule(options.optim, options.total_steps)(state.step.astype(jnp.float32)), jnp.float32)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    params, opt = optim.update(grads, grad_norm, state.opt, state.params, learning_rate, options.optim)
    accept = finite & apply
    moved = TrainState(params, opt, state.step, jnp.zeros((), jnp.int32))
    stayed = TrainState(state.params, state.opt, state.step, state.bad_steps + 1)
    chosen = jax.tree.map(lambda new, old: jnp.where(accept, new, old), moved, stayed)
    bad_steps = jnp.where(apply, chosen.bad_steps, state.bad_steps)
    metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
    metrics |= {"nonfinite": 1.0 - finite.astype(jnp.float32), "bad_steps": bad_steps}
    return chosen._replace(step=state.step + apply.astype(jnp.int32), bad_steps=bad_steps), metrics


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _mix(reference: Params, params: Params, share: float) -> Params:
    return jax.tree.map(
        lambda ref, w: ((1.0 - share) * ref.astype(jnp.float32) + share * w.astype(jnp.float32)).astype(ref.dtype), reference, params
    )


def move_reference(reference: Params, params: Params, section: LossSection) -> Params:
    """TR-DPO (2404.09656): reference <- a * policy + (1 - a) * reference. The reference given is donated."""
    return _mix(reference, params, given(section.tr_alpha, TR_ALPHA))


def eval_step(params: Params, reference: Params | None, batch: Batch, options: StepOptions) -> Sums:
    """Sums over a batch of validation pairs; add those of several batches, then take `averages`."""

    def measure(micro: Batch) -> tuple[Answers, Answers | None, Sums]:
        scored = _Scored.of(params, micro, options)
        policy = _answers(params, scored, micro, options)
        if reference is None:
            return policy, None, _report(_pair_logps(policy, None, micro), micro, options.loss)
        ref_scored = _Scored.of(reference, micro, options)
        ref = _answers(reference, ref_scored, micro, options)
        report = _report(_pair_logps(policy, ref, micro), micro, options.loss)
        return policy, ref, report | _kl_sums(params, scored, reference, ref_scored)

    policy, ref, sums = jax.lax.map(measure, batch)
    return jax.tree.map(lambda x: x.sum(0), sums) | _loss_sums(policy, ref, batch, options.loss)


def averages(sums: Sums) -> Sums:
    """Means from sums: each divided once by the count it belongs to, and the loss put together."""
    pairs, tokens = jnp.maximum(sums["pairs"], 1.0), jnp.maximum(sums["tokens"], 1.0)
    per_pair = {key: sum_ / pairs for key, sum_ in sums.items() if "/" in key and not key.startswith("kl/")}
    per_token = {key: sum_ / tokens for key, sum_ in sums.items() if key.startswith("kl/")}
    return {"loss": _loss_of(sums, sums["weight"], sums["chosen_tokens"])} | per_pair | per_token


def loss_and_grads(params: Params, reference: Params | None, batch: Batch, options: StepOptions) -> tuple[Sums, Params]:
    """Loss sums of a whole batch, and the gradients of the loss; float32, like params.

    The microbatches are scanned. A loss that mixes pairs of the whole batch is differentiated by its log-probs first (one
    forward pass more), and its gradient then carried back through each microbatch.
    """
    weight, chosen_tokens = _totals(batch)
    coupled = losses.coupled(options.loss)
    policy_all = ref_all = pull_all = None
    if coupled:
        policy_all, ref_all = _all_answers(params, batch, options), _all_answers(reference, batch, options)
        pull_all = jax.grad(lambda policy: _loss_of(_loss_sums(policy, ref_all, batch, options.loss), weight, chosen_tokens))(policy_all)

    def objective(params: Params, micro: Batch, ref: Answers | None, pull: Answers | None) -> tuple[jax.Array, Sums]:
        policy = answers(params, micro, options)
        sums = _report(_pair_logps(policy, ref, micro), micro, options.loss)
        if pull is not None:
            return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, pull, policy)), sums
        policy, ref, micro = jax.tree.map(lambda x: x[None], (policy, ref, micro))
        sums |= _loss_sums(policy, ref, micro, options.loss)
        return _loss_of(sums, weight, chosen_tokens), sums

    def micro_step(grads: Params, args: tuple) -> tuple[Params, Sums]:
        micro, ref, pull = args
        if not coupled:
            ref = None if reference is None else answers(reference, micro, options)
        (_, sums), micro_grads = jax.value_and_grad(objective, has_aux=True)(params, micro, ref, pull)
        return jax.tree.map(lambda total, g: total + g.astype(jnp.float32), grads, micro_grads), sums

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
    grads, sums = jax.lax.scan(micro_step, zeros, (batch, ref_all, pull_all))
    sums = jax.tree.map(lambda x: x.sum(0), sums)
    if policy_all is not None:
        sums |= _loss_sums(policy_all, ref_all, batch, options.loss)
    return sums, grads


def answers(params: Params, micro: Batch, options: StepOptions) -> Answers:
    """The answers' log-probs under one model, for one microbatch (arrays without their leading M)."""
    return _answers(params, _Scored.of(params, micro, options), micro, options)


def _answers(params: Params, scored: "_Scored", micro: Batch, options: StepOptions) -> Answers:
    num_places, section = micro.weights_MBP.shape[-1], options.loss
    logps_BS: Any = token_logps(scored.hidden_BSD, head_weight(params), scored.targets_BS, scored.chunks, scored.chunk, scored.dtype)
    plain_logps = logps = sum_by_side(logps_BS, scored.sides_BS, num_places)
    if section.ld_alpha is not None:
        share_BS = jnp.where(scored.common_BS > 0, 1.0, section.ld_alpha)
        logps = sum_by_side(logps_BS * share_BS, scored.sides_BS, num_places)
    collisions = None
    if section.wpo:
        hidden, head = jax.lax.stop_gradient((scored.hidden_BSD, head_weight(params)))
        collisions = sum_by_side(token_collisions(hidden, head, scored.chunks, scored.chunk, scored.dtype), scored.sides_BS, num_places)
    return Answers(logps, plain_logps, collisions)


class _Scored(NamedTuple):
    """The scored tokens of a microbatch under one model, padded to whole chunks."""

    hidden_BSD: jax.Array
    targets_BS: jax.Array
    sides_BS: jax.Array
    common_BS: jax.Array
    chunks: jax.Array
    chunk: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, params: Params, micro: Batch, options: StepOptions) -> "_Scored":
        hidden_BTD = forward(
            params, options.model, micro.tokens_MBT, micro.positions_MBT, micro.k_start_MBT, micro.k_end_MBT, options.forward
        )
        num_tokens = micro.slots_MBS.shape[-1]
        chunk = min(options.chunk or chunk_size(options.model.vocab_size, num_tokens, options.forward.on_cpu), num_tokens)
        behind = ((0, 0), (0, -num_tokens % chunk))
        sides_BS = jnp.pad(micro.sides_MBS, behind, constant_values=-1)
        slots_BS, targets_BS, common_BS = (jnp.pad(x, behind) for x in (micro.slots_MBS, micro.targets_MBS, micro.common_MBS))
        hidden_BSD = gather_hidden(hidden_BTD, slots_BS)
        dtype = jnp.dtype(options.forward.compute_dtype)
        return cls(hidden_BSD, targets_BS, sides_BS, common_BS, num_chunks(sides_BS, chunk), chunk, dtype)


def _all_answers(params: Params | None, batch: Batch, options: StepOptions) -> Answers | None:
    """The answers' log-probs for every microbatch, [M, B, P, 2]; None without a model."""
    return None if params is None else jax.lax.map(lambda micro: answers(params, micro, options), batch)


def _pair_logps(policy: Answers, ref: Answers | None, batch: Batch) -> PairLogps:
    """What the losses see; leading dimensions and pair places become one dimension P."""
    lengths = batch.lengths_MBP2.astype(jnp.float32)
    ref_logps = jnp.zeros_like(policy.logps) if ref is None else jax.lax.stop_gradient(ref.logps)
    return PairLogps(
        chosen_logps_P=policy.logps[..., 0].reshape(-1),
        rejected_logps_P=policy.logps[..., 1].reshape(-1),
        ref_chosen_logps_P=ref_logps[..., 0].reshape(-1),
        ref_rejected_logps_P=ref_logps[..., 1].reshape(-1),
        chosen_lengths_P=lengths[..., 0].reshape(-1),
        rejected_lengths_P=lengths[..., 1].reshape(-1),
        mask_P=(batch.index_MBP >= 0).astype(jnp.float32).reshape(-1),
        chosen_nll_P=-policy.plain_logps[..., 0].reshape(-1),
    )


def _loss_sums(policy: Answers, ref: Answers | None, batch: Batch, section: LossSection) -> Sums:
    """Numerators and divisors of the loss over all microbatches given, [M, B, P, ...]."""
    pair = _pair_logps(policy, ref, batch)
    terms = losses.numerators(pair, section)
    weights_P = batch.weights_MBP.reshape(-1)
    shared_P = weights_P if policy.collisions is None else weights_P * _wpo_weights(policy.plain_logps - policy.collisions, pair)
    weight, chosen_tokens = _totals(batch)
    return {
        "loss_pairs": jnp.sum(shared_P * terms.pairs_P),
        "loss_tokens": jnp.sum(weights_P * terms.chosen_tokens_P),
        "weight": weight,
        "chosen_tokens": chosen_tokens,
    }


def _wpo_weights(excess: jax.Array, pair: PairLogps) -> jax.Array:
    """WPO (2406.11827 eq. 2, 4): exp of both sides' mean of log p(token) - log sum_v p(v)^2, not differentiated."""
    excess = jax.lax.stop_gradient(excess)
    chosen_P = excess[..., 0].reshape(-1) / jnp.maximum(pair.chosen_lengths_P, 1.0)
    rejected_P = excess[..., 1].reshape(-1) / jnp.maximum(pair.rejected_lengths_P, 1.0)
    return jnp.exp(chosen_P + rejected_P)


def _totals(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Divisors of the loss: sum of pair weights, and sum of weight * chosen tokens."""
    return jnp.sum(batch.weights_MBP), jnp.sum(batch.weights_MBP * batch.lengths_MBP2[..., 0].astype(jnp.float32))


def _loss_of(sums: Sums, weight: jax.Array, chosen_tokens: jax.Array) -> jax.Array:
    """The loss from its numerators and the divisors of the whole batch."""
    return sums["loss_pairs"] / _at_least_tiny(weight) + sums["loss_tokens"] / _at_least_tiny(chosen_tokens)


def _at_least_tiny(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, jnp.finfo(jnp.float32).tiny)


def _report(pair: PairLogps, micro: Batch, section: LossSection) -> Sums:
    """What is told about a microbatch's pairs, as sums."""
    chosen_P, rejected_P = losses.rewards(pair, section)
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


def _kl_sums(params: Params, policy: _Scored, reference: Params, ref: _Scored) -> Sums:
    """Sum of the exact KL(policy || reference) of every answer token's distribution."""
    kl_BS = token_kl(
        policy.hidden_BSD, head_weight(params), ref.hidden_BSD, head_weight(reference), policy.chunks, policy.chunk, policy.dtype
    )
    return {"kl/token_exact": jnp.sum(jnp.where(policy.sides_BS >= 0, kl_BS, 0.0))}
