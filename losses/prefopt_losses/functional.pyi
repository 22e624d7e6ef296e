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

def dpo_norm_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 5.0,
) -> Tensor:
    """Length-normalised DPO: logistic regression on the difference of mean log-ratios."""

def exo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.001,
) -> Tensor:
    """Efficient Exact Optimization of pairs: reverse KL from the policy's preference to the labels."""

def discopop_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.05,
    tau: float = 0.05,
) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss: logistic for wrong pairs, exponential for right ones; not convex."""

def cell_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.05,
) -> Tensor:
    """Combined exponential and logistic loss: the mean of gpo_exponential and dpo."""

def padll_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.05,
) -> Tensor:
    """Performance adaptive decay logistic loss: 0.9 of dpo for right pairs, 0.45 for wrong ones; jumps at 0."""

def bpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    sba_lambda: float = 0.5,
) -> Tensor:
    """Bregman Preference Optimization with the scaled Basu power divergence of likelihood ratios."""

def f_dpo_forward_kl_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """f-DPO with the forward KL divergence: completions that the policy forgets weigh exponentially."""

def f_dpo_js_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """f-DPO with the Jensen-Shannon divergence: completions that gain much gain little more."""

def f_dpo_alpha_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Tensor:
    """f-DPO with an alpha-divergence, between reverse KL (dpo, alpha towards 0) and forward KL (alpha towards 1)."""

def chi_po_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    r_max: float = 5.0,
) -> Tensor:
    """Chi-squared Preference Optimization: chi-squared and KL divergence together, against overoptimization."""

def odpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> Tensor:
    """DPO with an offset: the better the chosen completion scores, the larger the margin asked for."""

def modpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float = 0.1,
    w: float = 0.5,
) -> Tensor:
    """Multi-objective DPO: pairs express one objective, scores the others; the policy optimises their weighted sum."""

def r_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
) -> Tensor:
    """Length-regularised DPO: a longer winner has part of its margin already, so length is not what is learnt."""

def dpop_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    lambda_coef: float = 50.0,
) -> Tensor:
    """DPO-Positive: every nat that the chosen completion loses to the reference must be won back lambda times."""

def dpo_shift_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    lambda_coef: float = 0.7,
) -> Tensor:
    """DPO-Shift: the rejected reward counts less, so that the chosen likelihood falls less; dpo at 1."""

def cal_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.002,
) -> Tensor:
    """Calibrated DPO: logistic regression without beta, plus a regression of log-ratios on +-1 / (2 beta)."""

def reward_distillation_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float = 0.1,
    eta: float = 1.0,
) -> Tensor:
    """Reward model distillation: regression of beta * rho on the score gap; of an ensemble, on the mean gap."""

def pessimistic_distillation_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float = 0.1,
    eta: float = 1.0,
    gamma: float = 0.001,
) -> Tensor:
    """Pessimistic reward model distillation: the nearest model of an ensemble, and the reference's own completions."""

def rpo_bwd_kl_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float = 0.2,
    eta: float = 1.0,
) -> Tensor:
    """Reward-aware preference optimization, backward KL: dpo with the soft labels of the scores."""

def rpo_fwd_kl_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float = 0.2,
    eta: float = 1.0,
) -> Tensor:
    """Reward-aware preference optimization, forward KL: exo with the label that Bradley-Terry reads off scores."""

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

def alphapo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.5,
    alpha: float = 0.25,
    gamma: float = 0.1,
) -> Tensor:
    """AlphaPO: SimPO with a reward of another shape, (1 - p^-alpha) / alpha of the probability per token."""

def simper_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """SimPER: the inverse perplexity of the chosen completion up, of the rejected one down; no hyper-parameters."""

def repo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    gamma: float = 0.6,
) -> Tensor:
    """RePO: SimPO's margin under a hinge, the limit of SimPO as beta grows."""

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

def tpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    gold_logps: Tensor,
    gold_lengths: Tensor,
    *,
    beta: float = 0.01,
    alpha: float = 1.0,
    normalize: Literal["token", "sequence"] = "token",
) -> Tensor:
    """Triple Preference Optimization: CPO's pair, with the NLL of a third, gold completion instead of the chosen."""

def tpo_l_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    gold_logps: Tensor,
    gold_lengths: Tensor,
    *,
    beta: float = 0.01,
    gamma: float = 0.5,
    alpha: float = 1.0,
    normalize: Literal["token", "sequence"] = "token",
) -> Tensor:
    """TPO-L: tpo with the likelihood per token as reward, and a target margin."""

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

