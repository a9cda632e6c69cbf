"""Estimate of the memory that a step takes on one device, by part, without compiling it.

State is counted exactly, from shapes and shardings. Temporary buffers are modelled as the largest
of three phases: the LM head, the backward pass of the layers, and the optimizer update. How far the
estimate is from the compilers' figures is in docs/plan.md; tests/planning/test_memory.py keeps it
within 10% on CPU meshes.

Letters: T token positions of a packed sequence on one device, D model width, F MLP width, N query
heads, K key-value heads, H head dim, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax

from jaxdpo.models.logprobs import chunk_size
from jaxdpo.planning.batch_shapes import BatchShapes
from jaxdpo.training.program import Program
from jaxdpo.training.state import FrozenState

FLOAT32 = 4
"""Bytes."""
REFERENCE, MOMENTS = "reference", "optimizer moments"
"""Names of the parts that train.offload can move to host memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    persistent: dict[str, float]
    """What stays in device memory from step to step, by part."""
    offloaded: dict[str, float]
    """What is in host memory instead, by part."""
    phases: dict[str, dict[str, float]]
    """Temporary buffers in each phase of a step, by part."""

    @property
    def worst(self) -> str:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """All parts in the worst phase."""
        parts = self.persistent | self.phases[self.worst]
        return {name: size for name, size in parts.items() if size}

    @property
    def peak(self) -> float:
        """Bytes in the worst phase."""
        return sum(self.parts.values())


def estimate(program: Program, shapes: BatchShapes) -> Memory:
    """The memory of a step on the longest packed sequences."""
    buffers = _Buffers.of(program, shapes)
    state = program.abstract_state(with_reference=False)
    fixed = program.abstract_fixed(shapes.batch)
    offloaded = offloaded_state(state, fixed, program)
    reference = local_bytes(fixed.reference)
    if REFERENCE in offloaded:
        # Its layers are fetched one by one; embedding and LM head stay for the whole step.
        reference -= local_bytes(offloaded[REFERENCE]["layers"])
    moments, moments_in_transit = local_bytes(state["opt"]), 0.0
    if MOMENTS in offloaded:
        moments = 0.0
        moments_in_transit = _moments_in_transit(offloaded[MOMENTS], buffers.layers)
    batch = sum(math.prod(leaf.shape) * FLOAT32 for leaf in jax.tree.leaves(shapes.batch))
    gradients = FLOAT32 * local_numbers(state["params"])
    # With gradient accumulation, the sum over microbatches is a second copy.
    accumulated = gradients if shapes.microbatches > 1 else 0.0
    activations = buffers.layers * buffers.saved
    return Memory(
        persistent={
            "parameters": local_bytes(state["params"]),
            "base under the adapter": local_bytes(fixed.base),
            REFERENCE: reference,
            MOMENTS: moments,
            "batch": batch / shapes.rows,
        },
        offloaded={name: local_bytes(tree) for name, tree in offloaded.items()},
        phases={
            "LM head": {
                "gradients": accumulated,
                "activations": activations + buffers.hidden,
                "LM head": buffers.head,
                "logits of a chunk": buffers.logits,
            },
            "backward": {
                "gradients": gradients + accumulated,
                "activations": activations,
                "backward of a layer": buffers.layer + buffers.gathered,
            },
            "update": {
                "gradients": gradients + accumulated,
                "moments in transit": moments_in_transit,
            },
        },
    )


def offloaded_state(state: dict[str, Any], fixed: FrozenState, program: Program) -> dict[str, Any]:
    """The trees that are in host memory (train.offload), by part.

    Empty on a CPU, where device memory is host memory.
    """
    offload = program.config.train.offload
    found: dict[str, Any] = {}
    if program.options.forward.on_cpu:
        return found
    if "reference" in offload:
        found[REFERENCE] = fixed.reference
    if "moments" in offload:
        found[MOMENTS] = [state["opt"]["mu"], state["opt"]["nu"]]
    return found


def _moments_in_transit(moments: list[Any], num_layers: int) -> float:
    """Bytes of offloaded moments on the device at once: those of one layer, or of one other weight.

    The update runs layer by layer over the stacked weights.
    """
    sizes = []
    for name in moments[0]:
        size = sum(local_bytes(tree[name]) for tree in moments)
        if name == "layers":
            size /= num_layers
        sizes.append(size)
    return max(sizes)


def local_bytes(tree: Any) -> float:
    """Bytes of one device's shards of a tree of sharded shapes."""
    leaves = jax.tree.leaves(tree)
    return float(sum(_shard_size(leaf) * leaf.dtype.itemsize for leaf in leaves))


