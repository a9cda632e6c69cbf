"""Log-probs of a batch's completions ("answers") under one model.

The losses, the cached reference and evaluation are all computed from them.

Dimension names: M microbatches, B packed sequences, T token positions, S loss tokens (tokens of
completions, gathered), P pairs of a sequence, D model, V vocabulary. Sides: 0 chosen, 1 rejected.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.data.packing import Batch
from jaxdpo.distributed.sharding import ROWS, constrain
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward_moe, head_weight
from jaxdpo.models.logprobs import (
    LMHeadOptions,
    chunk_size,
    gather_hidden,
    loss_tokens_by_shard,
    num_chunks,
    sum_by_completion,
    token_collision_logps,
    token_kl,
    token_logps,
)
from jaxdpo.models.moe import balance_loss
from jaxdpo.models.params import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Everything that is fixed when a step is compiled."""

    model: ModelConfig
    loss: LossSection
    optim: OptimSection
    forward: ForwardOptions
    total_steps: int
    chunk: int | None = None
    """Loss tokens whose logits exist at once. Default: logprobs.chunk_size."""


class CompletionLogps(NamedTuple):
    """One model's log-probs of a microbatch's completions; float32 [B, P, 2], nats."""

    logps: jax.Array
    """Sums over tokens; loss.ld_alpha weights the tokens beyond the shorter completion."""
    plain_logps: jax.Array
    """Sums over tokens without these weights."""
    collisions: jax.Array | None
    """Sums over tokens of log sum_v p(v)^2, for WPO."""
    balance: jax.Array | None
    """Mixture of experts: load balancing loss of the microbatch (moe.balance_loss); scalar."""


class CompletionTokens(NamedTuple):
    """The loss tokens of a microbatch under one model, padded to a multiple of the chunk.

    B are sequences or, under context parallelism, the shares of sequences.
    """

    head_VD: jax.Array
    hidden_BSD: jax.Array
    targets_BS: jax.Array
    sides_BS: jax.Array
    """Pair and side of each token as 2 * pair + side; -1 is padding."""
    common_BS: jax.Array
    """1 up to the length of the pair's shorter completion, 0 beyond it (loss.ld_alpha)."""
    balance: jax.Array | None
    """As in CompletionLogps."""
    chunks: jax.Array
    """Chunks that hold a loss token; int32 scalar."""
    head: LMHeadOptions

    @classmethod
    def of(cls, params: Params, micro: Batch, options: StepOptions) -> "CompletionTokens":
        """Run the model on a microbatch (arrays without their leading M)."""
        model, forward = options.model, options.forward
        sequences = (micro.tokens_MBT, micro.positions_MBT, micro.k_start_MBT, micro.k_end_MBT)
        hidden_BTD, load = forward_moe(params, model, *sequences, forward, token_mask(micro))
        hidden_BTD, loss_tokens = _by_share(hidden_BTD, micro, forward.mesh)
        slots_BS, targets_BS, common_BS, sides_BS = loss_tokens

        # The LM head takes whole chunks; the logits of one chunk at a time exist.
        num_tokens = slots_BS.shape[-1]
        chunk = options.chunk or chunk_size(model.vocab_size, num_tokens, forward.on_cpu)
        chunk = min(chunk, num_tokens)
        padding = ((0, 0), (0, -num_tokens % chunk))
        slots_BS = jnp.pad(slots_BS, padding)
        targets_BS = jnp.pad(targets_BS, padding)
        common_BS = jnp.pad(common_BS, padding)
        sides_BS = jnp.pad(sides_BS, padding, constant_values=-1)

        balance = None
        if load is not None:
            balance = balance_loss(load)
        # Gathered before the LM head: prompts and padding need no logits.
        hidden_BSD = gather_hidden(hidden_BTD, slots_BS)
        chunks = num_chunks(sides_BS, chunk)
        head = LMHeadOptions(chunk, forward.dtype, model.logit_softcap, forward.mesh)
        return cls(
            head_VD=head_weight(params),
            hidden_BSD=hidden_BSD,
            targets_BS=targets_BS,
            sides_BS=sides_BS,
            common_BS=common_BS,
            balance=balance,
            chunks=chunks,
            head=head,
        )

    def logps(self, micro: Batch, section: LossSection) -> CompletionLogps:
        """The log-probs of the microbatch's completions."""
        B, P = micro.weights_MBP.shape

        def by_side(values_BS: jax.Array) -> jax.Array:
            sums = sum_by_completion(values_BS, self.sides_BS, P)
            if sums.shape[0] == B:
                return sums
            # Context parallelism made a sequence of each share: add them up again.
            return sums.reshape(B, -1, P, 2).sum(1)

        logps_BS: Any = token_logps(
            self.hidden_BSD, self.head_VD, self.targets_BS, self.chunks, self.head
        )
        plain_logps = logps = by_side(logps_BS)
        if section.ld_alpha is not None:
            logps = by_side(logps_BS * jnp.where(self.common_BS > 0, 1.0, section.ld_alpha))
        collisions = None
        if section.wpo:
            # WPO's weights are constants: stopped here, they cost no backward pass.
            hidden, weight = jax.lax.stop_gradient((self.hidden_BSD, self.head_VD))
            collisions = by_side(token_collision_logps(hidden, weight, self.chunks, self.head))
        return CompletionLogps(logps, plain_logps, collisions, self.balance)

    def exact_kl(self, reference: "CompletionTokens") -> jax.Array:
        """Sum over all loss tokens of KL(self || reference), over the full vocabulary; nats."""
        kl_BS = token_kl(
            self.hidden_BSD,
            self.head_VD,
            reference.hidden_BSD,
            reference.head_VD,
            self.chunks,
            self.head,
        )
        return jnp.sum(jnp.where(self.sides_BS >= 0, kl_BS, 0.0))


