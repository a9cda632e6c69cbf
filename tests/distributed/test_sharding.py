import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdpo.config.cross_checks import cross_check
from jaxdpo.config.data_options import LENGTH_MULTIPLE, DataSection
from jaxdpo.config.schema import Config, MeshSection
from jaxdpo.distributed import sharding
from jaxdpo.models.params import abstract_params, logical_axes
from jaxdpo.models.shardings import axis_sizes
from jaxdpo.training.state import init_state
from jaxdpo.training.weights import state_shardings
from tests.families import tiny
from tests.tiny import Setup, mesh, model

SIZES = axis_sizes(model())
"""4 heads and 2 key-value heads."""


def shape(**sizes: int) -> dict[str, int]:
    return dict.fromkeys(sharding.AXES, 1) | sizes


def made(**sizes: int) -> dict[str, int]:
    return dict(sharding.make_mesh(MeshSection(**sizes)).shape)


def test_the_mesh_takes_all_devices() -> None:
    assert made() == shape(data=8)
    assert made(fsdp=2, tensor=2) == shape(data=2, fsdp=2, tensor=2)
    assert made(data=1, fsdp=8) == shape(fsdp=8)
    assert made(expert=2, context=2) == shape(data=2, expert=2, context=2)
    assert sharding.num_row_shards(mesh(2, 2, 2)) == 4
    assert sharding.num_row_shards(mesh(context=4, expert=2)) == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "mesh.data=3: must multiply to the 8 devices here. For example mesh.data=8"),
        (
            {"fsdp": 3},
            "mesh.fsdp=3: does not divide the model's embed (32). For example mesh.data=2 "
            "mesh.fsdp=4",
        ),
        (
            {"data": 4, "fsdp": 4},
            "mesh.data=4 mesh.fsdp=4: must multiply to the 8 devices here. For example mesh.data=2 "
            "mesh.fsdp=4",
        ),
        (
            {"tensor": 4},
            "mesh.tensor=4: does not divide the model's kv_heads (2). For example mesh.data=4 "
            "mesh.tensor=2",
        ),
        (
            {"fsdp": 4, "tensor": 4},
            "mesh.data=1 mesh.fsdp=4 mesh.tensor=4: must multiply to the 8 devices "
            "here\nmesh.tensor=4: does not",
        ),
        ({"fsdp": 4, "tensor": 4}, "For example mesh.data=1 mesh.fsdp=4 mesh.tensor=2"),
        (
            {"expert": 2},
            "mesh.expert=2: the model has no experts. For example mesh.data=8 mesh.expert=1",
        ),
        ({"context": 16}, "For example mesh.data=1 mesh.context=8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_one_that_can(
    sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        sharding.make_mesh(MeshSection(**sizes), sizes=SIZES)
    assert message in str(caught.value)
    advice = {
        axis: int(size)
        for axis, size in re.findall(
            r"mesh\.(\w+)=(\d+)", str(caught.value).split("For example ")[1]
        )
    }
    assert dict(sharding.make_mesh(MeshSection(**advice), sizes=SIZES).shape) == shape(**advice)


def test_what_experts_are_shared_by_must_divide_them_and_the_model() -> None:
    sizes = axis_sizes(tiny("qwen3_moe"))
    assert sharding.make_mesh(MeshSection(fsdp=2, expert=4), sizes=sizes).shape["expert"] == 4
    with pytest.raises(
        ValueError,
        match=r"mesh.expert=8: does not divide the model's expert \(4\). "
        r"For example mesh.data=2 mesh.expert=4",
    ):
        sharding.make_mesh(MeshSection(expert=8), sizes=sizes)
    odd = dataclasses.replace(tiny("qwen3_moe"), hidden_size=36)
    with pytest.raises(
        ValueError, match=r"mesh.fsdp=2 mesh.expert=4: does not divide the model's embed \(36\)"
    ):
        sharding.make_mesh(MeshSection(fsdp=2, expert=4), sizes=axis_sizes(odd))


def test_rows_are_cut_into_shares_of_one_length() -> None:
    for size in range(1, 65):
        if LENGTH_MULTIPLE % size:
            with pytest.raises(
                ValueError, match=f"mesh.context={size}: must divide packed lengths"
            ):
                MeshSection(context=size)
        else:
            MeshSection(context=size)
    problems = cross_check(
        Config(mesh=MeshSection(context=4), data=DataSection(packed_length=4098))
    )
    assert (
        "mesh.context=4: does not divide data.packed_length=4098. Use data.packed_length=4160"
        in problems
    )


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX describes it."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"


def chips(per_slice: int, slices: int) -> list[Chip]:
    """Chips with two to a process, in an order in which none belongs."""
    numbers = np.random.default_rng(0).permutation(per_slice * slices).tolist()
    return [Chip(i, i // 2, i // per_slice) for i in numbers]


def test_slices_lie_along_data_and_devices_of_a_process_side_by_side() -> None:
    found = sharding.make_mesh(MeshSection(fsdp=2, tensor=2), chips(4, 2)).devices
    assert (
        np.vectorize(lambda chip: chip.slice_index)(found).tolist()
        == np.repeat([0, 1], 4).reshape(found.shape).tolist()
    )
    assert np.vectorize(lambda chip: chip.id)(found).ravel().tolist() == list(range(8))


def test_what_talks_in_every_layer_stays_in_a_slice() -> None:
    assert sharding.make_mesh(MeshSection(data=1, fsdp=4, tensor=2), chips(2, 4)).shape["fsdp"] == 4
    for sizes in ({"tensor": 4}, {"tensor": 2, "context": 2}, {"expert": 4}):
        with pytest.raises(
            ValueError,
            match=r"must lie in one slice, of which each has 2 devices. For example mesh.data=\d",
        ):
            sharding.make_mesh(MeshSection(**sizes), chips(2, 4))


def test_every_weight_is_spread_as_its_axes_say() -> None:
    config = model(attention_bias=True)
    specs = jax.tree.map(
        lambda named: named.spec,
        sharding.param_shardings(
            mesh(2, 2, 2), logical_axes(config), abstract_params(config, "float32")
        ),
    )
    assert specs["embed"]["weight"] == specs["head"]["weight"] == PartitionSpec("tensor", "fsdp")
    assert specs["layers"]["attn"]["q"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["layers"]["attn"]["o"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert specs["layers"]["attn"]["k_bias"] == PartitionSpec(None, "tensor", None)
    assert specs["layers"]["mlp"]["down"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["norm"]["scale"] == PartitionSpec(None)


def test_a_mesh_that_does_not_divide_the_weights_names_them_all() -> None:
    config = model()
    with pytest.raises(ValueError) as caught:
        state_shardings(config, mesh(1, 1, 4))
    lines = str(caught.value).split("\n")
    assert len(lines) == 2  # 4 heads divide, 2 key-value heads do not
    assert lines[0].startswith(
        "mesh.tensor=4: does not divide the 2 of dimension kv_heads of weight layers/attn/k (2, "
        "32, 2, 8). Use a divisor of 2"
    )
    assert "layers/attn/v" in lines[1]


@pytest.mark.parametrize("axes", [("vocab", "mlp"), ("vocab",), ("vocab", "embed", "norm")])
def test_axes_that_collide_or_do_not_fit_are_refused(axes: tuple[str, ...]) -> None:
    shapes = {"weight": jax.ShapeDtypeStruct((64, 32), np.float32)}
    with pytest.raises(
        ValueError, match=r"weight weight \(64, 32\): its axes .* do not fit the mesh rules"
    ):
        sharding.param_shardings(mesh(2, 2, 2), {"weight": axes}, shapes)


def test_moments_live_with_their_weights() -> None:
    named = state_shardings(model(), mesh(1, 8, 1))
    assert named.opt["mu"] == named.opt["nu"] == named.params
    assert named.params["embed"]["weight"].spec == PartitionSpec("tensor", "fsdp")


def test_a_state_is_born_spread_and_takes_its_share_of_memory() -> None:
    named = state_shardings(model(), mesh(1, 8, 1))
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(model(), "float32")
    )
    state = jax.jit(lambda: init_state(zeros, Setup().optim), out_shardings=named)()
    for leaf in (state.params["layers"]["attn"]["q"], state.opt["nu"]["layers"]["attn"]["q"]):
        assert [shard.data.shape for shard in leaf.addressable_shards] == [(2, 4, 4, 8)] * 8


def test_put_spreads_rows_over_data_and_fsdp() -> None:
    where = mesh(2, 2, 2)
    x = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    placed = sharding.put(x, sharding.rows(where, 1))
    np.testing.assert_array_equal(np.asarray(placed), x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1, 3)}
    assert sharding.put(np.float32(3), sharding.replicated(where)).sharding.is_fully_replicated


def test_constrain_leaves_one_device_alone() -> None:
    x = jax.numpy.zeros((4, 2))
    assert (
        sharding.constrain(x, None, sharding.ROWS) is x
        and sharding.constrain(x, mesh(), sharding.ROWS) is x
    )
    spread = jax.jit(lambda x: sharding.constrain(x, mesh(2, 2, 2), sharding.ROWS))(x)
    assert {shard.data.shape for shard in spread.addressable_shards} == {(1, 2)}
