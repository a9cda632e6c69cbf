import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdpo import sharding
from jaxdpo.config import MeshSection
from jaxdpo.models.decoder import abstract_params, logical_axes
from jaxdpo.runweights import state_shardings
from jaxdpo.step import init_state
from tests.tiny import Setup, mesh, model


def test_the_mesh_takes_all_devices() -> None:
    assert dict(sharding.make_mesh(MeshSection()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(MeshSection(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sharding.make_mesh(MeshSection(data=1, fsdp=8)).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert sharding.num_row_shards(mesh(2, 2, 2)) == 4


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 3}, {"tensor": 16}, {"data": 4, "fsdp": 4}, {"data": 1}])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must multiply to the 8 devices here. For example mesh.data=-1 mesh.fsdp=8 mesh.tensor=1"):
        sharding.make_mesh(MeshSection(**sizes))


def test_every_weight_is_spread_as_its_axes_say() -> None:
    config = model(attention_bias=True)
    specs = jax.tree.map(
        lambda named: named.spec, sharding.param_shardings(mesh(2, 2, 2), logical_axes(config), abstract_params(config, "float32"))
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
        "mesh.tensor=4: does not divide the 2 of dimension kv_heads of weight layers/attn/k (2, 32, 2, 8). Use a divisor of 2"
    )
    assert "layers/attn/v" in lines[1]


@pytest.mark.parametrize("axes", [("vocab", "mlp"), ("vocab",), ("vocab", "embed", "norm")])
def test_axes_that_collide_or_do_not_fit_are_refused(axes: tuple[str, ...]) -> None:
    shapes = {"weight": jax.ShapeDtypeStruct((64, 32), np.float32)}
    with pytest.raises(ValueError, match=r"weight weight \(64, 32\): its axes .* do not fit the mesh rules"):
        sharding.param_shardings(mesh(2, 2, 2), {"weight": axes}, shapes)


def test_moments_live_with_their_weights() -> None:
    named = state_shardings(model(), mesh(1, 8, 1))
    assert named.opt["mu"] == named.opt["nu"] == named.params
    assert named.params["embed"]["weight"].spec == PartitionSpec("tensor", "fsdp")


def test_a_state_is_born_spread_and_takes_its_share_of_memory() -> None:
    named = state_shardings(model(), mesh(1, 8, 1))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(model(), "float32"))
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
    assert sharding.constrain(x, None, sharding.ROWS) is x and sharding.constrain(x, mesh(), sharding.ROWS) is x
    spread = jax.jit(lambda x: sharding.constrain(x, mesh(2, 2, 2), sharding.ROWS))(x)
    assert {shard.data.shape for shard in spread.addressable_shards} == {(1, 2)}