def local_numbers(tree: Any) -> float:
    """Elements of one device's shards of a tree of sharded shapes."""
    return float(sum(_shard_size(leaf) for leaf in jax.tree.leaves(tree)))


def _shard_size(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Buffers:
    """Bytes of the temporary buffers of one device."""

    layers: int
    saved: float
    """Activations of a layer that the forward pass saves for the backward pass."""
    layer: float
    """What the backward pass of a layer needs at once."""
    gathered: float
    """All-gathered weights of a layer, and their gradients before the reduce-scatter."""
    hidden: float
    """Hidden states of the loss tokens, and their gradients."""
    head: float
    """The all-gathered LM head, and its gradient before the reduce-scatter."""
    logits: float
    """Logits of one chunk, with softmax and gradient."""

    @classmethod
    def of(cls, program: Program, shapes: BatchShapes) -> "_Buffers":
        model, mesh, forward = program.model, program.mesh.shape, program.options.forward
        itemsize, tensor = forward.dtype.itemsize, mesh["tensor"]
        T, D = shapes.longest // mesh["context"], model.hidden_size
        q = model.num_heads * model.head_dim / tensor
        kv = 2 * model.num_kv_heads * model.head_dim / tensor
        F = model.mlp_size / tensor * max(1, model.experts_per_token)
        saved, matmuls = _saved_activations(program, q, kv, F)
        full_training = program.weights.lora is None
        recompute = forward.remat == "full"
        # Counts of [T, width] arrays that are alive at once, fitted to compiled programs. When the
        # layer is recomputed, the results of its matmuls exist a second time.
        work = (
            (11 if recompute else 4) * D
            + 2 * (q + kv)
            + (5 if recompute else 3) * F
            + (0 if full_training else matmuls / FLOAT32)
        )
        sharded = mesh["fsdp"] * mesh["expert"] > 1
        gathered = itemsize if sharded else 0
        if full_training:
            gathered += FLOAT32
        return cls(
            layers=model.num_layers,
            saved=T * (FLOAT32 * D + saved),
            layer=T * (FLOAT32 * work + itemsize * (2 * D + q + kv + F)),
            gathered=_layer_weights(program) / tensor * gathered,
            hidden=T * D * (2 * FLOAT32 + itemsize),
            head=model.vocab_size / tensor * D * _head_bytes(program, sharded),
            logits=chunk_size(model.vocab_size, T, forward.on_cpu)
            * (model.vocab_size / tensor)
            * (4 * FLOAT32 + itemsize),
        )


def _saved_activations(program: Program, q: float, kv: float, F: float) -> tuple[float, float]:
    """Bytes per token position that a layer saves beside its input; those of its matmuls alone.

    Args:
        q: width of the queries on one device.
        kv: width of keys and values together.
        F: width of the MLP.
    """
    model, forward = program.model, program.options.forward
    D, itemsize = model.hidden_size, forward.dtype.itemsize
    # The attention output and its log-sum-exp are always saved. Splash attention writes the output
    # in the compute dtype, the other implementations in float32.
    attention_itemsize = itemsize if forward.attention == "splash" else FLOAT32
    attention = attention_itemsize * q + FLOAT32 * model.num_heads / program.mesh.shape["tensor"]
    matmuls = FLOAT32 * (q + kv + 2 * D + (2 if model.gated else 1) * F)
    if forward.remat == "full":
        return attention, matmuls
    if forward.remat == "dots":
        return attention + matmuls, matmuls
    rest = itemsize * (2 * D + q + kv + F) + FLOAT32 * (5 * D + 3 * F)
    return attention + matmuls + rest, matmuls


def _head_bytes(program: Program, sharded: bool) -> int:
    """Bytes per weight of the LM head while it is computed with."""
    itemsize = program.options.forward.dtype.itemsize
    if program.weights.lora is not None:
        return itemsize if sharded else 0
    # Float32 copies of the gradient, as counted in compiled programs.
    if program.model.tied_head:
        copies = 1
    elif program.mesh.devices.flat[0].platform == "tpu":
        copies = 3
    else:
        copies = 2
    cast = itemsize if sharded or itemsize != FLOAT32 else 0
    return cast + copies * FLOAT32


def _layer_weights(program: Program) -> float:
    """Weights of one layer before fsdp and tensor split them; of experts, those of one device."""
    model = program.model
    experts = max(1, model.num_experts // program.mesh.shape["expert"])
    attention = 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
    return attention + experts * (3 if model.gated else 2) * model.hidden_size * model.mlp_size
