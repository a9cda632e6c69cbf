"""Search for the mesh, remat policy and packed length that fit a machine and are fastest."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

from jaxdpo.config.schema import Config
from jaxdpo.distributed.sharding import Shape, all_shapes, num_row_shards
from jaxdpo.planning.batch_shapes import BatchShapes
from jaxdpo.planning.memory import Memory, estimate
from jaxdpo.planning.roofline import StepTime, roofline
from jaxdpo.planning.target import Target
from jaxdpo.training.program import Program

T = TypeVar("T")
PairTokens = tuple[int, int, int]
"""Tokens of prompt, chosen and rejected."""

REMAT_POLICIES = ("none", "dots", "full")
PACKED_LENGTHS = (2048, 4096, 8192, 16384)
MAX_CONTEXT = 8
"""With it, a device has 2,048 positions of the longest of PACKED_LENGTHS."""
MEMORY_FRACTION = 0.95
"""Share of the memory that a setting may be estimated to need for it to be proposed: estimates are
3 to 11% off (docs/plan.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to run, with its estimated memory and time."""

    config: Config
    program: Program
    shapes: BatchShapes
    memory: Memory
    time: StepTime
    fits: bool

    @classmethod
    def of(cls, target: Target, config: Config, pair_tokens: PairTokens) -> "Plan":
        """The plan of a config for pairs of one length.

        Raises:
            ValueError: the mesh or an option does not fit the machine or the model.
        """
        program = target.program(config)
        return cls.with_shapes(target, config, program, _shapes(program, pair_tokens))

    @classmethod
    def with_shapes(
        cls, target: Target, config: Config, program: Program, shapes: BatchShapes
    ) -> "Plan":
        """The plan of a program for batches of these shapes."""
        memory = estimate(program, shapes)
        return cls(
            config=config,
            program=program,
            shapes=shapes,
            memory=memory,
            time=roofline(program, shapes, target.topology),
            fits=memory.peak <= target.topology.chip.memory,
        )

    @property
    def options(self) -> str:
        """What the search varies, as options of the command line."""
        sizes = dataclasses.asdict(self.config.mesh)
        sizes["data"] = self.program.mesh.shape["data"]
        options = []
        for axis, size in sizes.items():
            if size > 1 or axis == "data":
                options.append(f"mesh.{axis}={size}")
        options.append(f"model.remat={self.config.model.remat}")
        options.append(f"data.packed_length={self.program.config.data.packed_length}")
        return " ".join(options)


def _shapes(program: Program, pair_tokens: PairTokens) -> BatchShapes:
    config, num_rows = program.config, num_row_shards(program.mesh)
    return BatchShapes.uniform(config.data, pair_tokens, config.train.batch_size, num_rows)


def search(target: Target, config: Config, pair_tokens: PairTokens) -> list[Plan]:
    """All settings that fit with a margin, fastest first; of equally fast ones, smallest first."""
    limit = MEMORY_FRACTION * target.topology.chip.memory
    found = [plan for plan in candidates(target, config, pair_tokens) if plan.memory.peak <= limit]
    return sorted(found, key=lambda plan: (round(plan.time.seconds, 4), plan.memory.peak))


def candidates(target: Target, config: Config, pair_tokens: PairTokens) -> Iterator[Plan]:
    """Every sensible mesh, remat policy and packed length, whether it fits or not."""
    # A packed sequence has to hold a pair of the maximal length without a shared prompt.
    data = config.data.with_lengths(target.model.max_positions)
    shortest = 2 * data.max_length
    lengths = sorted(
        {length for length in PACKED_LENGTHS if length >= shortest} | {data.packed_length}
    )
    remats = list(REMAT_POLICIES)
    if config.model.quantize != "none":
        # Without remat, the backward pass would keep the dequantized weights of all layers.
        remats.remove("none")
    for mesh in _meshes(target):
        try:
            program = target.program(replaced(config, mesh=mesh))
        except ValueError:
            # The mesh does not divide the model.
            continue
        # A program is built once per mesh: its weights and shardings are the same for the others.
        for remat, length in itertools.product(remats, lengths):
            changed = replaced(
                program,
                options=replaced(program.options, forward={"remat": remat}),
                config={"data": dataclasses.replace(program.config.data, packed_length=length)},
            )
            asked = replaced(
                config, mesh=mesh, model={"remat": remat}, data={"packed_length": length}
            )
            yield Plan.with_shapes(target, asked, changed, _shapes(changed, pair_tokens))


def _meshes(target: Target) -> Iterator[Shape]:
    """Mesh shapes that divide the model and keep tensor parallelism within a host."""
    model, chip = target.model, target.topology.chip
    for shape in all_shapes(target.topology.num_chips):
        expert, tensor = shape["expert"], shape["tensor"]
        if model.num_kv_heads % tensor != 0 or tensor > chip.per_host:
            continue
        if expert > 1 and (not model.num_experts or model.num_experts % expert != 0):
            continue
        if shape["context"] <= MAX_CONTEXT:
            yield shape


REMEDIES: dict[str, dict[str, Any]] = {
    "reference=cached": {"reference": "cached"},
    "optim.mu_dtype=bfloat16": {"optim": {"mu_dtype": "bfloat16"}},
    "reference=cached optim.mu_dtype=bfloat16": {
        "reference": "cached",
        "optim": {"mu_dtype": "bfloat16"},
    },
    "reference=cached train.offload=[moments]": {
        "reference": "cached",
        "train": {"offload": ["moments"]},
    },
    "lora.rank=16": {"reference": "auto", "lora": {"rank": 16}},
    "lora.rank=16 model.quantize=nf4": {
        "reference": "auto",
        "lora": {"rank": 16},
        "model": {"quantize": "nf4"},
    },
}
"""Options that save memory, from the least to the most change to the training."""


def remedy(target: Target, config: Config, pair_tokens: PairTokens) -> tuple[str, Plan] | None:
    """The first of REMEDIES that makes some setting fit, and the fastest such setting; or None."""
    for name, change in REMEDIES.items():
        if config.lora.enabled and "reference" in change and "lora" not in change:
            # An adapter's reference is the base itself, so a cache saves nothing.
            continue
        if "reference" in change and "reference" in config.train.offload:
            # Without reference weights there is nothing to offload, and the option is refused.
            offload = [part for part in config.train.offload if part != "reference"]
            change = {"train": {"offload": offload}} | change
            if "train.offload" not in name:
                name += f" train.offload=[{','.join(offload)}]"
        if found := search(target, replaced(config, **change), pair_tokens):
            return name, found[0]
    return None


def replaced(tree: T, /, **changes: Any) -> T:
    """A tree of dataclasses with other values; a dict changes fields of the field it names."""
    fields = {}
    for name, new in changes.items():
        if isinstance(new, dict):
            new = dataclasses.replace(getattr(tree, name), **new)
        fields[name] = new
    return dataclasses.replace(tree, **fields)  # type: ignore[type-var]
