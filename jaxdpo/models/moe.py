"""Mixture of experts: a router sends each token to a few of many MLPs.

Tokens are sorted by expert, so that each expert's product is one run of rows (`jax.lax.ragged_dot`). Experts are spread over the mesh's
expert axis, whose devices exchange their tokens: each computes its own experts for the tokens of all, and every token's results are added
up where it belongs. No token is dropped. Over the tensor axis each expert's inner dimension is shared.

Dimension names: B rows, T slots, R = B T tokens, E experts, C choices of a token, D model, F mlp.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.distributed.sharding import on_each_device, slots_spec
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.layers import gated, param, project, rounded


class RouterLoad(NamedTuple):
    """How a router spread its tokens, as float32 sums over tokens (and, outside a layer, over layers)."""

    chosen_E: jax.Array
    """Tokens that were sent to each expert."""
    probs_E: jax.Array
    """The router's probability of each expert."""
    tokens: jax.Array
    """Tokens counted."""


class Experts(NamedTuple):
    """The experts' weights of one layer; biases or None."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array
    gate_bias_EF: jax.Array | None
    up_bias_EF: jax.Array | None
    down_bias_ED: jax.Array | None


_PLACES: dict[str, PartitionSpec] = {
    "gate_EDF": PartitionSpec("expert", None, "tensor"),
    "up_EDF": PartitionSpec("expert", None, "tensor"),
    "down_EFD": PartitionSpec("expert", "tensor", None),
    "gate_bias_EF": PartitionSpec("expert", "tensor"),
    "up_bias_EF": PartitionSpec("expert", "tensor"),
    "down_bias_ED": PartitionSpec("expert", None),
}
"""What each device has of one layer's experts while it computes."""


class MoE(nnx.Module):
    """A router and its experts (2401.04088). Holds all layers' weights, stacked."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        L, D, F, E = config.num_layers, config.hidden_size, config.mlp_size, config.num_experts
        normal = functools.partial(
            param, rngs, std=config.initializer_range, dtype=dtype, num_inputs=1
        )
        constant = functools.partial(param, rngs, std=None, dtype=dtype)
        self.router = normal((L, D, E), ("layer", "embed", "router"))
        self.router_bias = constant((L, E), ("layer", "router")) if config.router_bias else None
        self.gate = normal((L, E, D, F), ("layer", "expert", "expert_embed", "expert_mlp"))
        self.up = normal((L, E, D, F), ("layer", "expert", "expert_embed", "expert_mlp"))
        self.down = normal((L, E, F, D), ("layer", "expert", "expert_mlp", "expert_embed"))
        self.gate_bias = (
            constant((L, E, F), ("layer", "expert", "expert_mlp")) if config.expert_bias else None
        )
        self.up_bias = (
            constant((L, E, F), ("layer", "expert", "expert_mlp")) if config.expert_bias else None
        )
        self.down_bias = (
            constant((L, E, D), ("layer", "expert", "norm")) if config.expert_bias else None
        )
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        real_BT: jax.Array | None,
        compute_dtype: jnp.dtype,
        mesh: Mesh | None,
    ) -> tuple[jax.Array, RouterLoad]:
        """float32 [B, T, D] in and out; `real_BT` (bool, None: all) says which tokens count for the load."""
        config = self.config
        logits_BTE = project("BTD,DE->BTE", x_BTD, self.router, self.router_bias, compute_dtype)
        probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        weights_BTC, chosen_BTC = jax.lax.top_k(probs_BTE, config.experts_per_token)
        if config.norm_topk:
            weights_BTC = weights_BTC / weights_BTC.sum(-1, keepdims=True)
        biases = (
            None if bias is None else bias[...]
            for bias in (self.gate_bias, self.up_bias, self.down_bias)
        )
        experts = Experts(self.gate[...], self.up[...], self.down[...], *biases)
        apply = functools.partial(_apply, config.activation, config.activation_limit, compute_dtype)
        if mesh is None or mesh.size == 1:
            y_BTD = apply(x_BTD, weights_BTC, chosen_BTC, experts)
        else:
            tokens = slots_spec(mesh, x_BTD.shape[1])
            places: list[Any] = [
                None if value is None else _PLACES[name]
                for name, value in experts._asdict().items()
            ]
            here, taken = (
                functools.partial(_exchange, apply, mesh),
                (tokens, tokens, tokens, Experts(*places)),
            )
            spread = on_each_device(here, mesh, taken, tokens)
            y_BTD = spread(x_BTD, weights_BTC, chosen_BTC, experts)
        return y_BTD, _load(probs_BTE, chosen_BTC, real_BT)


def _load(probs_BTE: jax.Array, chosen_BTC: jax.Array, real_BT: jax.Array | None) -> RouterLoad:
    E = probs_BTE.shape[-1]
    real_BT = jnp.ones(probs_BTE.shape[:2], bool) if real_BT is None else real_BT
    counts_BTE = jnp.sum(jax.nn.one_hot(chosen_BTC, E, dtype=jnp.float32), axis=2)
    chosen_E, probs_E = (
        jnp.einsum("BTE,BT->E", x_BTE, real_BT.astype(jnp.float32))
        for x_BTE in (counts_BTE, probs_BTE)
    )
    return RouterLoad(chosen_E, probs_E, jnp.sum(real_BT).astype(jnp.float32))


def balance_loss(load: RouterLoad) -> jax.Array:
    """E * sum_e (share of tokens sent to e) * (mean probability of e), the choices counted each (2101.03961 eq. 4); float32 scalar.

    Tokens evenly spread give the number of choices; the further above, the more uneven.
    """
    tokens = jnp.maximum(load.tokens, 1.0)
    return load.probs_E.size * jnp.sum((load.chosen_E / tokens) * (load.probs_E / tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_product(
    compute_dtype: jnp.dtype, x_RI: jax.Array, weight_EIO: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """x W, another W for each run of rows; like layers.product, inputs are cast to compute_dtype and sums are float32, also backward.

    Args:
        sizes_E: int32 rows of each run, one after the other. Rows behind the last give 0, and get no gradient.

    Returns:
        float32 [R, O]; gradients are float32 for x and of the weight's type for the weight.
    """
    x_RI, weight_EIO = x_RI.astype(compute_dtype), weight_EIO.astype(compute_dtype)
    return _of_runs(
        jax.lax.ragged_dot(x_RI, weight_EIO, sizes_E, preferred_element_type=jnp.float32), sizes_E
    )


def _grouped_product_fwd(
    compute_dtype: jnp.dtype, x_RI: jax.Array, weight_EIO: jax.Array, sizes_E: jax.Array
) -> tuple:
    x_RI = x_RI.astype(compute_dtype)
    return grouped_product(compute_dtype, x_RI, weight_EIO, sizes_E), (x_RI, weight_EIO, sizes_E)


def _grouped_product_bwd(compute_dtype: jnp.dtype, saved: tuple, d_y_RO: jax.Array) -> tuple:
    x_RI, weight_EIO, sizes_E = saved
    d_y_RO, weight_EOI = (
        d_y_RO.astype(compute_dtype),
        weight_EIO.astype(compute_dtype).swapaxes(1, 2),
    )
    d_x_RI = jax.lax.ragged_dot(d_y_RO, weight_EOI, sizes_E, preferred_element_type=jnp.float32)
    d_weight_EIO = jax.lax.ragged_dot_general(
        x_RI, d_y_RO, sizes_E, _SUM_OVER_RUNS, preferred_element_type=jnp.float32
    )
    return _of_runs(d_x_RI, sizes_E), d_weight_EIO.astype(weight_EIO.dtype), None


grouped_product.defvjp(_grouped_product_fwd, _grouped_product_bwd)

_SUM_OVER_RUNS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def _of_runs(y_RO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zero behind the last run, where a kernel may leave anything."""
    inside_R = jnp.arange(y_RO.shape[0], dtype=jnp.int32) < jnp.sum(sizes_E)
    return jnp.where(inside_R[:, None], y_RO, 0.0)


