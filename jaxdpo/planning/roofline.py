"""The least time that a step can take: a roofline (Williams et al. 2009) with the links added.

Matmuls, memory traffic and communication run at the manufacturers' peaks and overlap wherever they
can. No program is faster, and real ones are slower.
"""

import dataclasses
import math

import numpy as np

from jaxdpo.models.flops import step_flops
from jaxdpo.planning.batch_shapes import BatchShapes
from jaxdpo.planning.machines import Topology
from jaxdpo.planning.memory import (
    FLOAT32,
    MOMENTS,
    REFERENCE,
    local_bytes,
    local_numbers,
    offloaded_state,
)
from jaxdpo.training.program import Program
from jaxdpo.training.step import adds_up_once

RING = 0.5
"""Share of a TPU's links that one ring uses: those along one dimension of a 2D torus (on a 3D torus
it is a third, which this ignores)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step in seconds, with the bytes and FLOPs behind them."""

    useful: float
    """Model FLOPs of all devices: without recomputation and padding (models/flops.py)."""
    matmul: float
    """Seconds of matrix multiplications, with recomputation and padding."""
    memory: float
    """Seconds of device memory traffic."""
    sent: dict[str, float]
    """Bytes that a device sends, by mesh axis. `slices` is the part of data and fsdp that crosses
    slices or hosts."""
    sending: dict[str, float]
    """Seconds of sending them, by mesh axis."""
    fetched: dict[str, float]
    """Bytes that a device fetches from host memory, by part; moments are written back too."""
    fetching: dict[str, float]
    """Seconds of fetching them, by part."""
    peak: float
    """FLOP/s of all devices."""

    @property
    def communication(self) -> float:
        """Seconds of sending along all axes."""
        return sum(self.sending.values())

    @property
    def exposed(self) -> float:
        """Seconds of communication that computation has to wait for.

        All-reduces of activations (tensor and context parallelism). Weights and gradients travel
        while other layers are computed.
        """
        return sum(self.sending.get(axis, 0.0) for axis in ("context", "tensor"))

    @property
    def exposed_fetching(self) -> float:
        """Seconds of fetching moments: the update is last, when nothing is left to compute."""
        return self.fetching.get(MOMENTS, 0.0)

    @property
    def seconds(self) -> float:
        """The step at best."""
        overlapped = max(self.communication - self.exposed, self.fetching.get(REFERENCE, 0.0))
        return max(self.matmul, self.memory, overlapped) + self.exposed + self.exposed_fetching

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization at best."""
        return self.useful / (self.seconds * self.peak)


def roofline(program: Program, shapes: BatchShapes, topology: Topology) -> StepTime:
    """The time of a typical step."""
    chip = topology.chip
    forward = _ForwardWork.of(program, shapes)
    full_training = program.weights.lora is None
    live = _has_live_reference(program)
    recompute = _recomputes(program)
    # In units of a forward pass: 1 forward, 1 for the gradients of the activations, 1 for those of
    # the weights (full training), 1 of a reference, 1 that remat=full repeats. The LM head is
    # always recomputed, chunk by chunk. Attention's backward pass takes 2.5 forward passes:
    # recomputed scores and four more matmuls of the same size.
    layer_passes = 2 + recompute + full_training + live
    head_passes = 3 + full_training + live
    attention_passes = 3.5 + live
    flops = (
        layer_passes * forward.layers
        + head_passes * forward.head
        + attention_passes * forward.attention
    )
    activation_traffic = (2 + recompute + live) * forward.activations
    sent = _sent(program, shapes, topology)
    sending = {}
    for axis, size in sent.items():
        sending[axis] = size / _bandwidth(axis, program, topology)
    fetched = _fetched(program, shapes)
    return StepTime(
        useful=step_flops(program.model, shapes.lengths, full=full_training, live_reference=live),
        matmul=flops / chip.flops,
        memory=(_weight_traffic(program, shapes) + activation_traffic) / chip.bandwidth,
        sent=sent,
        sending=sending,
        fetched=fetched,
        fetching={name: size / chip.host for name, size in fetched.items()},
        peak=chip.flops * topology.num_chips,
    )


def _has_live_reference(program: Program) -> bool:
    """Whether the reference runs in the step."""
    return program.weights.reference_kind in ("frozen", "adapter_off")


def _recomputes(program: Program) -> bool:
    """Whether the backward pass repeats the forward pass of the layers."""
    return program.options.forward.remat == "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ForwardWork:
    """One forward pass over a step's batch on one device."""

    layers: float
    """FLOPs of the layers' weights."""
    head: float
    """FLOPs of the LM head."""
    attention: float
    """FLOPs of attention scores and their weighted sums of values."""
    activations: float
    """Bytes of activations that are read and written."""

    @classmethod
    def of(cls, program: Program, shapes: BatchShapes) -> "_ForwardWork":
        model, mesh = program.model, program.mesh.shape
        tensor, context = mesh["tensor"], mesh["context"]
        experts = max(1, model.experts_per_token)
        positions = shapes.microbatches * shapes.typical / context
        prompt, chosen, rejected = shapes.lengths.astype(np.float64).T
        loss_tokens = (chosen + rejected).sum() / (shapes.rows * context)
        # Keys that the queries of a pair attend to: causal within prompt and completions, and the
        # completions attend to the full prompt.
        keys = (prompt**2 + chosen**2 + rejected**2) / 2 + prompt * (chosen + rejected)
        keys_per_device = keys.sum() / (shapes.rows * context)
        mlp = (3 if model.gated else 2) * model.hidden_size * model.mlp_size * experts
        attention = 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
        heads = model.num_heads * model.head_dim / tensor
        F = model.mlp_size * experts / tensor
        # float32 arrays that a layer reads or writes: about six of the model's width, and four each
        # of the attention's and the MLP's.
        moved = FLOAT32 * (6 * model.hidden_size + 4 * heads + 4 * F)
        return cls(
            layers=2 * model.num_layers * (attention + mlp) / tensor * positions,
            head=2 * model.vocab_size * model.hidden_size / tensor * loss_tokens,
            attention=4 * model.num_layers * heads * keys_per_device,
            activations=model.num_layers * positions * moved,
        )