def kto_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    mismatched_logps: Tensor,
    ref_mismatched_logps: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky Optimization: a bounded value of each log-ratio, counted from the mean drift."""

def bco_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.01,
    state: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Binary Classifier Optimization: chosen and rejected classified against the running mean of all rewards."""

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

def sppo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    preference_probability: Tensor,
    *,
    beta: float = 0.001,
) -> Tensor:
    """Self-Play Preference Optimization: log-ratios regressed on +-(p - 1/2) / beta, p the preference_probability."""

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

def dro_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    values: Tensor,
    *,
    beta: float = 1.0,
) -> Tensor:
    """Direct Reward Optimisation: every completion's log-ratio regressed on its score less the prompt's value."""

def a_star_po_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    values: Tensor,
    *,
    beta: float = 0.001,
) -> Tensor:
    """A*-PO: every completion's log-ratio regressed on its optimal advantage, the score less the optimal value."""

def aot_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT: the policy's margins dominate the reference's as distributions, each sorted over the batch."""

def aot_unpaired_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT of unrelated completions: sorted chosen log-ratios against sorted rejected ones."""

def beta_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    filtered: float = 0.2,
    decay: float = 0.9,
    state: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """DPO with a beta that grows with the batch's mean margin, outlying pairs left out."""

def alpha_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 10.0,
    gamma_beta_ratio: float = 0.4,
    alpha: float = 0.1,
    decay: float = 0.9,
    state: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """AlphaDPO: SimPO whose target margin grows with the pair's own, standardised margin over the reference."""

def ld_dpo_loss(
    chosen_token_logps: Tensor,
    rejected_token_logps: Tensor,
    ref_chosen_token_logps: Tensor,
    ref_rejected_token_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Tensor:
    """Length-Desensitized DPO: tokens beyond the length of the other completion count for less."""

def sampo_loss(
    chosen_token_logps: Tensor,
    rejected_token_logps: Tensor,
    ref_chosen_token_logps: Tensor,
    ref_rejected_token_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    seed: int = 0,
    draw: int = 0,
) -> Tensor:
    """Down-sampled DPO: of the longer completion as many tokens as the shorter has, drawn anew at every step."""

def d2po_loss(
    chosen_token_logps: Tensor,
    rejected_token_logps: Tensor,
    ref_chosen_token_logps: Tensor,
    ref_rejected_token_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.98,
) -> Tensor:
    """DPO with temporal decay: earlier tokens count for more."""

def wpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    chosen_relative_logps: Tensor,
    rejected_relative_logps: Tensor,
    *,
    beta: float = 0.01,
) -> Tensor:
    """Weighted Preference Optimization: DPO on pairs as likely as the policy would have written them."""

def tdpo1_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_sequential_kl: Tensor,
    rejected_sequential_kl: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Token-level DPO, first form: the rejected completion's sequential KL less the chosen one's is the margin."""

def tdpo2_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_sequential_kl: Tensor,
    rejected_sequential_kl: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Tensor:
    """Token-level DPO, second form: as the first, in part, and nothing pushes the chosen completion's KL up."""

def plackett_luce_dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    lists: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """DPO of a ranking: each completion must be chosen from among those not better than it."""

def infonca_loss(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    lists: Tensor,
    *,
    beta: float = 0.01,
    alpha: float = 0.0001,
) -> Tensor:
    """InfoNCA: cross-entropy between the softmax of the scores and the softmax of beta times the log-ratios."""

def nca_list_loss(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    lists: Tensor,
    *,
    beta: float = 0.01,
    alpha: float = 0.0001,
) -> Tensor:
    """Noise Contrastive Alignment of a list: each log-ratio up by its share of the scores, all down a little."""

def rrhf_loss(
    logps: Tensor,
    lengths: Tensor,
    scores: Tensor,
    lists: Tensor,
    *,
    rrhf_weight: float = 1.0,
    normalize: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Rank Responses: likelihoods per token must order as the scores do, plus the NLL of the best completion."""

def irpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> Tensor:
    """Iterative Reasoning Preference Optimization: dpo, and NLL that keeps the chosen completion likely."""

def mpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float = 0.1,
    preference_weight: float = 0.8,
    quality_weight: float = 0.2,
    generation_weight: float = 1.0,
) -> Tensor:
    """Mixed Preference Optimization: which is better (dpo), whether each is good (bco_pair), how to write (NLL)."""
