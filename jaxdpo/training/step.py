"""One optimizer step as one program: log-probs of policy and reference, loss, gradients, AdamW.

The step is pure: everything that it reads is an argument, everything that it changes is in
TrainState, which is donated. Gradient accumulation is a scan over microbatches inside of it.

Dimension names: M microbatches, B packed sequences, T token positions, P pairs of a sequence.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdpo.data.packing import Batch
from jaxdpo.distributed.sharding import replicated, rows, summed_over_data
from jaxdpo.losses import registry
from jaxdpo.models.matmul import exact_products
from jaxdpo.models.params import Params
from jaxdpo.training import optim
from jaxdpo.training.completion_logps import (
    CompletionLogps,
    CompletionTokens,
    StepOptions,
    all_completion_logps,
    completion_logps,
    reference_logps,
)
from jaxdpo.training.state import FrozenState, TrainState
from jaxdpo.training.step_loss import Sums, divided_loss, loss_divisors, loss_sums
from jaxdpo.training.step_metrics import PAIR_LOGPS, averages, logps_of_pairs, metric_sums


def train_step(
    state: TrainState, frozen: FrozenState, batch: Batch, apply: jax.Array, options: StepOptions
) -> tuple[TrainState, Sums]:
    """One optimizer step.

    Args:
        state: what is trained, and its optimizer's state.
        frozen: base and reference.
        batch: all pairs of the step (the global batch).
        apply: bool scalar; False measures only and leaves the state as it is.

    Returns:
        (new state, metrics). A step whose loss or gradient is NaN or infinite changes no weight;
        metrics["nonfinite"] is then 1.
    """
    sums, grads = loss_and_grads(state.params, frozen, batch, options)
    metrics = averages(sums)
    grad_norm = optim.global_norm(grads)
    schedule = optim.schedule(options.optim, options.total_steps)
    # By steps, not by updates: a run that skips a step still ends its schedule with its last step.
    learning_rate = jnp.asarray(schedule(state.step.astype(jnp.float32)), jnp.float32)

    # Decided on the device: the host learns of a NaN one step late, when the weights would be lost.
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    accept = finite & apply
    params, opt = optim.update(
        grads, grad_norm, state.opt, state.params, learning_rate, options.optim, accept
    )
    bad_steps = jnp.where(apply, jnp.where(finite, 0, state.bad_steps + 1), state.bad_steps)

    metrics[PAIR_LOGPS] = sums[PAIR_LOGPS]  # for the startup check
    metrics["grad_norm"] = grad_norm
    metrics["learning_rate"] = learning_rate
    if frozen.base is not None:
        # LoRA's B starts at 0, so A has no gradient at first: both norms show which of them learns.
        for name in ("a", "b"):
            metrics[f"grad_norm/lora_{name}"] = optim.global_norm(optim.leaves_named(grads, name))
    if any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params)):
        metrics["weights/changed"] = optim.changed_share(state.params, params)
    metrics["nonfinite"] = 1.0 - finite.astype(jnp.float32)
    metrics["bad_steps"] = bad_steps
    return TrainState(params, opt, state.step + apply.astype(jnp.int32), bad_steps), metrics


def loss_and_grads(
    params: Params, frozen: FrozenState, batch: Batch, options: StepOptions
) -> tuple[Sums, Params]:
    """Loss sums of a whole batch, and the gradients of its loss: float32, like params.

    Gradient accumulation: each microbatch computes its part of the loss, divided by the sums of the
    whole batch, and the gradients of the parts are added up. A coupled loss (aot) has no such
    parts; see `_coupled_first_pass`.
    """
    section = options.loss
    coupled = registry.coupled(section)
    divisors = loss_divisors(batch)
    ref_weights = frozen.reference_view()
    policy_logps = cotangents = None
    ref_logps = frozen.ref_logps  # of a cached reference, else None
    if coupled:
        policy_logps, ref_logps, cotangents = _coupled_first_pass(
            frozen.policy_view(params), ref_weights, ref_logps, batch, divisors, options
        )

    def micro_loss(
        params: Params, micro: Batch, ref_logps: jax.Array | None, cotangents: Any
    ) -> tuple[jax.Array, Sums]:
        """A microbatch's part of the loss, and its sums for the metrics."""
        policy = completion_logps(frozen.policy_view(params), micro, options)
        sums = metric_sums(policy, ref_logps, micro, section)
        sums[PAIR_LOGPS] = jax.lax.stop_gradient(logps_of_pairs(policy, ref_logps, micro))
        if coupled:
            # Not the loss, but a value with the same gradient by the weights (chain rule).
            terms = jax.tree.map(lambda d, x: jnp.sum(d * x), cotangents, policy)
            return jax.tree.reduce(jnp.add, terms), sums
        # loss_sums takes batches: this one has a single microbatch.
        policy, ref_logps, micro = jax.tree.map(lambda x: x[None], (policy, ref_logps, micro))
        sums |= loss_sums(policy, ref_logps, micro, section)
        return divided_loss(sums, divisors), sums

    def accumulate(grads: Params, microbatch: tuple) -> tuple[Params, Sums]:
        """Add the gradients of one microbatch to those of the microbatches before it."""
        micro, ref_logps, cotangents = microbatch
        if ref_weights is not None and not coupled:
            ref_logps = completion_logps(ref_weights, micro, options).logps
        loss_and_grad = jax.value_and_grad(micro_loss, has_aux=True)
        # Entered here too, where splash attention's backward kernels are traced.
        with exact_products(options.forward.dtype):
            (_, sums), micro_grads = loss_and_grad(params, micro, ref_logps, cotangents)
        # In float32: a sum of many small gradients would be rounded away in bfloat16.
        grads = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), grads, micro_grads)
        return grads, sums

    def all_microbatches(microbatches: tuple) -> tuple[Params, Sums]:
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
        grads, sums = jax.lax.scan(accumulate, zeros, microbatches)
        return grads, jax.tree.map(lambda x: x.sum(0), sums)

    mesh = None
    if adds_up_once(options, num_microbatches=len(batch.tokens_MBT)):
        mesh = options.forward.mesh
    grads, sums = summed_over_data(all_microbatches, mesh, (batch, ref_logps, cotangents))
    if policy_logps is not None:
        sums |= loss_sums(policy_logps, ref_logps, batch, section)
    return sums, grads


