"""Which meshes, remat policies and row lengths fit a machine, and which of them is fastest."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

from jaxdpo.config.schema import Config
from jaxdpo.distributed.sharding import Shape, all_shapes, num_row_shards
from jaxdpo.planning.batch_shapes import Rows
from jaxdpo.planning.memory import Memory, estimate
from jaxdpo.planning.roofline import Speed, roofline
from jaxdpo.planning.target import Target
from jaxdpo.training.program import Program

T = TypeVar("T")

REMATS = ("none", "dots", "full")
ROW_TOKENS = (2048, 4096, 8192, 16384)
LARGEST_CONTEXT = 8
ROOM = 0.95
"""Share of the memory that an estimate may fill for a setting to be proposed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run."""

    config: Config
    program: Program
    rows: Rows
    memory: Memory
    speed: Speed
    fits: bool

    @classmethod
    def of(cls, target: Target, config: Config, pair_tokens: tuple[int, int, int]) -> "Choice":
        """The plan of a config without data.

        Raises:
            ValueError: the mesh or an option does not fit the machine or the model.
        """
        program = target.program(config)
        rows = Rows.filled(
            program.config.data,
            pair_tokens,
            config.train.batch_size,
            num_row_shards(program.mesh),
        )
        return cls.with_rows(target, config, program, rows)

    @classmethod
    def with_rows(cls, target: Target, config: Config, program: Program, rows: Rows) -> "Choice":
        """The plan of a program on these rows."""
        memory, speed = estimate(program, rows), roofline(program, rows, target.topology)
        fits = memory.peak <= target.topology.chip.memory
        return cls(config=config, program=program, rows=rows, memory=memory, speed=speed, fits=fits)

    @property
    def options(self) -> str:
        """What was chosen, as options of the command line."""
        sizes = dataclasses.asdict(self.config.mesh) | {"data": self.program.mesh.shape["data"]}
        mesh = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1 or axis == "data"]
        return " ".join(
            [
                *mesh,
                f"model.remat={self.config.model.remat}",
                f"data.packed_length={self.config.data.packed_length}",
            ]
        )


def search(target: Target, config: Config, pair_tokens: tuple[int, int, int]) -> list[Choice]:
    """All settings that fit with room for the estimate's error, fastest first; of equally fast ones those that take less memory."""
    room = ROOM * target.topology.chip.memory
    found = [
        choice for choice in choices(target, config, pair_tokens) if choice.memory.peak <= room
    ]
    return sorted(found, key=lambda choice: (round(choice.speed.seconds, 4), choice.memory.peak))


def choices(target: Target, config: Config, pair_tokens: tuple[int, int, int]) -> Iterator[Choice]:
    """Every mesh, remat policy and row length that may make sense, whether it fits or not."""
    shortest = 2 * config.data.lengths_for(target.model.max_positions)[0]
    sizes = sorted({size for size in ROW_TOKENS if size >= shortest} | {config.data.packed_length})
    remats = [remat for remat in REMATS if remat != "none" or config.model.quantize == "none"]
    for mesh in _meshes(target):
        try:
            program = target.program(changed(config, mesh=mesh))
        except ValueError:  # it does not divide the model
            continue
        for remat, size in itertools.product(remats, sizes):
            options = changed(program.options, forward={"remat": remat})
            section = dataclasses.replace(program.config.data, packed_length=size)
            rows = Rows.filled(
                section, pair_tokens, config.train.batch_size, num_row_shards(program.mesh)
            )
            asked = changed(config, mesh=mesh, model={"remat": remat}, data={"packed_length": size})
            yield Choice.with_rows(
                target, asked, dataclasses.replace(program, options=options), rows
            )


def _meshes(target: Target) -> Iterator[Shape]:
    model = target.model
    for shape in all_shapes(target.topology.num_chips):
        expert, tensor = shape["expert"], shape["tensor"]
        divides = model.num_kv_heads % tensor == 0 and (
            expert == 1 or (model.num_experts and model.num_experts % expert == 0)
        )
        if (
            divides
            and shape["context"] <= LARGEST_CONTEXT
            and tensor <= target.topology.chip.per_host
        ):
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
"""What makes a run smaller, from what changes it least to what changes it most."""


def remedy(
    target: Target, config: Config, pair_tokens: tuple[int, int, int]
) -> tuple[str, Choice] | None:
    """The mildest of REMEDIES with which something fits, and the fastest way to run it; None where none helps."""
    for name, change in REMEDIES.items():
        if config.lora.enabled and "reference" in change and "lora" not in change:
            continue
        if (
            "reference" in change and "reference" in config.train.offload
        ):  # there will be none to wait
            stays = [what for what in config.train.offload if what != "reference"]
            change = {"train": {"offload": stays}} | change
            name += "" if "train.offload" in name else f" train.offload=[{','.join(stays)}]"
        if found := search(target, changed(config, **change), pair_tokens):
            return name, found[0]
    return None


def changed(config: T, **changes: Any) -> T:
    """A tree of dataclasses with other values: of its own fields, or of fields of its sections."""
    fields = {
        name: dataclasses.replace(getattr(config, name), **new) if isinstance(new, dict) else new
        for name, new in changes.items()
    }
    return dataclasses.replace(config, **fields)  # type: ignore[type-var]
