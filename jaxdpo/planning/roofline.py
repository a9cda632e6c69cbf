"""How long a step takes at best: the roofline (Williams et al. 2009) of matrix products, memory and the links between devices.

What can go on at once is taken to do so, and everything runs at the makers' peaks: no program is faster, and real ones are slower.
"""

import dataclasses
import math

import numpy as np

from jaxdpo.models.flops import step_flops
from jaxdpo.planning.batch_shapes import Rows
from jaxdpo.planning.machines import Topology
from jaxdpo.planning.memory import FLOAT32, MOMENTS, REFERENCE, local_bytes, waiting_parts
from jaxdpo.training.program import Program
from jaxdpo.training.step import adds_up_once

RING = 0.5
"""Share of a TPU's links that a ring of its neighbours uses: those along one of the torus's dimensions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """A step, in seconds and FLOPs."""

    useful: float
    """FLOPs of all devices that do not depend on how they are computed (flops.py)."""
    products: float
    """Seconds of matrix products, with what is computed again and what is padding."""
    memory: float
    """Seconds of reading and writing memory."""
    sent: dict[str, float]
    """Bytes that a device sends, by mesh axis; `slices` is what `data` and `fsdp` send between slices or hosts."""
    sending: dict[str, float]
    """Seconds that takes, likewise."""
    waited: dict[str, float]
    """Bytes that come from the memory of the device's host, and for moments as many that go back, by part."""
    bringing: dict[str, float]
    """Seconds that takes, likewise."""
    peak: float
    """FLOPs a second of all devices."""

    @property
    def links(self) -> float:
        """Seconds of sending."""
        return sum(self.sending.values())

    @property
    def exposed(self) -> float:
        """Seconds of sending that products wait for: sums of activations. Weights and gradients travel while others are computed."""
        return sum(self.sending.get(axis, 0.0) for axis in ("context", "tensor"))

    @property
    def behind(self) -> float:
        """Seconds in which moments come from the host and go back: when all gradients are known, and nothing else is left to compute."""
        return self.bringing.get(MOMENTS, 0.0)

    @property
    def seconds(self) -> float:
        """The step at best."""
        hidden = max(self.links - self.exposed, self.bringing.get(REFERENCE, 0.0))
        return max(self.products, self.memory, hidden) + self.exposed + self.behind

    @property
    def mfu(self) -> float:
        """Share of the devices' peak that is useful work, at best."""
        return self.useful / (self.seconds * self.peak)


