# Written by `python -m prefopt_losses.readme`; do not edit.
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

__all__: list[str]

def loss_function(name: str) -> Callable[..., Tensor]: ...
def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    soft_labels: bool = False,
    preference_probability: Tensor | None = None,
) -> Tensor:
    """Direct Preference Optimization: logistic regression on the difference of log-ratios."""

def cdpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Conservative DPO: the labels are taken to be wrong with probability label_smoothing."""

def robust_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Provably robust DPO: an unbiased estimate, under noisy labels, of DPO's loss under clean ones."""

def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    *,
    beta: float = 0.1,
    normalize: Literal["mean", "sum"] = "mean",
    soft_labels: bool = False,
    preference_probability: Tensor | None = None,
) -> Tensor:
    """Identity Preference Optimization: regression of the margin on 1 / (2 tau)."""

def hinge_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    soft_labels: bool = False,
    preference_probability: Tensor | None = None,
) -> Tensor:
    """Hinge loss on the difference of log-ratios, the support-vector counterpart of DPO."""

def gpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    f: str | Callable[[Tensor], Tensor] = "logistic",
    beta: float = 0.1,
    soft_labels: bool = False,
    preference_probability: Tensor | None = None,
) -> Tensor:
    """Generalized Preference Optimization: any scalar function of beta times the log-ratio difference."""

def gpo_squared_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    soft_labels: bool = False,
    preference_probability: Tensor | None = None,
) -> Tensor:
    """GPO with (x - 1)^2: ipo over summed log-ratios at tau = beta / 2, without the factor 1 / (4 tau^2)."""

def gpo_exponential_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    soft_labels: bool = False,
    preference_probability: Tensor | None = None,
) -> Tensor:
    """GPO with e^-x: the optimum of dpo at 2 beta, wrong pairs weighing exponentially more."""

def gpo_truncated_quadratic_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    soft_labels: bool = False,
    preference_probability: Tensor | None = None,
) -> Tensor:
    """GPO with max(0, 1 - x)^2: squared without the pull back beyond the target."""

def gpo_savage_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    soft_labels: bool = False,
    preference_probability: Tensor | None = None,
) -> Tensor:
    """GPO with 1 / (1 + e^x)^2: the optimum of dpo, hopeless pairs given up; not convex."""

def slic_hf_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    delta: float = 1.0,
    lambda_coef: float = 0.1,
) -> Tensor:
    """SLiC-HF: a hinge on plain log-likelihoods, plus the NLL of the chosen completion as regulariser."""

def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
) -> Tensor:
    """SimPO: the likelihood per token is the reward, and the winner must lead by a target margin."""

def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    tokens_per_example: float | Tensor | None = None,
) -> Tensor:
    """Contrastive Preference Optimization: DPO under a uniform reference, plus NLL."""

def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    lambda_coef: float = 0.1,
    tokens_per_example: float | Tensor | None = None,
) -> Tensor:
    """Odds Ratio Preference Optimization: NLL plus a logistic loss on the log odds ratio."""

def sft_loss(
    chosen_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    normalize: Literal["token", "sequence"] = "token",
    tokens_per_example: float | Tensor | None = None,
) -> Tensor:
    """Supervised fine-tuning: negative log-likelihood of the chosen completion, prompt excluded."""

def bco_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Binary Classifier Optimization without reward shift: chosen against 0, rejected against 0."""

def nca_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.01,
) -> Tensor:
    """Noise Contrastive Alignment of a pair: keeps the chosen log-ratio from falling with the rejected."""

def sppo_hard_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.001,
) -> Tensor:
    """Self-Play Preference Optimization with hard wins: log-ratios regressed on +-1 / (2 beta)."""

def apo_zero_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Anchored Preference Optimization, zero: chosen up, rejected down; for data better than the policy."""

def apo_down_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Anchored Preference Optimization, down: both down, rejected more; for data worse than the policy."""