def _weight_traffic(program: Program, shapes: BatchShapes) -> float:
    """Bytes of weights, gradients and moments that a device reads and writes in a step."""
    state = program.abstract_state(with_reference=False)
    trained = local_numbers(state["params"])
    update = 2 * (local_bytes(state["params"]) + local_bytes(state["opt"])) + FLOAT32 * trained
    # Each pass over the weights reads them in the compute dtype; gradients are written, and read
    # and written once more where they accumulate.
    passes = 5 if _has_live_reference(program) else 4
    weights = passes * _gathered_weights(program) * program.options.forward.dtype.itemsize
    return update + shapes.microbatches * (weights + 3 * FLOAT32 * trained)


def _gathered_weights(program: Program) -> float:
    """Weights that a device multiplies with, after the all-gather along fsdp."""
    mesh = program.mesh.shape
    experts = mesh["expert"] if program.model.num_experts else 1
    return program.weights.num_all() / (mesh["tensor"] * experts)


def _fetched(program: Program, shapes: BatchShapes) -> dict[str, float]:
    """Bytes that a device fetches from host memory in a step, by part.

    The reference's layers are fetched for each microbatch, everything else once.
    """
    state = program.abstract_state(with_reference=False)
    offloaded = offloaded_state(state, program.abstract_fixed(shapes.batch), program)
    fetched = {name: local_bytes(tree) for name, tree in offloaded.items()}
    if REFERENCE in offloaded:
        layers = local_bytes(offloaded[REFERENCE]["layers"])
        fetched[REFERENCE] += (shapes.microbatches - 1) * layers
    return fetched


def _bandwidth(axis: str, program: Program, topology: Topology) -> float:
    """Bytes/s that a device sends along a mesh axis."""
    chip, mesh = topology.chip, program.mesh.shape
    if axis == "slices":
        link = chip.network
    elif axis == "context":
        link = topology.link(mesh["tensor"] * mesh["context"])
    elif axis == "tensor":
        link = topology.link(mesh["tensor"])
    else:
        # What data and fsdp send to other slices or hosts is counted as "slices".
        link = chip.link
    if chip.platform == "tpu" and link == chip.link:
        return link * RING
    return link


def _num_linked(size: int, inside: int, topology: Topology) -> int:
    """Of `size` neighbours along an axis, each of `inside` devices, those that links connect."""
    return math.gcd(size, max(1, topology.num_linked // inside))


def _sent(program: Program, shapes: BatchShapes, topology: Topology) -> dict[str, float]:
    """Bytes that a device sends in a step, by mesh axis, with ring algorithms.

    What crosses slices (or GPU hosts) goes through rings within each slice, and a ring between
    slices over the parts that are left.
    """
    model, mesh = program.model, program.mesh.shape
    itemsize = program.options.forward.dtype.itemsize
    data, tensor, context = mesh["data"], mesh["tensor"], mesh["context"]
    live, recompute = _has_live_reference(program), _recomputes(program)
    shards = mesh["fsdp"] * mesh["expert"]
    inside = context * tensor
    linked_shards = _num_linked(shards, inside, topology)
    linked_replicas = _num_linked(data, inside * shards, topology)

    # fsdp: all-gathers of the weights (forward, backward, reference), and a reduce-scatter of
    # float32 gradients.
    trained = program.weights.num_trained() / tensor
    gathered = (2 + live) * itemsize * _gathered_weights(program) + FLOAT32 * trained
    # data: an all-reduce of the gradients, once a step or once a microbatch.
    all_reduces = shapes.microbatches
    if adds_up_once(program.options, shapes.microbatches):
        all_reduces = 1
    reduced = 2 * FLOAT32 * trained / shards * all_reduces / shapes.microbatches
    # context: all-gathers of keys and values in each pass, and a reduce-scatter of their gradients.
    keys_values = shapes.typical * 2 * model.num_kv_heads * model.head_dim / tensor
    keys_values *= model.num_layers
    # tensor: two all-reduces of float32 activations a layer (after attention and MLP) in each pass.
    positions = shapes.typical / context
    per_microbatch = {
        "fsdp": _ring_share(linked_shards) * gathered,
        "data": _ring_share(linked_replicas) * reduced,
        "slices": _ring_share(shards // linked_shards) * gathered / linked_shards
        + _ring_share(data // linked_replicas) * reduced / linked_replicas,
        "context": _ring_share(context)
        * keys_values
        * ((1 + recompute + live) * itemsize + FLOAT32),
        "tensor": 2
        * _ring_share(tensor)
        * FLOAT32
        * positions
        * model.hidden_size
        * model.num_layers
        * 2
        * (2 + recompute + live),
    }
    sent = {}
    for axis, size in per_microbatch.items():
        if size:
            sent[axis] = shapes.microbatches * size
    return sent


def _ring_share(size: int) -> float:
    """The share of an array that each of `size` devices sends in a ring all-gather of it."""
    return (size - 1) / size
