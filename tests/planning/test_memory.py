"""The memory estimate against the compiler's figures."""

from typing import Any

import pytest

from jaxdpo.planning.aot_compile import compile_step, compiler_devices
from jaxdpo.planning.memory import local_bytes
from tests.planning.llama import config, planned, target


def relative_error(
    machine: str, changes: dict[str, Any], model: dict[str, Any], pairs: int
) -> float:
    """Of the estimated peak, against the compiled one."""
    some = target(machine, **model)
    plan = planned(some, pairs, **changes)
    program = some.program(config(pairs, **changes), compiler_devices(some.topology))
    compiled = compile_step(program, plan.shapes)
    state = sum(plan.memory.persistent.values())
    # The persistent parts are counted, not estimated.
    assert compiled.arguments == pytest.approx(state, rel=1e-3)
    return plan.memory.peak / compiled.peak - 1


def test_the_state_is_exact_and_the_peak_within_a_tenth() -> None:
    assert abs(relative_error("cpu-1", {"data": {"packed_length": 2048}}, {}, 5)) < 0.1


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
    assert abs(relative_error(machine, changes, model, pairs)) < 0.1


def test_options_that_save_memory_reduce_their_part() -> None:
    parts = {name: planned(target(), **change).memory for name, change in CHANGES.items()}
    plain = parts["plain"]
    assert parts["cached"].persistent["reference"] == 0 < plain.persistent["reference"]
    assert parts["moments"].persistent["optimizer moments"] == pytest.approx(
        0.75 * plain.persistent["optimizer moments"], rel=1e-3
    )
    assert (
        parts["lora"].persistent["base under the adapter"]
        == plain.persistent["parameters"]
        > 50 * parts["lora"].persistent["parameters"]
    )
    assert (
        parts["nf4"].persistent["base under the adapter"]
        < 0.4 * parts["lora"].persistent["base under the adapter"]
    )
    assert parts["short sequences"].phases["backward"]["activations"] == pytest.approx(
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
    "short sequences": {"data": {"packed_length": 2048}},
    "dots": {"model": {"remat": "dots"}},
}


def test_sharded_state_is_counted_per_device() -> None:
    replicated = planned(target("cpu-8"), 8, mesh={"data": 8})
    sharded = planned(target("cpu-8"), 8, mesh={"fsdp": 4, "tensor": 2})
    for part in ("parameters", "reference", "optimizer moments"):
        # Norms are replicated, so not quite an eighth.
        assert sharded.memory.persistent[part] == pytest.approx(
            replicated.memory.persistent[part] / 8, rel=0.02
        )
    assert local_bytes(None) == 0 and local_bytes({}) == 0