def _coupled_first_pass(
    policy_weights: Params,
    ref_weights: Params | None,
    ref_logps: jax.Array | None,
    batch: Batch,
    divisors: Sums,
    options: StepOptions,
) -> tuple[CompletionLogps, jax.Array | None, CompletionLogps]:
    """The first of two passes of a loss that mixes the pairs of all microbatches (aot).

    No microbatch can compute its part of such a loss alone, so it costs one forward pass more: this
    one computes all log-probs and the gradient of the loss by them; the second carries that
    gradient back through each microbatch.

    Returns:
        (log-probs of the policy, those of the reference, gradient of the loss by the first).
    """
    policy_logps = all_completion_logps(policy_weights, batch, options)
    if ref_weights is not None:
        ref_logps = reference_logps(ref_weights, batch, options)

    def loss_of_logps(policy: CompletionLogps) -> jax.Array:
        return divided_loss(loss_sums(policy, ref_logps, batch, options.loss), divisors)

    return policy_logps, ref_logps, jax.grad(loss_of_logps)(policy_logps)


def adds_up_once(options: StepOptions, num_microbatches: int) -> bool:
    """Whether data parallelism sums gradients once a step, not in each layer of each microbatch.

    Not with one microbatch: the compiler then overlaps each layer's all-reduce with the work on the
    next layer. Not with experts: their load is measured over all sequences of a microbatch.
    """
    mesh = options.forward.mesh
    if mesh is None or mesh.shape["data"] == 1:
        return False
    return num_microbatches > 1 and not options.model.num_experts


def eval_step(params: Params, frozen: FrozenState, batch: Batch, options: StepOptions) -> Sums:
    """Sums over a batch of evaluation pairs; add those of all batches, then take `averages`."""
    policy_weights = frozen.policy_view(params)
    ref_weights = frozen.reference_view()

    def measure(
        microbatch: tuple[Batch, jax.Array | None],
    ) -> tuple[CompletionLogps, jax.Array | None, Sums]:
        """Log-probs of one microbatch, and its sums for the metrics."""
        micro, ref_logps = microbatch
        tokens = CompletionTokens.of(policy_weights, micro, options)
        kl = {}
        if ref_weights is not None:
            ref_tokens = CompletionTokens.of(ref_weights, micro, options)
            ref_logps = ref_tokens.logps(micro, options.loss).logps
            kl["kl/token_exact"] = tokens.exact_kl(ref_tokens)
        policy = tokens.logps(micro, options.loss)
        return policy, ref_logps, metric_sums(policy, ref_logps, micro, options.loss) | kl

    policy, ref_logps, sums = jax.lax.map(measure, (batch, frozen.ref_logps))
    sums = jax.tree.map(lambda x: x.sum(0), sums)
    return sums | loss_sums(policy, ref_logps, batch, options.loss)


def compile_steps(
    options: StepOptions, mesh: Mesh, state_shardings: Any, frozen_shardings: Any
) -> tuple[Callable, Callable]:
    """The jitted (train_step, eval_step) for a mesh, without their last argument `options`."""
    everywhere, by_sequence = replicated(mesh), rows(mesh, 1)

    def train(
        state: TrainState, frozen: FrozenState, batch: Batch, apply: jax.Array
    ) -> tuple[TrainState, Sums]:
        return train_step(state, frozen, batch, apply, options)

    def evaluate(params: Params, frozen: FrozenState, batch: Batch) -> Sums:
        return eval_step(params, frozen, batch, options)

    jitted_train = jax.jit(
        train,
        donate_argnums=0,
        in_shardings=(state_shardings, frozen_shardings, by_sequence, everywhere),
        out_shardings=(state_shardings, everywhere),
    )
    jitted_eval = jax.jit(
        evaluate,
        in_shardings=(state_shardings.params, frozen_shardings, by_sequence),
        out_shardings=everywhere,
    )
    return jitted_train, jitted_eval
