"""ModelConfig: everything the decoder needs to know. Model families differ by its values alone.

hf/config_json.py converts it from and to a Hugging Face config.json; hf/families.py has what each
model_type means.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary frequencies for long contexts.

    linear is position interpolation (2306.15595), llama3 the scaling of the Llama 3.1 report
    (2407.21783), yarn that of 2309.00071, longrope that of 2402.13753. Each kind reads its own
    fields; `linear` reads `factor` only.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    """The context, in tokens, that the model was trained with before the scaling."""
    beta_fast: float = 32.0
    """yarn: dimensions with more rotations within the original context keep their frequency."""
    beta_slow: float = 1.0
    """yarn: frequencies of dimensions with fewer rotations are divided by `factor`; those between
    are interpolated."""
    truncate: bool = True
    """yarn: whether the bounds of the interpolation are rounded to integer dimensions."""
    attention_factor: float = 1.0
    """yarn, longrope: multiplies cosines and sines."""
    short_factor: tuple[float, ...] = ()
    """longrope: divides each frequency, within the original context."""
    long_factor: tuple[float, ...] = ()
    """longrope: the same beyond the original context."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder. `max_positions` and `sliding_window` are in tokens."""

    family: str
    """Hugging Face model_type: a key of hf.families.FAMILIES. It names tensors and keys in files
    and changes no computation."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    """Width of the MLP, or of one expert."""
    max_positions: int
    initializer_range: float = 0.02
    tied_head: bool = False

    norm: Literal["rms", "rms_offset", "layer"] = "rms"
    """rms_offset multiplies by 1 + scale; layer subtracts the mean and has a bias."""
    norm_eps: float = 1e-6
    pre_norm: bool = True
    """Norms before attention and MLP."""
    post_norm: bool = False
    """Norms of the outputs of attention and MLP, before they are added to the residual stream."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMS norm of queries and keys before RoPE: of each head, or over all heads together. With the
    offset in rms_offset models."""

    positions: Literal["rope", "learned"] = "rope"
    """learned: an embedding of each position is added to the token's."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    """Fraction of each head's dimensions that RoPE rotates, from the first on."""
    local_rope_theta: float | None = None
    """rope_theta of the layers with a sliding window, never scaled; None: as in all layers."""
    sliding_window: int | None = None
    """Sliding window attention: a token sees this many, itself included; None: all before it."""
    window_layers: tuple[bool, ...] = ()
    """Whether each layer has the sliding window; () when none has."""

    attention_scale: float | None = None
    """Factor of the scores; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Logit soft-capping of the scores: s becomes cap * tanh(s / cap)."""
    logit_softcap: float | None = None
    """The same of the LM head's logits."""
    attention_sinks: bool = False
    """Each head's softmax has one more score, learned, of a key whose value is 0 (2309.17453)."""

    activation: Literal["silu", "gelu_tanh", "clamped_swish"] = "silu"
    """clamped_swish: (up + 1) * gate * sigmoid(1.702 gate), with gate clamped to at most
    `activation_limit`, and up to plus or minus it."""
    gated: bool = True
    """down(act(gate x) * up x); False: down(act(up x))."""
    activation_limit: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    """Factor of the token embeddings."""

    num_experts: int = 0
    """0: an MLP instead of a mixture of experts."""
    experts_per_token: int = 0
    norm_topk: bool = False
    """Whether the weights of a token's experts are divided by their sum."""
    router_bias: bool = False
    expert_bias: bool = False
    router_aux_coef: float = 0.0
    """Weight of the load-balancing loss, as config.json has it."""

    @property
    def rotary_dim(self) -> int:
        """Number of leading dimensions of each head that RoPE rotates."""
        return int(self.head_dim * self.rotary_fraction)
