"""Log-probs of a batch's answers under one model: what the losses, the cached reference and evaluation are made from.

Dimension names: M microbatches, B rows, T slots, S scored tokens, P pair places of a row.
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
    """Scored tokens whose logits exist at once. Default: logprobs.chunk_size."""


class CompletionLogps(NamedTuple):
    """One model's log-probs of a microbatch's answers; float32 [B, P, 2] (chosen, rejected), nats."""

    logps: jax.Array
    """Sums over tokens; with loss.ld_alpha, tokens beyond the shorter answer count that much."""
    plain_logps: jax.Array
    """Sums in which every token counts fully."""
    collisions: jax.Array | None
    """Sums of log sum_v p(v)^2, for WPO."""
    balance: jax.Array | None
    """Mixtures of experts: how unevenly the microbatch's tokens were spread (moe.balance_loss); scalar."""


class CompletionTokens(NamedTuple):
    """The scored tokens of a microbatch under one model, padded to whole chunks.

    B are rows or, where devices share the slots of a row, the shares.
    """

    head_VD: jax.Array
    hidden_BSD: jax.Array
    targets_BS: jax.Array
    sides_BS: jax.Array
    common_BS: jax.Array
    balance: jax.Array | None
    """As in CompletionLogps."""
    chunks: jax.Array
    """Chunks to compute."""
    head: LMHeadOptions

    @classmethod
    def of(cls, params: Params, micro: Batch, options: StepOptions) -> "CompletionTokens":
        """Run the model on a microbatch (arrays without their leading M)."""
        model, forward = options.model, options.forward
        slots = (micro.tokens_MBT, micro.positions_MBT, micro.k_start_MBT, micro.k_end_MBT)
        hidden_BTD, load = forward_moe(params, model, *slots, forward, real_slots(micro))
        hidden_BTD, tokens = _by_share(hidden_BTD, micro, forward.mesh)
        num_tokens = tokens[0].shape[-1]
        chunk = min(
            options.chunk or chunk_size(model.vocab_size, num_tokens, forward.on_cpu), num_tokens
        )
        behind = ((0, 0), (0, -num_tokens % chunk))
        slots_BS, targets_BS, common_BS = (jnp.pad(x, behind) for x in tokens[:3])
        sides_BS = jnp.pad(tokens[3], behind, constant_values=-1)
        balance = None if load is None else balance_loss(load)
        head = LMHeadOptions(chunk, forward.dtype, model.logit_softcap, forward.mesh)
        hidden_BSD, chunks = gather_hidden(hidden_BTD, slots_BS), num_chunks(sides_BS, chunk)
        return cls(
            head_weight(params), hidden_BSD, targets_BS, sides_BS, common_BS, balance, chunks, head
        )

    def answers(self, micro: Batch, section: LossSection) -> CompletionLogps:
        """The log-probs of the microbatch's answers."""
        num_rows, num_places = micro.weights_MBP.shape

        def by_side(values_BS: jax.Array) -> jax.Array:
            sums = sum_by_completion(values_BS, self.sides_BS, num_places)
            return (
                sums
                if sums.shape[0] == num_rows
                else sums.reshape(num_rows, -1, num_places, 2).sum(1)
            )

        logps_BS: Any = token_logps(
            self.hidden_BSD, self.head_VD, self.targets_BS, self.chunks, self.head
        )
        plain_logps = logps = by_side(logps_BS)
        if section.ld_alpha is not None:
            logps = by_side(logps_BS * jnp.where(self.common_BS > 0, 1.0, section.ld_alpha))
        collisions = None
        if section.wpo:
            hidden, weight = jax.lax.stop_gradient((self.hidden_BSD, self.head_VD))
            collisions = by_side(token_collision_logps(hidden, weight, self.chunks, self.head))
        return CompletionLogps(logps, plain_logps, collisions, self.balance)

    def exact_kl(self, reference: "CompletionTokens") -> jax.Array:
        """Sum over all answer tokens of the exact KL(self || reference) of their distributions, nats."""
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
    """Hidden states and scored tokens (slots, targets, common, sides), each device's share of a row as a row of its own."""
    tokens = (micro.slots_MBS, micro.targets_MBS, micro.common_MBS, micro.sides_MBS)
    shares = 1 if mesh is None else mesh.shape["context"]
    if shares == 1:
        return hidden_BTD, tokens
    B, T, D = hidden_BTD.shape
    hidden_BTD = constrain(hidden_BTD.reshape(B * shares, T // shares, D), mesh, (*ROWS, "context"))
    order_BS, own_BS = loss_tokens_by_shard(
        micro.slots_MBS, micro.sides_MBS, T, micro.weights_MBP.shape[-1], shares
    )
    slots_BS, targets_BS, common_BS, sides_BS = (
        jnp.take_along_axis(jnp.repeat(x, shares, axis=0), order_BS, axis=1) for x in tokens
    )
    return hidden_BTD, (
        jnp.where(own_BS, slots_BS % (T // shares), 0),
        targets_BS,
        common_BS,
        jnp.where(own_BS, sides_BS, -1),
    )


def answers(params: Params, micro: Batch, options: StepOptions) -> CompletionLogps:
    """The answers' log-probs under one model, for one microbatch (arrays without their leading M)."""
    return CompletionTokens.of(params, micro, options).answers(micro, options.loss)


def all_answers(params: Params, batch: Batch, options: StepOptions) -> CompletionLogps:
    """The same for every microbatch: [M, B, P, 2]."""
    return jax.lax.map(lambda micro: answers(params, micro, options), batch)


def reference_logps(params: Params, batch: Batch, options: StepOptions) -> jax.Array:
    """All that the losses see of a reference: float32 [M, B, P, 2]."""
    return jax.lax.map(lambda micro: answers(params, micro, options).logps, batch)


def real_slots(batch: Batch) -> jax.Array:
    """Which slots hold a token; bool [..., B, T]. A row's last token ends an answer, one slot behind the one that predicts it."""
    last = jnp.max(jnp.where(batch.sides_MBS >= 0, batch.slots_MBS + 1, -1), axis=-1, keepdims=True)
    return (
        jax.lax.broadcasted_iota(jnp.int32, batch.tokens_MBT.shape, batch.tokens_MBT.ndim - 1)
        <= last
    )
