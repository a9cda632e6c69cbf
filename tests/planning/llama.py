"""A model large enough for weights and activations to dominate memory, yet quick to compile."""

from typing import Any

from jaxdpo.config.schema import Config
from jaxdpo.planning.machines import topology
from jaxdpo.planning.search import Plan, replaced
from jaxdpo.planning.target import Target
from tests.tiny import HF

LLAMA: dict[str, Any] = HF | {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
"""config.json of 60M weights."""
PAIR = (256, 256, 256)


def target(machine: str = "cpu-1", **changes: Any) -> Target:
    """The model on a machine."""
    return Target.of(topology(machine), LLAMA | changes)


def config(pairs: int = 5, **changes: Any) -> Config:
    """A run's config; fields of its sections may be changed."""
    return replaced(Config(), **{"train": {"batch_size": pairs}} | changes)


def planned(some: Target, pairs: int = 5, **changes: Any) -> Plan:
    """The plan of a run."""
    return Plan.of(some, config(pairs, **changes), PAIR)
