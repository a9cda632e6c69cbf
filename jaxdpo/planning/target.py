"""What is planned: a run's program for a machine that may be elsewhere, from its config and the model's config.json alone."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdpo.config.schema import Config
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.config_json import from_hf
from jaxdpo.planning.machines import Topology
from jaxdpo.training.program import Program
from jaxdpo.training.resolve import resolve


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device in name only, for shapes and places that no compiler looks at. It has no memories to tell apart."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0
    slice_index: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A model and a machine."""

    topology: Topology
    model: ModelConfig
    raw: dict[str, Any]
    """The model's config.json."""

    @classmethod
    def of(cls, topology: Topology, raw: dict[str, Any]) -> "Target":
        """The target for a parsed config.json.

        Raises:
            ValueError: config.json cannot be used.
        """
        return cls(topology=topology, model=from_hf(raw), raw=raw)

    def stand_ins(self) -> list[Any]:
        """The machine's devices, in name only."""
        machine, chip = self.topology, self.topology.chip
        each, per_host = (
            machine.num_chips // machine.num_slices,
            machine.num_chips // machine.num_hosts,
        )
        return [
            StandIn(i, chip.platform, chip.kind, i // per_host, i // each)
            for i in range(machine.num_chips)
        ]

    def program(self, config: Config, devices: Sequence[Any] | None = None) -> Program:
        """The run's program on these devices; by default on stand-ins.

        Raises:
            ValueError: the mesh or an option does not fit the machine or the model.
        """
        resolved = resolve(config, self.model, self.raw, devices or self.stand_ins())
        here = resolved.config
        placed = (
            here
            if devices
            else dataclasses.replace(here, train=dataclasses.replace(here.train, offload=[]))
        )
        program = Program.of(
            resolved._replace(config=placed),
            self.model,
            Path(),
            total_steps=config.train.steps or 1000,
        )
        return dataclasses.replace(program, config=here)