def _by_share(
    hidden_BTD: jax.Array, micro: Batch, mesh: Mesh | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Hidden states and loss tokens (slots, targets, common, sides) by context parallelism's share.

    Each device's share of a sequence becomes a sequence of its own, so that the LM head runs where
    the hidden states are and none of them are sent.
    """
    tokens = (micro.slots_MBS, micro.targets_MBS, micro.common_MBS, micro.sides_MBS)
    shares = 1 if mesh is None else mesh.shape["context"]
    if shares == 1:
        return hidden_BTD, tokens
    B, T, D = hidden_BTD.shape
    hidden_BTD = hidden_BTD.reshape(B * shares, T // shares, D)
    hidden_BTD = constrain(hidden_BTD, mesh, (*ROWS, "context"))
    # For each share, its own loss tokens first (own_BS).
    order_BS, own_BS = loss_tokens_by_shard(
        micro.slots_MBS, micro.sides_MBS, T, micro.weights_MBP.shape[-1], shares
    )
    slots_BS, targets_BS, common_BS, sides_BS = (
        jnp.take_along_axis(jnp.repeat(x, shares, axis=0), order_BS, axis=1) for x in tokens
    )
    # The tokens of other shares become padding.
    slots_BS = jnp.where(own_BS, slots_BS % (T // shares), 0)
    sides_BS = jnp.where(own_BS, sides_BS, -1)
    return hidden_BTD, (slots_BS, targets_BS, common_BS, sides_BS)


def completion_logps(params: Params, micro: Batch, options: StepOptions) -> CompletionLogps:
    """The completions' log-probs of one microbatch (arrays without their leading M)."""
    return CompletionTokens.of(params, micro, options).logps(micro, options.loss)


def all_completion_logps(params: Params, batch: Batch, options: StepOptions) -> CompletionLogps:
    """The completions' log-probs of every microbatch: [M, B, P, 2]."""
    return jax.lax.map(lambda micro: completion_logps(params, micro, options), batch)


def reference_logps(params: Params, batch: Batch, options: StepOptions) -> jax.Array:
    """All that the losses need of a reference: float32 [M, B, P, 2], nats."""
    return jax.lax.map(lambda micro: completion_logps(params, micro, options).logps, batch)


def token_mask(batch: Batch) -> jax.Array:
    """Which positions hold a token and not padding; bool [..., B, T].

    A sequence ends with the last token of a completion, one position behind that which predicts it.
    """
    ends = jnp.where(batch.sides_MBS >= 0, batch.slots_MBS + 1, -1)
    last = jnp.max(ends, axis=-1, keepdims=True)
    shape = batch.tokens_MBT.shape
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) <= last
