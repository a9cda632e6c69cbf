"""The estimate of memory, against what the compiler says."""

from typing import Any

import pytest

from jaxdpo.planning.aot_compile import compile_step, compiler_devices
from jaxdpo.planning.memory import local_bytes
from tests.planning.llama import config, planned, target


def off(machine: str, changes: dict[str, Any], model: dict[str, Any], pairs: int) -> float:
    """Estimate over compiled, less one."""
    some = target(machine, **model)
    choice = planned(some, pairs, **changes)
    program = some.program(config(pairs, **changes), compiler_devices(some.topology))
    compiled = compile_step(program, choice.rows)
    state = sum(choice.memory.held.values())
    assert compiled.arguments == pytest.approx(
        state, rel=1e-3
    )  # what is held is known, not estimated
    return choice.memory.peak / compiled.peak - 1


def test_state_is_counted_and_the_rest_is_near() -> None:
    assert abs(off("cpu-1", {"data": {"packed_length": 2048}}, {}, 5)) < 0.1


CASES: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    ("cpu-1", {"model": {"remat": "dots"}}, {}, 5),
    ("cpu-1", {"model": {"remat": "none"}}, {}, 5),
    ("cpu-1", {}, {}, 32),
    ("cpu-1", {"lora": {"rank": 16}}, {}, 5),
    ("cpu-8", {"mesh": {"fsdp": 8}}, {"vocab_size": 64000}, 32),
    ("cpu-8", {"mesh": {"fsdp": 2, "context": 2, "tensor": 2}}, {}, 32),
]


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "changes", "model", "pairs"), CASES)
def test_the_estimate_is_within_a_tenth(
    machine: str, changes: dict[str, Any], model: dict[str, Any], pairs: int
) -> None:
    assert abs(off(machine, changes, model, pairs)) < 0.1


def test_what_makes_a_run_smaller_makes_its_parts_smaller() -> None:
    parts = {name: planned(target(), **change).memory for name, change in CHANGES.items()}
    plain = parts["plain"]
    assert parts["cached"].held["reference"] == 0 < plain.held["reference"]
    assert parts["moments"].held["optimizer moments"] == pytest.approx(
        0.75 * plain.held["optimizer moments"], rel=1e-3
    )
    assert (
        parts["lora"].held["base under the adapter"]
        == plain.held["parameters"]
        > 50 * parts["lora"].held["parameters"]
    )
    assert (
        parts["nf4"].held["base under the adapter"]
        < 0.4 * parts["lora"].held["base under the adapter"]
    )
    assert parts["short rows"].phases["backward"]["activations"] == pytest.approx(
        plain.phases["backward"]["activations"] / 2
    )
    assert plain.phases["backward"]["activations"] < parts["dots"].phases["backward"]["activations"]
    assert plain.peak == pytest.approx(sum(plain.parts.values()))


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cached": {"reference": "cached"},
    "moments": {"optim": {"mu_dtype": "bfloat16"}},
    "lora": {"lora": {"rank": 4}},
    "nf4": {"lora": {"rank": 4}, "model": {"quantize": "nf4"}},
    "short rows": {"data": {"packed_length": 2048}},
    "dots": {"model": {"remat": "dots"}},
}


def test_shares_are_counted_as_they_lie() -> None:
    whole, shared = (
        planned(target("cpu-8"), 8, mesh=mesh) for mesh in ({"data": 8}, {"fsdp": 4, "tensor": 2})
    )
    for part in ("parameters", "reference", "optimizer moments"):
        assert shared.memory.held[part] == pytest.approx(
            whole.memory.held[part] / 8, rel=0.02
        )  # norms are on every device
    assert local_bytes(None) == 0 and local_bytes({}) == 0
