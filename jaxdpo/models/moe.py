"""Mixture of experts: a router sends each token to a few of many MLPs.

Tokens are sorted by expert, so that each expert's matmul is one run of tokens
(`jax.lax.ragged_dot`, which compiles for every platform; the Megablox kernel in JAX is for TPUs
only). No token is dropped.

Expert parallelism: the experts are sharded over the mesh axis `expert`, whose devices exchange
their tokens. Each computes its own experts for the tokens of all, and the results are summed where
a token came from. Over `tensor`, each expert's inner dimension is sharded.

Shape suffixes: B packed sequences, T token positions, R = B T tokens, E experts, C chosen experts
of a token, D model, F mlp, L layers; I inputs and O outputs of a matmul.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.distributed.sharding import activation_spec, on_each_device
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.layers import constant_if, gated_activation, linear, param, round_to
from jaxdpo.models.matmul import einsum, precision_of


class RouterLoad(NamedTuple):
    """How a router distributed its tokens: float32 sums over tokens (and later over layers)."""

    chosen_E: jax.Array
    """Tokens sent to each expert."""
    probs_E: jax.Array
    """The router's probability of each expert."""
    tokens: jax.Array
    """Tokens counted."""


class Experts(NamedTuple):
    """The experts' weights of one layer; biases may be None."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array
    gate_bias_EF: jax.Array | None
    up_bias_EF: jax.Array | None
    down_bias_ED: jax.Array | None


_EXPERT_SPECS: dict[str, PartitionSpec] = {
    "gate_EDF": PartitionSpec("expert", None, "tensor"),
    "up_EDF": PartitionSpec("expert", None, "tensor"),
    "down_EFD": PartitionSpec("expert", "tensor", None),
    "gate_bias_EF": PartitionSpec("expert", "tensor"),
    "up_bias_EF": PartitionSpec("expert", "tensor"),
    "down_bias_ED": PartitionSpec("expert", None),
}
"""Sharding of one layer's experts while they compute: all of D, gathered from `fsdp`."""


