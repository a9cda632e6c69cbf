"""What fits, and what is fastest of it."""

import dataclasses

import pytest

from jaxdpo.config.schema import Config
from jaxdpo.planning.machines import GIB
from jaxdpo.planning.search import ROOM, Choice, changed, choices, remedy, search
from jaxdpo.planning.target import Target
from tests.planning.llama import PAIR, config, target


def with_memory(some: Target, gib: float) -> Target:
    chip = dataclasses.replace(some.topology.chip, memory=gib * GIB)
    return dataclasses.replace(some, topology=dataclasses.replace(some.topology, chip=chip))


def test_all_that_is_found_fits_and_the_fastest_comes_first() -> None:
    some = with_memory(target("v5e-4"), 1.0)
    found = search(some, config(16), PAIR)
    assert found and all(choice.memory.peak <= GIB and choice.fits for choice in found)
    seconds = [choice.speed.seconds for choice in found]
    assert seconds[0] == pytest.approx(min(seconds), abs=1e-4)
    again = Choice.of(some, found[0].config, PAIR)
    assert again.speed == found[0].speed and again.options == found[0].options
    with_more = search(with_memory(some, 4.0), config(16), PAIR)
    assert len(with_more) > len(found) and with_more[0].speed.seconds <= seconds[0]


def test_only_settings_that_can_be_are_looked_at() -> None:
    looked_at = [choice.config for choice in choices(target("v5e-8"), config(), PAIR)]
    assert {(one.mesh.fsdp, one.mesh.tensor) for one in looked_at} >= {
        (1, 1),
        (8, 1),
        (2, 4),
        (1, 4),
    }
    assert max(one.mesh.tensor for one in looked_at) == 4  # key-value heads
    assert {one.mesh.expert for one in looked_at} == {1}
    assert {one.model.remat for one in looked_at} == {"none", "dots", "full"}
    long_pairs = choices(target(), changed(config(), data={"max_length": 2048}), PAIR)
    assert {one.config.data.packed_length for one in long_pairs} == {4096, 8192, 16384}
    quantised = changed(config(), lora={"rank": 4}, model={"quantize": "nf4"})
    assert {one.config.model.remat for one in choices(target(), quantised, PAIR)} == {
        "dots",
        "full",
    }


def least(some: Target, config: Config) -> float:
    """Memory of the setting that takes least, in GiB."""
    return min(choice.memory.peak for choice in choices(some, config, PAIR)) / GIB


def test_where_nothing_fits_the_mildest_remedy_is_told() -> None:
    some = target("v5e-1")
    tight = with_memory(some, 0.95 * least(some, config()) / ROOM)
    assert search(tight, config(), PAIR) == []
    found = remedy(tight, config(), PAIR)
    assert found is not None and found[0] == "reference=cached" and found[1].fits
    assert remedy(with_memory(some, 0.01), config(), PAIR) is None
    waiting = config(train={"batch_size": 5, "offload": ["reference"]})
    adapted = changed(config(), lora={"rank": 16})
    found = remedy(with_memory(some, 1.01 * least(some, adapted) / ROOM), waiting, PAIR)
    assert (
        found is not None and found[0] == "lora.rank=16 train.offload=[]" and found[1].fits
    )  # whose reference is its base
    adapters = changed(config(), lora={"rank": 4})
    found = remedy(with_memory(some, 0.97 * least(some, adapters) / ROOM), adapters, PAIR)
    assert found is not None and "quantize=nf4" in found[0]
