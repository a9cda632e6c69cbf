"""Machines by name."""

import pytest

from jaxdpo.planning.gpu_targets import target_config, topology_shape
from jaxdpo.planning.machines import GIB, names, topology


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "shape"),
    [
        ("v4-8", 4, 1, "v4:2x2x1"),
        ("v5p-8", 4, 1, "v5p:2x2x1"),
        ("v5p-128", 64, 16, "v5p:4x4x4"),
        ("v5e-8", 8, 1, "v5e:2x4"),
        ("v5e-16", 16, 2, "v5e:4x4"),
        ("v6e-8", 8, 1, "v6e:2x4"),
        ("h100-8", 8, 1, None),
        ("h100-16", 16, 2, None),
        ("h200-1", 1, 1, None),
    ],
)
def test_a_name_is_that_of_the_cloud(name: str, chips: int, hosts: int, shape: str | None) -> None:
    found = topology(name)
    assert (found.num_chips, found.num_hosts, found.shape) == (chips, hosts, shape)


def test_every_name_is_known_and_every_shape_holds_its_chips() -> None:
    for name in names():
        found = topology(name)
        if found.shape is not None:
            sizes = [int(size) for size in found.shape.split(":")[1].split("x")]
            product = 1
            for size in sizes:
                product *= size
            assert product == found.num_chips, name
        assert (
            found.chip.memory > GIB / 100
            and found.chip.flops > 1e9
            and min(found.chip.link, found.chip.network, found.chip.host) > 0
        )


def test_gpus_of_several_hosts_talk_over_the_network() -> None:
    hosts = topology("h100-16")
    assert (
        hosts.link(16)
        < hosts.link(8)
        == hosts.link(2)
        == topology("h100-8").link(8)
        == topology("h100-1").link(1)
    )


def test_slices_of_tpus_talk_over_the_network() -> None:
    found = topology("4xv5p-128")
    assert (found.name, found.num_chips, found.num_slices, found.num_hosts, found.shape) == (
        "4xv5p-128",
        256,
        4,
        64,
        "v5p:4x4x4",
    )
    assert found.link(64) == found.chip.link > 10 * found.link(128) == 10 * found.link(256)
    assert topology("1xv5e-8").num_chips == 8
    with pytest.raises(
        ValueError, match=r"only TPUs come in slices\. Use h100-<number of all devices>"
    ):
        topology("2xh100-8")
    assert topology("2xv5e-4").num_hosts == 2 and topology("2xv6e-8").chip.network == 12.5e9
    for name in ("2xv5e-15", "0xv5e-16", "2x2xv5e-4", "xv5e-4"):
        with pytest.raises(ValueError, match=f"topology={name}: is not known"):
            topology(name)


def test_the_devices_of_cpu_share_this_machine() -> None:
    whole, part = topology("cpu-1").chip, topology("cpu-8").chip
    assert part.memory * 8 == whole.memory and part.flops * 8 == whole.flops


@pytest.mark.parametrize(
    ("name", "near"),
    [("v5e-15", "v5e-1"), ("v5litepod-16", "v5"), ("h100", "h100-"), ("", "v5e-8")],
)
def test_what_is_not_known_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"topology={name}: is not known. Did you mean {near}"):
        topology(name)


def test_gpus_are_described_as_the_compiler_takes_them() -> None:
    for name in names():
        if topology(name).chip.platform == "cuda":
            text = target_config(topology(name))
            assert text.count("{") == text.count("}") == 3 and topology(name).chip.kind in text
    assert "major: 8 minor: 9" in target_config(
        topology("l4-1")
    ) and "core_count: 132" in target_config(topology("h200-8"))
    assert (topology_shape(topology("h100-8")), topology_shape(topology("h100-32"))) == (
        "1x1x8",
        "1x4x8",
    )