class MoE(nnx.Module):
    """A router and its experts (Mixtral, 2401.04088). It holds all layers' weights, stacked."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        L, D, F, E = config.num_layers, config.hidden_size, config.mlp_size, config.num_experts
        normal = functools.partial(
            param, rngs, std=config.initializer_range, dtype=dtype, num_inputs=1
        )
        bias = functools.partial(constant_if, config.expert_bias, rngs, dtype=dtype)
        self.router = normal((L, D, E), ("layer", "embed", "router"))
        self.router_bias = constant_if(
            config.router_bias, rngs, (L, E), ("layer", "router"), dtype=dtype
        )
        self.gate = normal((L, E, D, F), ("layer", "expert", "expert_embed", "expert_mlp"))
        self.up = normal((L, E, D, F), ("layer", "expert", "expert_embed", "expert_mlp"))
        self.down = normal((L, E, F, D), ("layer", "expert", "expert_mlp", "expert_embed"))
        self.gate_bias = bias((L, E, F), ("layer", "expert", "expert_mlp"))
        self.up_bias = bias((L, E, F), ("layer", "expert", "expert_mlp"))
        self.down_bias = bias((L, E, D), ("layer", "expert", "norm"))
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        token_mask_BT: jax.Array | None,
        compute_dtype: jnp.dtype,
        mesh: Mesh | None,
    ) -> tuple[jax.Array, RouterLoad]:
        """Each token through its experts.

        Args:
            x_BTD: float32.
            token_mask_BT: bool, the tokens that count for the load. None: all.

        Returns:
            (float32 [B, T, D], how the experts were used.)
        """
        config = self.config
        logits_BTE = linear("BTD,DE->BTE", x_BTD, self.router, self.router_bias, compute_dtype)
        probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        weights_BTC, chosen_BTC = jax.lax.top_k(probs_BTE, config.experts_per_token)
        if config.norm_topk:
            weights_BTC = weights_BTC / weights_BTC.sum(-1, keepdims=True)
        experts = self._experts()
        apply = functools.partial(
            _apply_experts, config.activation, config.activation_limit, compute_dtype
        )
        if mesh is not None and mesh.size > 1:
            specs = [
                None if weight is None else _EXPERT_SPECS[name]
                for name, weight in experts._asdict().items()
            ]
            apply = _expert_parallel(apply, mesh, Experts(*specs), x_BTD.shape[1])  # type: ignore[arg-type]
        y_BTD = apply(x_BTD, weights_BTC, chosen_BTC, experts)
        return y_BTD, _router_load(probs_BTE, chosen_BTC, token_mask_BT)

    def _experts(self) -> Experts:
        """One layer's weights as arrays (inside the decoder's scan)."""
        biases = [
            None if bias is None else bias[...]
            for bias in (self.gate_bias, self.up_bias, self.down_bias)
        ]
        return Experts(self.gate[...], self.up[...], self.down[...], *biases)


def _router_load(
    probs_BTE: jax.Array, chosen_BTC: jax.Array, token_mask_BT: jax.Array | None
) -> RouterLoad:
    E = probs_BTE.shape[-1]
    if token_mask_BT is None:
        token_mask_BT = jnp.ones(probs_BTE.shape[:2], bool)
    counts_BTE = jnp.sum(jax.nn.one_hot(chosen_BTC, E, dtype=jnp.float32), axis=2)
    chosen_E = einsum("BTE,BT->E", counts_BTE, token_mask_BT.astype(jnp.float32))
    probs_E = einsum("BTE,BT->E", probs_BTE, token_mask_BT.astype(jnp.float32))
    return RouterLoad(chosen_E, probs_E, jnp.sum(token_mask_BT).astype(jnp.float32))


def balance_loss(load: RouterLoad) -> jax.Array:
    """Load-balancing loss: E * sum_e (share of tokens sent to e) * (mean probability of e).

    Switch Transformer, 2101.03961 eq. 4, with each chosen expert of a token counted: an even load
    gives C, and the more uneven the load, the larger the loss. float32 scalar.
    """
    tokens = jnp.maximum(load.tokens, 1.0)
    return load.probs_E.size * jnp.sum((load.chosen_E / tokens) * (load.probs_E / tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_matmul(
    compute_dtype: jnp.dtype, x_RI: jax.Array, weight_EIO: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """x W with another W for each group of rows.

    Like matmul.matmul: inputs are cast to compute_dtype and accumulation is float32, also in the
    backward pass.

    Args:
        sizes_E: int32 rows of each group, one group after the other. Rows after the last group
            give 0 and get no gradient.

    Returns:
        float32 [R, O]; gradients are float32 for x and of the weight's dtype for the weight.
    """
    x_RI, weight_EIO = x_RI.astype(compute_dtype), weight_EIO.astype(compute_dtype)
    y_RO = _ragged_dot(x_RI, weight_EIO, sizes_E)
    return _zero_outside_groups(y_RO, sizes_E)


def _grouped_matmul_fwd(
    compute_dtype: jnp.dtype, x_RI: jax.Array, weight_EIO: jax.Array, sizes_E: jax.Array
) -> tuple:
    x_RI = x_RI.astype(compute_dtype)
    return grouped_matmul(compute_dtype, x_RI, weight_EIO, sizes_E), (x_RI, weight_EIO, sizes_E)


def _grouped_matmul_bwd(compute_dtype: jnp.dtype, saved: tuple, d_y_RO: jax.Array) -> tuple:
    x_RI, weight_EIO, sizes_E = saved
    d_y_RO = d_y_RO.astype(compute_dtype)
    weight_EOI = weight_EIO.astype(compute_dtype).swapaxes(1, 2)
    d_x_RI = _ragged_dot(d_y_RO, weight_EOI, sizes_E)
    d_weight_EIO = jax.lax.ragged_dot_general(
        x_RI,
        d_y_RO,
        sizes_E,
        _CONTRACT_ROWS_BY_GROUP,
        precision=precision_of(x_RI, d_y_RO),
        preferred_element_type=jnp.float32,
    )
    return _zero_outside_groups(d_x_RI, sizes_E), d_weight_EIO.astype(weight_EIO.dtype), None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)

# x^T y for each group of rows: [R, I], [R, O] -> [E, I, O].
_CONTRACT_ROWS_BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def _ragged_dot(x_RI: jax.Array, weight_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(
        x_RI,
        weight_EIO,
        sizes_E,
        precision=precision_of(x_RI, weight_EIO),
        preferred_element_type=jnp.float32,
    )


def _zero_outside_groups(y_RO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zero after the last group, where a ragged_dot kernel may leave anything."""
    inside_R = jnp.arange(y_RO.shape[0], dtype=jnp.int32) < jnp.sum(sizes_E)
    return jnp.where(inside_R[:, None], y_RO, 0.0)


