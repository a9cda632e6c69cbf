"""Collectives read from HLO text: kinds, loops, groups in every notation, bytes."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdpo.planning.hlo_collectives import collectives
from tests.tiny import mesh

MESH = mesh(2, 2, 2)  # device number = 4 * data + 2 * fsdp + tensor


def read(operation: str, groups: str) -> list:
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n"
        f"  %x = {operation}(%p), {groups}, dimensions={{0}}\n"
        "}\n"
    )
    return collectives(text, MESH)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "tensor")),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp")),
    ],
)
def test_replica_groups_in_every_notation_become_mesh_axes(
    groups: str, axes: tuple[str, ...]
) -> None:
    assert [one.axes for one in read("f32[8]{0} all-reduce", groups)] == [axes]


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("f32[8,3]{1,0} all-gather", 24 * 4 * 3 / 4),
        ("bf16[8]{0} all-reduce", 2 * 16 * 3 / 4),
        ("(f32[8]{0}, /*index=1*/f32[]) all-reduce", 2 * 36 * 3 / 4),
        ("f32[2]{0} reduce-scatter", 8 * 3),
        ("f32[8]{0} all-to-all", 32 * 3 / 4),
        ("(f32[2]{0}, f32[8]{0}) all-gather-start", 32 * 3 / 4),
    ],
)
def test_bytes_are_those_of_a_ring(operation: str, sent: float) -> None:
    (one,) = read(operation, "replica_groups={{0,1,2,3},{4,5,6,7}}")
    assert one.sent == sent and one.axes == ("fsdp", "tensor")


def test_permutes_and_groups_of_one() -> None:
    (one,) = read("f32[8]{0} collective-permute", "source_target_pairs={{0,1},{1,0}}")
    assert one.sent == 32 and one.axes == ("tensor",)
    assert read("f32[8]{0} all-gather", "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}") == []
    with pytest.raises(ValueError, match="groups are not understood"):
        read("f32[8]{0} all-gather", "replica_groups=else")


def test_collectives_in_a_loop_count_once_per_iteration() -> None:
    spread = NamedSharding(MESH, PartitionSpec(None, "fsdp", "tensor"))

    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = jax.ShapeDtypeStruct(
        (4, 16), "float32", sharding=NamedSharding(MESH, PartitionSpec("fsdp", None))
    )
    text = (
        jax.jit(layers)
        .lower(shapes, jax.ShapeDtypeStruct((5, 16, 16), "float32", sharding=spread))
        .compile()
        .as_text()
        or ""
    )
    some = collectives(text, MESH)
    assert some and {one.count for one in some if re.search("dot_general|while", one.op_name)} == {
        5
    }
    assert {"fsdp", "tensor"} <= {axis for one in some for axis in one.axes}
