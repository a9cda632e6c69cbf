"""A model and a machine to plan for, known by config.json and the machine's name alone."""

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

ASSUMED_STEPS = 1000
"""Length of the learning rate schedule where train.steps is not set: memory and time do not depend
on it."""


@dataclasses.dataclass(frozen=True)
class AbstractDevice:
    """A device by name, enough for shapes and shardings; it cannot be compiled for.

    Not jax.sharding.AbstractDevice because that has no process and slice, which decide the mesh.
    """

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
    config_json: dict[str, Any]

    @classmethod
    def of(cls, topology: Topology, config_json: dict[str, Any]) -> "Target":
        """The target for a parsed config.json.

        Raises:
            ValueError: config.json is of a model that is not supported.
        """
        return cls(topology=topology, model=from_hf(config_json), config_json=config_json)

    def abstract_devices(self) -> list[Any]:
        """The machine's devices, by name."""
        machine, chip = self.topology, self.topology.chip
        per_slice = machine.num_chips // machine.num_slices
        per_host = machine.num_chips // machine.num_hosts
        devices = []
        for i in range(machine.num_chips):
            devices.append(
                AbstractDevice(
                    id=i,
                    platform=chip.platform,
                    device_kind=chip.kind,
                    process_index=i // per_host,
                    slice_index=i // per_slice,
                )
            )
        return devices

    def program(self, config: Config, devices: Sequence[Any] | None = None) -> Program:
        """The run's program on these devices; by default on abstract ones.

        Raises:
            ValueError: the mesh or an option does not fit the machine or the model.
        """
        resolved = resolve(config, self.model, self.config_json, devices or self.abstract_devices())
        resolved_config = resolved.config
        if not devices:
            # Abstract devices have no memory kinds, so shardings cannot say "pinned_host".
            train = dataclasses.replace(resolved_config.train, offload=[])
            resolved = resolved._replace(config=dataclasses.replace(resolved_config, train=train))
        program = Program.of(
            resolved, self.model, Path(), total_steps=config.train.steps or ASSUMED_STEPS
        )
        return dataclasses.replace(program, config=resolved_config)