def _expert_parallel(apply: Callable, mesh: Mesh, specs: Experts, num_tokens: int) -> Callable:
    """`apply` over the devices of a mesh; `specs` are the shardings of the experts' weights."""
    tokens = activation_spec(mesh, num_tokens)
    exchange: Any = functools.partial(_exchange_tokens, apply, mesh)
    return on_each_device(exchange, mesh, (tokens, tokens, tokens, specs), tokens)


def _exchange_tokens(
    apply: Callable,
    mesh: Mesh,
    x_BTD: jax.Array,
    weights_BTC: jax.Array,
    chosen_BTC: jax.Array,
    experts: Experts,
) -> jax.Array:
    """Expert parallelism, on one device, with its tokens and its shard of the experts.

    `apply` for the tokens of all devices that hold other experts; the results are summed where the
    tokens came from.
    """
    tokens, first = (x_BTD, weights_BTC, chosen_BTC), 0
    if mesh.shape["expert"] > 1:
        tokens = [jax.lax.all_gather(x, "expert", axis=0, tiled=True) for x in tokens]
        first = jax.lax.axis_index("expert") * experts.gate_EDF.shape[0]
    if experts.down_bias_ED is not None:
        # Added by one device of `tensor`: each of them has a part of the sum that it belongs to.
        is_first = jax.lax.axis_index("tensor") == 0
        experts = experts._replace(down_bias_ED=jnp.where(is_first, experts.down_bias_ED, 0))
    y_BTD = apply(*tokens, experts, first)
    if mesh.shape["expert"] > 1:
        y_BTD = jax.lax.psum_scatter(y_BTD, "expert", scatter_dimension=0, tiled=True)
    return jax.lax.psum(y_BTD, "tensor") if mesh.shape["tensor"] > 1 else y_BTD


def _apply_experts(
    activation: str,
    limit: float | None,
    compute_dtype: jnp.dtype,
    x_BTD: jax.Array,
    weights_BTC: jax.Array,
    chosen_BTC: jax.Array,
    experts: Experts,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Each token through those of its experts that are on this device, weighted and summed.

    Args:
        weights_BTC, chosen_BTC: weight and number of each token's experts.
        first: number of this device's first expert.

    Returns:
        float32 [B, T, D].
    """
    C, E = chosen_BTC.shape[-1], experts.gate_EDF.shape[0]
    x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
    expert_RC = chosen_BTC.reshape(-1) - first
    local_RC = (expert_RC >= 0) & (expert_RC < E)
    # Other devices' experts are sorted to the end, where they belong to no group.
    expert_RC = jnp.where(local_RC, expert_RC, E)
    order_RC = jnp.argsort(expert_RC, stable=True)
    sorted_RC = jnp.minimum(expert_RC[order_RC], E - 1)
    is_expert_RCE = expert_RC[:, None] == jnp.arange(E, dtype=jnp.int32)[None, :]
    sizes_E = jnp.sum(is_expert_RCE, axis=0, dtype=jnp.int32)

    def project(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        y: Any = grouped_matmul(compute_dtype, x, weight, sizes_E)
        return y if bias is None else y + round_to(bias, compute_dtype)[sorted_RC]

    tokens = x_RD[order_RC // C]
    gate = project(tokens, experts.gate_EDF, experts.gate_bias_EF)
    up = project(tokens, experts.up_EDF, experts.up_bias_EF)
    inner = gated_activation(activation, limit, gate, up)
    out = project(inner, experts.down_EFD, experts.down_bias_ED)
    # argsort of a permutation is its inverse: back to the order of the tokens.
    out = jnp.where(local_RC[:, None], out[jnp.argsort(order_RC)], 0.0)
    out_RCD = out.reshape(-1, C, x_RD.shape[-1])
    return einsum("RCD,RC->RD", out_RCD, weights_BTC.reshape(-1, C)).reshape(x_BTD.shape)
