"""Options of the section `loss`: which losses, and their constants; and the constants' defaults."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from jaxdpo.config.sections import refuse
from jaxdpo.config.sections import section as _section


@_section
class LossSection:
    """The preference loss. docs/losses.md has the formulas and the papers. An option that the loss
    does not use is an error."""

    name: str | list[str] = "sigmoid"
    """One loss, or a list of losses that are added with loss.weights. sigmoid is DPO."""
    weights: list[float] | None = None
    """One factor for each name in the list. Default: all 1."""

    # Constants of several losses.

    beta: float | None = None
    """Strength of the pull towards the reference. Default 0.1; 2.0 for simpo (a mean per token, not
    a sum)."""
    label_smoothing: float | None = None
    """Probability that a label is wrong (cdpo, robust, exo_pair, aot, aot_unpaired, simpo, cpo).
    Default 0.1 for cdpo and robust, 0.001 for exo_pair, else 0."""

    # Modifiers and constants of single losses.

    ipo_length: Literal["mean", "sum"] | None = None
    """IPO's log-ratios: mean per token (TRL, as its authors asked) or sum (original DPO code).
    Default mean."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = None
    """Divergence from the reference that shapes the log-ratio difference. Default reverse_kl (plain
    DPO)."""
    alpha_divergence: float | None = None
    """Coefficient of f_divergence=alpha; 0 is forward_kl, 1 reverse_kl. Default 0.5, as in TRL."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens beyond the shorter answer's length, 0 to 1. Default 1 (off)."""
    length_penalty: float | None = None
    """R-DPO: penalty on the reward per token; adds length_penalty * (chosen - rejected tokens) to
    the logit. Default 0 (off)."""
    wpo: bool = False
    """WPO: weight each pair by the policy's probability of having written it."""
    discopop_tau: float | None = None
    """DiscoPOP's temperature. Default 0.05."""
    simpo_gamma: float | None = None
    """SimPO's target margin, in units of the scaled logit. Default 0.5."""
    orpo_lambda: float | None = None
    """ORPO's weight of the odds-ratio term. Default 0.1."""
    cpo_alpha: float | None = None
    """CPO's weight of the chosen answer's negative log-likelihood (NLL). Default 1.0."""
    dpop_lambda: float | None = None
    """DPOP's penalty when the chosen answer's log-prob falls below the reference's. Default 50."""

    # TR-DPO's moving reference, and mixtures of experts.

    ref_sync_every: int = 0
    """TR-DPO: move the reference towards the policy every so many steps. 0: never."""
    ref_mixup_alpha: float | None = None
    """TR-DPO: share of the policy in the moved reference. Default 0.6."""
    router_aux_coef: float | None = None
    """Mixtures of experts: weight of the load-balancing loss of the router. Default:
    router_aux_loss_coef of config.json if that also sets output_router_logits (as TRL), else 0."""

    @property
    def names(self) -> list[str]:
        """The losses as a list."""
        return [self.name] if isinstance(self.name, str) else list(self.name)

    def __post_init__(self) -> None:
        refuse([*self._invalid_mixture(), *self._invalid_constants()])

    def _invalid_mixture(self) -> Iterator[str]:
        if not self.names:
            yield "loss.name=[]: name at least one loss"
        if len(set(self.names)) < len(self.names):
            yield f"loss.name={self.name}: names a loss twice; add up its weights instead"
        if self.weights is not None and len(self.weights) != len(self.names):
            yield (
                f"loss.weights={self.weights}: needs one factor for each of loss.name={self.names}"
            )

        if self.weights is not None and any(w < 0 for w in self.weights):
            yield (
                f"loss.weights={self.weights}: must not be negative, which would train towards a "
                "larger loss"
            )
        elif self.weights is not None and not any(self.weights):
            yield (
                f"loss.weights={self.weights}: are all 0, so nothing would be trained. "
                "Give a loss a weight above 0"
            )

    def _invalid_constants(self) -> Iterator[str]:
        smoothing, ld_alpha, mixup = self.label_smoothing, self.ld_alpha, self.ref_mixup_alpha
        if self.beta is not None and self.beta <= 0:
            yield f"loss.beta={self.beta}: must be above 0"
        if smoothing is not None and not 0 <= smoothing < 0.5:
            yield f"loss.label_smoothing={smoothing}: must be at least 0 and below 0.5"
        if ld_alpha is not None and not 0 <= ld_alpha <= 1:
            yield f"loss.ld_alpha={ld_alpha}: must lie between 0 and 1"
        if self.alpha_divergence is not None and self.f_divergence != "alpha":
            yield f"loss.alpha_divergence={self.alpha_divergence}: needs loss.f_divergence=alpha"
        if self.discopop_tau is not None and self.discopop_tau <= 0:
            yield f"loss.discopop_tau={self.discopop_tau}: must be above 0"
        if self.router_aux_coef is not None and self.router_aux_coef < 0:
            yield f"loss.router_aux_coef={self.router_aux_coef}: must be 0 (off) or positive"
        if self.ref_sync_every < 0:
            yield (
                f"loss.ref_sync_every={self.ref_sync_every}: must be 0 (never) or a number of steps"
            )
        if mixup is not None and not 0 < mixup <= 1:
            yield f"loss.ref_mixup_alpha={mixup}: must be above 0 and at most 1"
        if mixup is not None and self.ref_sync_every <= 0:
            yield (
                f"loss.ref_mixup_alpha={mixup}: has no effect while loss.ref_sync_every=0. "
                "Set loss.ref_sync_every"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The constants that one loss computes with, with the defaults of the options of the same
    names.

    They are TRL's defaults. A loss with others has them in its row of LOSSES (losses/registry.py).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    ipo_length: str = "mean"
    f_divergence: str = "reverse_kl"
    alpha_divergence: float = 0.5
    length_penalty: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    orpo_lambda: float = 0.1
    cpo_alpha: float = 1.0
    dpop_lambda: float = 50.0

    def of(self, section: LossSection) -> "LossOptions":
        """The section's values, and these where it leaves an option open."""
        given = {}
        for field in dataclasses.fields(self):
            value = getattr(section, field.name)
            if value is not None:
                given[field.name] = value
        return dataclasses.replace(self, **given)


REF_MIXUP_ALPHA = 0.6
"""Default of loss.ref_mixup_alpha, where loss.ref_sync_every is set: TR-DPO's soft update
(2404.09656), as in TRL."""
