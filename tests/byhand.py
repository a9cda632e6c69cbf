"""The decoder once more: numpy, float64, head by head and token by token, to check the other by."""

from typing import Any

import numpy as np

from jaxdpo.models.config import ModelConfig

Array = np.ndarray


def by_hand(params: Any, config: ModelConfig, tokens: Array) -> Array:
    """Final hidden states [T, D] of one causal row. No experts, no rope scaling."""
    x = config.embed_scale * np.asarray(params["embed"]["weight"], np.float64)[tokens]
    if config.positions == "learned":
        x = x + params["positions"]["weight"][: len(tokens)]
    for layer in range(config.num_layers):
        weights = _layer(params["layers"], layer)
        windowed = bool(config.window_layers) and config.window_layers[layer]
        out = _attention(
            weights["attn"], _normed(weights, "attn_norm", x, config), windowed, config
        )
        x = x + _normed(weights, "attn_post_norm", out, config)
        out = _mlp(weights["mlp"], _normed(weights, "mlp_norm", x, config), config)
        x = x + _normed(weights, "mlp_post_norm", out, config)
    return _normed(params, "norm", x, config)


def _layer(tree: Any, layer: int) -> Any:
    return {
        key: _layer(leaf, layer) if isinstance(leaf, dict) else np.asarray(leaf[layer], np.float64)
        for key, leaf in tree.items()
    }


def _normed(weights: Any, name: str, x: Array, config: ModelConfig) -> Array:
    """A norm if there is one."""
    if name not in weights:
        return x
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weights[name]["scale"]
            + weights[name]["bias"]
        )
    return _rms(x, weights[name]["scale"], config)


def _rms(x: Array, scale: Array, config: ModelConfig) -> Array:
    return (
        x
        / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        * (scale + (config.norm == "rms_offset"))
    )


def _attention(weights: Any, x: Array, windowed: bool, config: ModelConfig) -> Array:
    q, k, v = (
        np.einsum("td,dnh->tnh", x, weights[name]) + weights.get(f"{name}_bias", 0.0)
        for name in "qkv"
    )
    if config.qk_norm == "head":
        q, k = _rms(q, weights["q_norm"], config), _rms(k, weights["k_norm"], config)
    if config.qk_norm == "all":
        q, k = (
            _rms(y.reshape(len(y), -1), weights[name].ravel(), config).reshape(y.shape)
            for y, name in ((q, "q_norm"), (k, "k_norm"))
        )
    if config.positions == "rope":
        theta = (
            config.local_rope_theta if windowed and config.local_rope_theta else config.rope_theta
        )
        q, k = _turned(q, theta, config.rotary_dim), _turned(k, theta, config.rotary_dim)
    out = np.zeros(q.shape)
    for t, n in np.ndindex(out.shape[:2]):
        first = max(0, t - config.sliding_window + 1) if windowed and config.sliding_window else 0
        keys, values = (
            y[first : t + 1, n * config.num_kv_heads // config.num_heads] for y in (k, v)
        )
        sink = weights["sinks"][n] if config.attention_sinks else -np.inf
        out[t, n] = _weights(keys @ q[t, n], sink, config) @ values
    return np.einsum("tnh,nhd->td", out, weights["o"]) + weights.get("o_bias", 0.0)


def _weights(products: Array, sink: float, config: ModelConfig) -> Array:
    scores = products * (
        config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    )
    if config.attention_softcap is not None:
        scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
    return np.exp(scores) / (np.exp(scores).sum() + np.exp(sink))


def _turned(x: Array, theta: float, size: int) -> Array:
    """Numbers half of `size` apart, as complex pairs, rotated by position times frequency."""
    half = size // 2
    turns = np.exp(1j * np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half))[:, None]
    pairs = (x[..., :half] + 1j * x[..., half:size]) * turns
    return np.concatenate([pairs.real, pairs.imag, x[..., size:]], axis=-1)


def _mlp(weights: Any, x: Array, config: ModelConfig) -> Array:
    up = x @ weights["up"] + weights.get("up_bias", 0.0)
    gate = x @ weights["gate"] + weights.get("gate_bias", 0.0) if config.gated else up
    if config.activation == "silu":
        inner = gate / (1 + np.exp(-gate))
    else:
        inner = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (inner * up if config.gated else inner) @ weights["down"] + weights.get("down_bias", 0.0)