def _exchange(
    apply: Callable,
    mesh: Mesh,
    x_BTD: jax.Array,
    weights_BTC: jax.Array,
    chosen_BTC: jax.Array,
    experts: Experts,
) -> jax.Array:
    """On one device of a mesh, with its rows and slots and its share of the experts: `apply` for the tokens of all devices that hold other
    experts, results added up where the tokens come from."""
    tokens, first = (x_BTD, weights_BTC, chosen_BTC), 0
    if mesh.shape["expert"] > 1:
        tokens = [jax.lax.all_gather(x, "expert", axis=0, tiled=True) for x in tokens]
        first = jax.lax.axis_index("expert") * experts.gate_EDF.shape[0]
    if (
        experts.down_bias_ED is not None
    ):  # added once, not by each device that has a share of the products
        experts = experts._replace(
            down_bias_ED=jnp.where(jax.lax.axis_index("tensor") == 0, experts.down_bias_ED, 0)
        )
    y_BTD = apply(*tokens, experts, first)
    if mesh.shape["expert"] > 1:
        y_BTD = jax.lax.psum_scatter(y_BTD, "expert", scatter_dimension=0, tiled=True)
    return jax.lax.psum(y_BTD, "tensor") if mesh.shape["tensor"] > 1 else y_BTD


def _apply(
    activation: str,
    limit: float | None,
    compute_dtype: jnp.dtype,
    x_BTD: jax.Array,
    weights_BTC: jax.Array,
    chosen_BTC: jax.Array,
    experts: Experts,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Each token through those of its experts that are here, from number `first` on, weighted and added up: float32 [B, T, D]."""
    C, E = chosen_BTC.shape[-1], experts.gate_EDF.shape[0]
    x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
    expert_RC = chosen_BTC.reshape(-1) - first
    own_RC = (expert_RC >= 0) & (expert_RC < E)
    expert_RC = jnp.where(
        own_RC, expert_RC, E
    )  # other devices' experts come last, and belong to no group
    order_RC = jnp.argsort(expert_RC, stable=True)
    sorted_RC = jnp.minimum(expert_RC[order_RC], E - 1)
    sizes_E = jnp.sum(
        expert_RC[:, None] == jnp.arange(E, dtype=jnp.int32)[None, :], axis=0, dtype=jnp.int32
    )

    def product(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        y: Any = grouped_product(compute_dtype, x, weight, sizes_E)
        return y if bias is None else y + rounded(bias, compute_dtype)[sorted_RC]

    rows = x_RD[order_RC // C]
    gate, up = (
        product(rows, experts.gate_EDF, experts.gate_bias_EF),
        product(rows, experts.up_EDF, experts.up_bias_EF),
    )
    out = product(gated(activation, limit, gate, up), experts.down_EFD, experts.down_bias_ED)
    out_RCD = jnp.where(own_RC[:, None], out[jnp.argsort(order_RC)], 0.0).reshape(
        -1, C, x_RD.shape[-1]
    )
    return jnp.einsum("RCD,RC->RD", out_RCD, weights_BTC.reshape(-1, C)).reshape(x_BTD.shape)
