"""FLOPs of a training step and of the hardware: model FLOPs utilization (MFU, 2204.02311 app. B).

Counted are the matmuls of the weights and of attention's scores, with each prompt computed once per
pair (prefix sharing). Recomputation, padding and softmax are not counted: they are no useful work.

Not the compiler's cost_analysis() because that counts the recomputation of remat, and the body of a
loop (here over layers, chunks and microbatches) once.
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
"""Dense bfloat16 FLOPs per second of one device, from the vendors' data sheets, by the prefix of
its `device_kind`."""


def step_flops(
    model: ModelConfig, lengths: np.ndarray, *, full: bool, live_reference: bool
) -> float:
    """FLOPs of one DPO step.

    For each weight and token: 2 in the forward pass, 2 for the gradient of the activations, 2 for
    that of the weight, and 2 for a reference that runs in the step.

    Args:
        lengths: int [pairs, 3], tokens of prompt, chosen and rejected completion.
        full: whether all weights are trained. LoRA needs no gradient of the weights under the
            adapter, whose own matmuls are not counted.
        live_reference: whether the reference runs in the step.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    projections = 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
    mlp = (3 if model.gated else 2) * model.hidden_size * model.mlp_size
    if model.num_experts:
        mlp = mlp * model.experts_per_token + model.hidden_size * model.num_experts
    body = model.num_layers * (projections + mlp) * (prompt + chosen + rejected).sum()
    head = model.vocab_size * model.hidden_size * (chosen + rejected).sum()
    # Keys that all tokens of a pair attend to: causal in each part, and completions see the prompt.
    keys = (prompt**2 + chosen**2 + rejected**2) / 2 + prompt * (chosen + rejected)
    scores = 2 * model.num_layers * model.num_heads * model.head_dim * keys.sum()
    per_weight = 4 + 2 * full + 2 * live_reference
    per_score = 6 + 2 * live_reference  # scores have no weights: both factors need a gradient
    return float(per_weight * (body + head) + per_score * scores)


def peak_flops(devices: np.ndarray) -> float | None:
    """Peak bfloat16 FLOPs per second of all devices; None if their kind is not in PEAK_FLOPS."""
    kind = devices.flat[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    if not known:
        return None
    longest = max(known, key=len)  # "TPU v5 lite" is also a "TPU v5"
    return PEAK_FLOPS[longest] * devices.size