def roofline(program: Program, rows: Rows, topology: Topology) -> Speed:
    """The speed of a usual step."""
    work, chip = _Work.of(program, rows), topology.chip
    sent, waited = _sent(program, rows, topology), _waited(program, rows)
    full, live = (
        program.weights.lora is None,
        program.weights.reference_kind in ("frozen", "adapter_off"),
    )
    again = 1 if program.options.forward.remat == "full" else 0
    times = 2 + again + full + live
    return Speed(
        useful=step_flops(program.model, rows.lengths, full=full, live_reference=live),
        products=(times * work.body + (3 + full + live) * work.head + (3.5 + live) * work.scores)
        / chip.flops,
        memory=(_weight_traffic(program, rows) + (2 + again + live) * work.activations)
        / chip.bandwidth,
        sent=sent,
        sending={axis: size / _pace(axis, program, topology) for axis, size in sent.items()},
        waited=waited,
        bringing={name: size / chip.host for name, size in waited.items()},
        peak=chip.flops * topology.num_chips,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """One forward pass of a step on one device: FLOPs, and bytes of activations read and written."""

    body: float
    head: float
    scores: float
    activations: float

    @classmethod
    def of(cls, program: Program, rows: Rows) -> "_Work":
        model, mesh = program.model, program.mesh.shape
        slots = rows.microbatches * rows.slots / mesh["context"]
        prompt, chosen, rejected = rows.lengths.astype(np.float64).T
        answers = (chosen + rejected).sum() / (rows.rows * mesh["context"])
        mlp = (
            (3 if model.gated else 2)
            * model.hidden_size
            * model.mlp_size
            * max(1, model.experts_per_token)
        )
        layer = (
            2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim + mlp
        )
        seen = ((prompt**2 + chosen**2 + rejected**2) / 2 + prompt * (chosen + rejected)).sum() / (
            rows.rows * mesh["context"]
        )
        heads, F = (
            model.num_heads * model.head_dim / mesh["tensor"],
            model.mlp_size * max(1, model.experts_per_token) / mesh["tensor"],
        )
        moved = FLOAT32 * (6 * model.hidden_size + 4 * heads + 4 * F)
        return cls(
            body=2 * model.num_layers * layer / mesh["tensor"] * slots,
            head=2 * model.vocab_size * model.hidden_size / mesh["tensor"] * answers,
            scores=4 * model.num_layers * heads * seen,
            activations=model.num_layers * slots * moved,
        )


def _weight_traffic(program: Program, rows: Rows) -> float:
    """Bytes of weights, gradients and moments that a device reads and writes in a step."""
    state = program.abstract_state(with_reference=False)
    trained, used = local_bytes(state["params"], sizes_only=True), _used_weights(program)
    update = 2 * (local_bytes(state["params"]) + local_bytes(state["opt"])) + FLOAT32 * trained
    passes = 5 if program.weights.reference_kind in ("frozen", "adapter_off") else 4
    return update + rows.microbatches * (
        passes * used * program.options.forward.dtype.itemsize + 3 * FLOAT32 * trained
    )


def _used_weights(program: Program) -> float:
    """Weights that a device multiplies with, once those of fsdp are together."""
    mesh, shapes = program.mesh.shape, program.weights
    experts = mesh["expert"] if program.model.num_experts else 1
    return shapes.num_all() / (mesh["tensor"] * experts)


def _waited(program: Program, rows: Rows) -> dict[str, float]:
    """Bytes that come to a device from its host in a step, by part: the reference's layers for each microbatch, the rest once."""
    parts = waiting_parts(
        program.abstract_state(with_reference=False), program.abstract_fixed(rows.batch), program
    )
    again = (
        {REFERENCE: (rows.microbatches - 1) * local_bytes(parts[REFERENCE]["layers"])}
        if REFERENCE in parts
        else {}
    )
    return {name: local_bytes(tree) + again.get(name, 0.0) for name, tree in parts.items()}


def _pace(axis: str, program: Program, topology: Topology) -> float:
    """Bytes a second that a device sends along a mesh axis. What goes between slices (or hosts) of `data` and `fsdp` is counted apart."""
    mesh = program.mesh.shape
    together = {"tensor": mesh["tensor"], "context": mesh["tensor"] * mesh["context"]}
    link = topology.chip.network if axis == "slices" else topology.link(together.get(axis, 1))
    return link * (RING if topology.chip.platform == "tpu" and link == topology.chip.link else 1.0)


def _near(size: int, inside: int, topology: Topology) -> int:
    """Of `size` neighbours along an axis, each of `inside` devices, those that links connect."""
    return math.gcd(size, max(1, topology.joined // inside))


def _sent(program: Program, rows: Rows, topology: Topology) -> dict[str, float]:
    """Bytes that a device sends in a step, by mesh axis, with ring algorithms in each slice (or host) and between them."""
    model, mesh, item = program.model, program.mesh.shape, program.options.forward.dtype.itemsize
    live = program.weights.reference_kind in ("frozen", "adapter_off")
    again = 1 if program.options.forward.remat == "full" else 0
    shards = mesh["fsdp"] * mesh["expert"]
    inside = mesh["context"] * mesh["tensor"]
    near, copies = _near(shards, inside, topology), _near(mesh["data"], inside * shards, topology)
    trained = program.weights.num_trained() / mesh["tensor"]
    gathered = (2 + live) * item * _used_weights(program) + FLOAT32 * trained
    slots, D = rows.slots / mesh["context"], model.hidden_size
    keys = rows.slots * 2 * model.num_kv_heads * model.head_dim / mesh["tensor"] * model.num_layers
    sums = (
        1 if adds_up_once(program.options, rows.microbatches) else rows.microbatches
    )  # of gradients along data, in a step
    summed = 2 * FLOAT32 * trained / shards * sums / rows.microbatches
    micro = {
        "fsdp": _share(near) * gathered,
        "data": _share(copies) * summed,
        "slices": _share(shards // near) * gathered / near
        + _share(mesh["data"] // copies) * summed / copies,
        "context": _share(mesh["context"]) * keys * ((1 + again + live) * item + FLOAT32),
        "tensor": 2
        * _share(mesh["tensor"])
        * FLOAT32
        * slots
        * D
        * model.num_layers
        * 2
        * (2 + again + live),
    }
    return {axis: rows.microbatches * size for axis, size in micro.items() if size}


def _share(size: int) -> float:
    return (size - 1) / size
