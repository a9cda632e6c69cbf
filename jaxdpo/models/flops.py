"""Useful work of a step, and the share of the devices' peak that it comes to (MFU, 2204.02311 appendix B).

Counted are matrix products of the weights and of attention's scores, as if every answer's prompt were computed once per pair
(what the shared layout does); recomputation, padding and softmax are not useful work.
"""

import numpy as np

from jaxdpo.models.config import ModelConfig

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}
"""Dense bfloat16 FLOPs a second of one device, by the start of its kind's name, from the makers' data sheets."""


def step_flops(
    model: ModelConfig, lengths: np.ndarray, *, full: bool, live_reference: bool
) -> float:
    """FLOPs of one DPO step; for each weight and token 2 forward, 2 back to activations, 2 for the gradient and 2 of a live reference.

    Args:
        lengths: int [pairs, 3], tokens of prompt, chosen and rejected.
        full: whether all weights are trained; an adapter over them needs no gradients of theirs, and its own products do not count.
        live_reference: whether the reference runs in the step.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    projections = 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
    mlp = (3 if model.gated else 2) * model.hidden_size * model.mlp_size
    if model.num_experts:
        mlp = mlp * model.experts_per_token + model.hidden_size * model.num_experts
    body = model.num_layers * (projections + mlp) * (prompt + chosen + rejected).sum()
    head = model.vocab_size * model.hidden_size * (chosen + rejected).sum()
    seen = (prompt**2 + chosen**2 + rejected**2) / 2 + prompt * (
        chosen + rejected
    )  # keys that all tokens of a pair attend to
    scores = 2 * model.num_layers * model.num_heads * model.head_dim * seen.sum()
    weights = 4 + 2 * full + 2 * live_reference
    return float(weights * (body + head) + (6 + 2 * live_reference) * scores)


def peak_flops(devices: np.ndarray) -> float | None:
    """Peak bfloat16 FLOPs a second of all devices together; None where their kind is not in PEAK_FLOPS."""
    kind = devices.flat[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] * devices.size if known else None
