"""ModelConfig: all that the decoder needs to know. Families differ by its values alone.

hfconfig.py reads it from a Hugging Face config.json and writes it back, families.py says what a model_type means.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts. Each kind reads its own fields; `linear` reads `factor` only.

    linear is position interpolation (arXiv 2306.15595), llama3 the scaling of the Llama 3.1 report (arXiv 2407.21783), yarn that of
    arXiv 2309.00071, longrope that of arXiv 2402.13753.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    """The context, in tokens, that the model had before it was stretched."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn this often within the original context keep their frequency."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are divided by `factor`; those between are blended."""
    truncate: bool = True
    """yarn: whether the bounds of the blend are rounded to whole dimensions."""
    attention_factor: float = 1.0
    """yarn, longrope: multiplies cosines and sines."""
    short_factor: tuple[float, ...] = ()
    """longrope: divides each frequency, within the original context."""
    long_factor: tuple[float, ...] = ()
    """longrope: the same beyond the original context."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. Sizes are counts, `max_positions` and `sliding_window` are in tokens."""

    family: str
    """Hugging Face model_type: a key of FAMILIES. It names tensors and keys in files and changes no computation."""
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
    """Norms of what attention and MLP put out, before it is added to the residual stream."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMS norm of queries and keys before rope: of each head, or over all heads together. An rms_offset model's have the offset too."""

    positions: Literal["rope", "learned"] = "rope"
    """learned: a vector for each position is added to the token's."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    """Share of each head that rope turns, from its start."""
    local_rope_theta: float | None = None
    """rope_theta of the layers that have the window, never scaled; None: as in all layers."""
    sliding_window: int | None = None
    """A token sees this many tokens, itself included; None: all before it."""
    window_layers: tuple[bool, ...] = ()
    """Which layers have the window, one for each; () when there is none."""

    attention_scale: float | None = None
    """Multiplies the scores; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores s become cap * tanh(s / cap); likewise the logits by `logit_softcap`."""
    logit_softcap: float | None = None
    attention_sinks: bool = False
    """Each head's softmax has one more, learned score that takes weight and gives nothing."""

    activation: Literal["silu", "gelu_tanh", "clamped_swish"] = "silu"
    """clamped_swish: (up + 1) * gate * sigmoid(1.702 gate), gate at most the limit, up within plus or minus the limit."""
    gated: bool = True
    """down(act(gate x) * up x); False: down(act(up x))."""
    activation_limit: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    """Multiplies the token vectors."""

    num_experts: int = 0
    """0: one MLP for all tokens."""
    experts_per_token: int = 0
    norm_topk: bool = False
    """Whether the weights of a token's experts are divided by their sum."""
    router_bias: bool = False
    expert_bias: bool = False
    router_aux_coef: float = 0.0
    """Weight of the load-balancing loss, as config.json proposes it."""

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of each head rope turns."""
        return int(self.head_dim * self.rotary_fraction)
