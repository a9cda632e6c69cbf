"""Options of the section `loss`: which losses, and their constants; and the constants' defaults."""

import dataclasses
from typing import Literal

from jaxdpo.config.sections import require
from jaxdpo.config.sections import section as _section


@_section
class LossSection:
    """What is minimised. docs/losses.md has the formulas and the papers. An option that the loss does not use is an error."""

    name: str | list[str] = "sigmoid"
    """One loss, or a list of losses that are added with loss.weights."""
    weights: list[float] | None = None
    """One factor for each name in the list. Default: all 1."""
    beta: float | None = None
    """Strength of the pull towards the reference. Default 0.1; 2.0 for simpo (a mean per token, not a sum)."""
    label_smoothing: float | None = None
    """Probability that a label is wrong (cdpo, robust, exo_pair, aot, aot_unpaired, simpo, cpo). Default 0.1 for cdpo and robust,
    0.001 for exo_pair, else 0."""
    ipo_length: Literal["mean", "sum"] | None = None
    """IPO's log-ratios: mean per token (TRL, as its authors asked) or sum (original DPO code). Default mean."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = None
    """Divergence from the reference that shapes the log-ratio difference. Default reverse_kl (plain DPO)."""
    alpha_divergence: float | None = None
    """Coefficient of f_divergence=alpha; 0 is forward_kl, 1 reverse_kl. Default 0.5, as in TRL."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens beyond the shorter answer's length, 0 to 1. Default 1 (off)."""
    length_penalty: float | None = None
    """R-DPO: penalty on the reward per token; adds length_penalty * (chosen - rejected tokens) to the logit. Default 0 (off)."""
    wpo: bool = False
    """WPO: weigh each pair by how likely the policy is to have written it."""
    discopop_tau: float | None = None
    """DiscoPOP's temperature. Default 0.05."""
    simpo_gamma: float | None = None
    """SimPO's target margin, in units of the scaled logit. Default 0.5."""
    orpo_lambda: float | None = None
    """ORPO's weight of the odds-ratio term. Default 0.1."""
    cpo_alpha: float | None = None
    """CPO's weight of the chosen answer's NLL. Default 1.0."""
    dpop_lambda: float | None = None
    """DPOP's penalty when the chosen answer falls below the reference. Default 50."""
    ref_sync_every: int = 0
    """TR-DPO: move the reference towards the policy every so many steps. 0: never."""
    ref_mixup_alpha: float | None = None
    """TR-DPO: share of the policy in the moved reference. Default 0.6."""
    router_aux_coef: float | None = None
    """Mixtures of experts: weight of the loss that spreads tokens evenly over the experts.
    Default: router_aux_loss_coef of config.json if that also says output_router_logits (as TRL), else 0."""

    @property
    def names(self) -> list[str]:
        """The losses as a list."""
        return [self.name] if isinstance(self.name, str) else list(self.name)

    def __post_init__(self) -> None:
        smoothing, ld, tr = self.label_smoothing, self.ld_alpha, self.ref_mixup_alpha
        require(
            (bool(self.names), "loss.name=[]: name at least one loss"),
            (
                len(set(self.names)) == len(self.names),
                f"loss.name={self.name}: names a loss twice; add up its weights instead",
            ),
            (
                self.weights is None or len(self.weights) == len(self.names),
                f"loss.weights={self.weights}: needs one factor for each of loss.name={self.names}",
            ),
            (self.beta is None or self.beta > 0, f"loss.beta={self.beta}: must be above 0"),
            (
                smoothing is None or 0 <= smoothing < 0.5,
                f"loss.label_smoothing={smoothing}: must be at least 0 and below 0.5",
            ),
            (ld is None or 0 <= ld <= 1, f"loss.ld_alpha={ld}: must lie between 0 and 1"),
            (
                tr is None or 0 < tr <= 1,
                f"loss.ref_mixup_alpha={tr}: must be above 0 and at most 1",
            ),
            (
                self.ref_sync_every >= 0,
                f"loss.ref_sync_every={self.ref_sync_every}: must be 0 (never) or a number of steps",
            ),
            (
                tr is None or self.ref_sync_every > 0,
                f"loss.ref_mixup_alpha={tr}: does nothing while loss.ref_sync_every=0. Set loss.ref_sync_every",
            ),
            (
                self.alpha_divergence is None or self.f_divergence == "alpha",
                f"loss.alpha_divergence={self.alpha_divergence}: needs loss.f_divergence=alpha",
            ),
            (
                self.discopop_tau is None or self.discopop_tau > 0,
                f"loss.discopop_tau={self.discopop_tau}: must be above 0",
            ),
            (
                self.router_aux_coef is None or self.router_aux_coef >= 0,
                f"loss.router_aux_coef={self.router_aux_coef}: must be 0 (off) or positive",
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The constants that one loss computes with. The values here are the defaults of the options of the same names.

    A loss with other defaults says so in its row of LOSSES (losses/registry.py).
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
        given = {field.name: getattr(section, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: v for k, v in given.items() if v is not None})


REF_MIXUP_ALPHA = 0.6
"""Default of loss.ref_mixup_alpha, where loss.ref_sync_every is set: TR-DPO's soft update (2404.09656), as in TRL."""
