"""How much memory of a device a step takes, by part, without compiling it.

State is counted exactly, from shapes and shardings. What a step makes and drops again is modelled as the largest of its phases: the
LM head at work, the backward pass of the layers, and the update. docs/plan.md says how far compilers are from it.

Letters in the arithmetic: T slots of a row on one device, D model, F mlp, N query heads, K key-value heads, H head dim, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax

from jaxdpo.models.logprobs import chunk_size
from jaxdpo.planning.batch_shapes import Rows
from jaxdpo.training.program import Program
from jaxdpo.training.state import FrozenState

FLOAT32 = 4
REFERENCE, MOMENTS = "reference", "optimizer moments"
"""Parts that may wait on the hosts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    held: dict[str, float]
    """What is there from step to step, by part."""
    waiting: dict[str, float]
    """What waits in the memory of its host, by part."""
    phases: dict[str, dict[str, float]]
    """What is there besides at the step's worst moments, by part."""

    @property
    def worst(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """All parts at the worst moment."""
        return {
            name: size for name, size in {**self.held, **self.phases[self.worst]}.items() if size
        }

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.parts.values())


def estimate(program: Program, rows: Rows) -> Memory:
    """The memory of a step on its longest rows."""
    sizes = _Sizes.of(program, rows)
    state, fixed = program.abstract_state(with_reference=False), program.abstract_fixed(rows.batch)
    apart = waiting_parts(state, fixed, program)
    layers_apart = (
        local_bytes(apart[REFERENCE]["layers"]) if REFERENCE in apart else 0.0
    )  # its other parts come for the whole step
    held = {
        "parameters": local_bytes(state["params"]),
        "base under the adapter": local_bytes(fixed.base),
        REFERENCE: local_bytes(fixed.reference) - layers_apart,
        MOMENTS: 0.0 if MOMENTS in apart else local_bytes(state["opt"]),
        "batch": sum(math.prod(leaf.shape) * FLOAT32 for leaf in jax.tree.leaves(rows.batch))
        / rows.rows,
    }
    # Microbatches add up in a copy of their own.
    gradients = FLOAT32 * local_bytes(state["params"], sizes_only=True)
    sums = gradients if rows.microbatches > 1 else 0.0
    saved = sizes.layers * sizes.saved
    moving = _moments_on_their_way(apart[MOMENTS], sizes.layers) if MOMENTS in apart else 0.0
    return Memory(
        held=held,
        waiting={name: local_bytes(tree) for name, tree in apart.items()},
        phases={
            "LM head": {
                "gradients": sums,
                "activations": saved + sizes.hidden,
                "LM head": sizes.head,
                "logits of a chunk": sizes.logits,
            },
            "backward": {
                "gradients": gradients + sums,
                "activations": saved,
                "a layer at work": sizes.layer + sizes.gathered,
            },
            "update": {"gradients": gradients + sums, "moments on their way": moving},
        },
    )


def waiting_parts(state: dict[str, Any], fixed: FrozenState, program: Program) -> dict[str, Any]:
    """What is in the hosts' memory, by part: moments and the reference.

    A CPU has no memory but that of its host, so nothing is elsewhere.
    """
    what = [] if program.options.forward.on_cpu else program.config.train.offload
    reference = {REFERENCE: fixed.reference} if "reference" in what else {}
    return reference | (
        {MOMENTS: [state["opt"]["mu"], state["opt"]["nu"]]} if "moments" in what else {}
    )


def _moments_on_their_way(moments: list[Any], num_layers: int) -> float:
    """Bytes of moments that are on the device at once: of one layer, or of one part beside the layers."""
    return max(
        sum(local_bytes(tree[name]) for tree in moments) / (num_layers if name == "layers" else 1)
        for name in moments[0]
    )


def local_bytes(tree: Any, *, sizes_only: bool = False) -> float:
    """Bytes of one device's share of a tree of placed shapes; or how many numbers that is."""
    leaves = jax.tree.leaves(tree)
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape))
            * (1 if sizes_only else leaf.dtype.itemsize)
            for leaf in leaves
        )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Bytes of the temporary things of one device."""

    layers: int
    saved: float
    """What the forward pass keeps of a layer for the backward pass."""
    layer: float
    """What a layer's backward pass holds at once."""
    gathered: float
    """A layer's weights come together, and the gradients of them before they are spread."""
    hidden: float
    """Hidden states that predict scored tokens, and their gradients."""
    head: float
    """The LM head come together, and its gradient before it is spread."""
    logits: float

    @classmethod
    def of(cls, program: Program, rows: Rows) -> "_Sizes":
        model, mesh, forward = program.model, program.mesh.shape, program.options.forward
        item, tensor = forward.dtype.itemsize, mesh["tensor"]
        T, S, D, H = (
            rows.longest // mesh["context"],
            rows.longest // mesh["context"],
            model.hidden_size,
            model.head_dim,
        )
        q, kv = model.num_heads * H / tensor, 2 * model.num_kv_heads * H / tensor
        F = model.mlp_size / tensor * max(1, model.experts_per_token)
        V = model.vocab_size / tensor
        attention_item = item if forward.attention == "splash" else FLOAT32
        kept = attention_item * q + FLOAT32 * model.num_heads / tensor
        products = FLOAT32 * (q + kv + 2 * D + (2 if model.gated else 1) * F)
        saved = {
            "full": kept,
            "dots": kept + products,
            "none": kept + products + item * (2 * D + q + kv + F) + FLOAT32 * (5 * D + 3 * F),
        }
        layer_weights = _layer_weights(program)
        spread = mesh["fsdp"] * mesh["expert"] > 1
        chunk = chunk_size(model.vocab_size, S, forward.on_cpu)
        full = program.weights.lora is None
        on_tpu = program.mesh.devices.flat[0].platform == "tpu"
        copies = (
            1 if model.tied_head else 3 if on_tpu else 2
        )  # of the head's gradient, as compiled programs have them
        again = forward.remat == "full"  # then the products are there a second time
        work = (
            (11 if again else 4) * D
            + 2 * (q + kv)
            + (5 if again else 3) * F
            + (0 if full else products / FLOAT32)
        )
        return cls(
            layers=model.num_layers,
            saved=T * (FLOAT32 * D + saved[forward.remat]),
            layer=T * (FLOAT32 * work + item * (2 * D + q + kv + F)),
            gathered=layer_weights / tensor * ((item if spread else 0) + (FLOAT32 if full else 0)),
            hidden=S * D * (2 * FLOAT32 + item),
            head=V
            * D
            * (
                (item if spread or (full and item != FLOAT32) else 0)
                + (copies * FLOAT32 if full else 0)
            ),
            logits=chunk * V * (4 * FLOAT32 + item),
        )


def _layer_weights(program: Program) -> float:
    """Weights of one layer over all devices of fsdp and tensor, those of a device's own experts alone."""
    model, experts = (
        program.model,
        max(1, program.model.num_experts // program.mesh.shape["expert"]),
    )
    attention = 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
    return attention + experts * (3 if model.gated else 2) * model.hidden_size * model.mlp_size
