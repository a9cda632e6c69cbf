"""The settings that fit, and the fastest of them."""

import dataclasses

import pytest

from jaxdpo.config.schema import Config
from jaxdpo.planning.machines import GIB
from jaxdpo.planning.search import MEMORY_FRACTION, Plan, candidates, remedy, replaced, search
from jaxdpo.planning.target import Target
from tests.planning.llama import PAIR, config, target


def with_memory(some: Target, gib: float) -> Target:
    chip = dataclasses.replace(some.topology.chip, memory=gib * GIB)
    return dataclasses.replace(some, topology=dataclasses.replace(some.topology, chip=chip))


@pytest.mark.slow
def test_all_that_is_found_fits_and_the_fastest_comes_first() -> None:
    some = with_memory(target("v5e-4"), 1.0)
    found = search(some, config(16), PAIR)
    assert found and all(plan.memory.peak <= GIB and plan.fits for plan in found)
    seconds = [plan.time.seconds for plan in found]
    assert seconds[0] == pytest.approx(min(seconds), abs=1e-4)
    again = Plan.of(some, found[0].config, PAIR)
    assert again.time == found[0].time and again.options == found[0].options
    with_more = search(with_memory(some, 4.0), config(16), PAIR)
    assert len(with_more) > len(found) and with_more[0].time.seconds <= seconds[0]


@pytest.mark.slow
def test_only_settings_that_can_be_are_looked_at() -> None:
    looked_at = [plan.config for plan in candidates(target("v5e-8"), config(), PAIR)]
    assert {(one.mesh.fsdp, one.mesh.tensor) for one in looked_at} >= {
        (1, 1),
        (8, 1),
        (2, 4),
        (1, 4),
    }
    assert max(one.mesh.tensor for one in looked_at) == 4  # key-value heads
    assert {one.mesh.expert for one in looked_at} == {1}
    assert {one.model.remat for one in looked_at} == {"none", "dots", "full"}
    long_pairs = candidates(target(), replaced(config(), data={"max_length": 2048}), PAIR)
    assert {one.config.data.packed_length for one in long_pairs} == {4096, 8192, 16384}
    quantised = replaced(config(), lora={"rank": 4}, model={"quantize": "nf4"})
    assert {one.config.model.remat for one in candidates(target(), quantised, PAIR)} == {
        "dots",
        "full",
    }


def least(some: Target, config: Config) -> float:
    """Least memory of all settings, GiB."""
    return min(plan.memory.peak for plan in candidates(some, config, PAIR)) / GIB


@pytest.mark.slow
def test_where_nothing_fits_the_mildest_remedy_is_found() -> None:
    some = target("v5e-1")
    tight = with_memory(some, 0.95 * least(some, config()) / MEMORY_FRACTION)
    assert search(tight, config(), PAIR) == []
    found = remedy(tight, config(), PAIR)
    assert found is not None and found[0] == "reference=cached" and found[1].fits
    assert remedy(with_memory(some, 0.01), config(), PAIR) is None
    offloaded = config(train={"batch_size": 5, "offload": ["reference"]})
    adapted = replaced(config(), lora={"rank": 16})
    found = remedy(
        with_memory(some, 1.01 * least(some, adapted) / MEMORY_FRACTION), offloaded, PAIR
    )
    # The reference of an adapter is its base: nothing to offload.
    assert found is not None and found[0] == "lora.rank=16 train.offload=[]" and found[1].fits
    adapters = replaced(config(), lora={"rank": 4})
    found = remedy(
        with_memory(some, 0.97 * least(some, adapters) / MEMORY_FRACTION), adapters, PAIR
    )
    assert found is not None and "quantize=nf4" in found[0]
