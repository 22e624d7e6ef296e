"""Pair losses that ask of each pair a margin of its own: by scores, by lengths, by what the policy has lost.

In the algebra the shift varies; where scores become a label, q. Most need `chosen_scores` and `rejected_scores` (of a
reward model, say), (batch,) or (batch, models) of an ensemble. Formulas and sources stand in the table of methods.
"""

from __future__ import annotations

from prefopt_losses import convex
from prefopt_losses.hyperparameters import Fraction, NonNegative, Positive
from prefopt_losses.method import Method
from prefopt_losses.methods.score_gaps import (
    chosen_loss,
    length_gap,
    log_score_gap,
    nearest_score_gap,
    score_gap,
    score_probability,
)
from prefopt_losses.score import LOG_RATIO
from prefopt_losses.terms import CHOSEN, NEITHER, REJECTED, Term


def odpo(*, beta: Positive = 0.1, alpha: Positive = 1.0) -> tuple[Term, ...]:
    """DPO with an offset: the better the chosen completion scores, the larger the margin asked for.

    Args:
        beta: as in dpo.
        alpha: offset per e-fold of the score gap; a pair of equal scores pulls nothing, one that scores the wrong
            way round is refused.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta, shift=log_score_gap(alpha / beta)),)


def modpo(*, beta: Positive = 0.1, w: Fraction = 0.5) -> tuple[Term, ...]:
    """Multi-objective DPO: pairs express one objective, scores the others; the policy optimises their weighted sum.

    Args:
        beta: as in dpo.
        w: weight of the objective that the pairs express; the scores' has 1 - w, shared equally among several
            score models.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta / w, shift=score_gap((1 - w) / beta)),)


def r_dpo(*, beta: Positive = 0.1, alpha: NonNegative = 0.1) -> tuple[Term, ...]:
    """Length-regularised DPO: a longer winner has part of its margin already, so length is not what is learnt.

    Args:
        beta: as in dpo.
        alpha: margin granted per token that the chosen completion is longer, in units of beta * rho.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta, shift=length_gap(-alpha / beta)),)


def dpop(*, beta: Positive = 0.3, lambda_coef: NonNegative = 50.0) -> tuple[Term, ...]:
    """DPO-Positive: every nat that the chosen completion loses to the reference must be won back lambda times.

    Args:
        beta: as in dpo; it multiplies the penalty too.
        lambda_coef: the paper's lambda, margin asked for per nat lost; gradient flows through the penalty.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta, shift=chosen_loss(lambda_coef)),)


def dpo_shift(*, beta: Positive = 0.1, lambda_coef: Fraction = 0.7) -> tuple[Term, ...]:
    """DPO-Shift: the rejected reward counts less, so that the chosen likelihood falls less; dpo at 1.

    Args:
        beta: as in dpo.
        lambda_coef: the paper's f(lambda), what multiplies the rejected log-ratio; fixed over training.
    """
    return (Term(convex.logistic, LOG_RATIO, (1.0, -lambda_coef), beta=beta),)


def cal_dpo(*, beta: Positive = 0.002) -> tuple[Term, ...]:
    """Calibrated DPO: logistic regression without beta, plus a regression of log-ratios on +-1 / (2 beta).

    Args:
        beta: sets the targets, 1 / (2 beta) nats of the whole completion; the logistic part has none.
    """
    coefficient = 1 / (2 * beta) ** 2
    return (
        Term(convex.logistic, LOG_RATIO),
        Term(convex.squared, LOG_RATIO, CHOSEN, 2 * beta, coefficient=coefficient),
        Term(convex.squared, LOG_RATIO, REJECTED, 2 * beta, coefficient=coefficient),
    )


def reward_distillation(*, beta: Positive = 0.1, eta: Positive = 1.0) -> tuple[Term, ...]:
    """Reward model distillation: regression of beta * rho on the score gap; of an ensemble, on the mean gap.

    Args:
        beta: as in dpo.
        eta: what multiplies scores, so that their unit is that of beta * rho.
    """
    return (Term(convex.quadratic, LOG_RATIO, beta=beta, shift=score_gap(eta / beta)),)


def pessimistic_distillation(
    *, beta: Positive = 0.1, eta: Positive = 1.0, gamma: NonNegative = 0.001
) -> tuple[Term, ...]:
    """Pessimistic reward model distillation: the nearest model of an ensemble, and the reference's own completions.

    Any reward model of the ensemble will do as a target; among the policies that fit one, the forward KL divergence
    prefers that which forgets least of the reference.

    Args:
        beta: as in dpo.
        eta: as in reward_distillation.
        gamma: weight of KL(reference || policy) in nats, estimated on both completions as if the reference had
            sampled them.
    """
    return (
        Term(convex.quadratic, LOG_RATIO, beta=beta, shift=nearest_score_gap(eta / beta)),
        Term(convex.linear, LOG_RATIO, (0.5, 0.5), coefficient=gamma),
    )


def rpo_bwd_kl(*, beta: Positive = 0.2, eta: Positive = 1.0) -> tuple[Term, ...]:
    """Reward-aware preference optimization, backward KL: dpo with the soft labels of the scores.

    Args:
        beta: as in dpo.
        eta: what multiplies scores before the sigmoid.
    """
    return (
        Term(convex.logistic, LOG_RATIO, beta=beta, q=score_probability(eta)),
        Term(convex.negative_entropy, LOG_RATIO, NEITHER, shift=score_gap(eta)),  # constant: 0 where both agree
    )


def rpo_fwd_kl(*, beta: Positive = 0.2, eta: Positive = 1.0) -> tuple[Term, ...]:
    """Reward-aware preference optimization, forward KL: exo with the label that Bradley-Terry reads off scores.

    Args:
        beta: as in dpo.
        eta: what multiplies scores before the sigmoid.
    """
    # KL( s(x) || s(d) ) = s(x) log s(x) + s(-x) log s(-x) + d s(-x) - log s(d)
    return (
        Term(convex.ramp, LOG_RATIO, beta=beta, weight=score_gap(eta)),
        Term(convex.negative_entropy, LOG_RATIO, beta=beta),
        Term(convex.logistic, LOG_RATIO, NEITHER, beta=-1.0, shift=score_gap(eta)),  # constant: 0 where both agree
    )


RPO = ("Sun et al. 2025", "2502.00203")
_GAP = "d = eta (score_w - score_l)"
_NEMO = {"gt_reward_scale": "it is called eta here.", "ref_policy_kl_penalty": "it is called beta here."}

# fmt: off
ROWS: dict[str, Method] = {
    "odpo": Method(
        odpo, "-log s(beta rho - alpha log(score_w - score_l))", "Amini et al. 2024", "2402.10571",
        note="The authors' code takes the logarithm of a difference of scores (or, on request, of a ratio).",
    ),
    "modpo": Method(
        modpo, "-log s((beta rho - (1 - w) (score_w - score_l)) / w)", "Zhou et al. 2023", "2310.03708",
        note="The authors' code takes a list of weights, one per objective, that of the pairs first. The logged "
        "margin is beta / w times rho.",
    ),
    "r_dpo": Method(
        r_dpo, "-log s(beta rho + alpha (|y_w| - |y_l|))", "Park et al. 2024", "2403.19159",
        note="PLUS, as the length-regularised objective implies; alpha-DPO's code has minus, and multiplies by beta. "
        "The default of alpha is SamPO's.",
        also=("length_regularized_dpo",),
    ),
    "dpop": Method(
        dpop, "-log s(beta (rho - lambda max(0, -u_w)))", "Pal et al. 2024 (Smaug)", "2402.13228", "eq. 3",
        note="lambda_coef is the paper's lambda.", also=("smaug",),
        foreign={"lambda": "it is called lambda_coef here.", "dpop_lambda": "it is called lambda_coef here."},
    ),
    "dpo_shift": Method(
        dpo_shift, "-log s(beta (u_w - lambda u_l))", "Yang et al. 2025", "2502.07599",
        note="lambda_coef is the paper's f(lambda), fixed; the paper also raises it over training, not done here.",
        foreign={"lambda": "it is called lambda_coef here."},
    ),
    "cal_dpo": Method(
        cal_dpo, "-log s(rho) + (u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2", "Xiao et al. 2024", "2412.14516",
        "eq. 10",
        note="The authors' code halves the two squares. Default beta of their configuration; the logged margin is rho.",
    ),
    "reward_distillation": Method(
        reward_distillation, f"(beta rho - d)^2,  {_GAP}", "Fisch et al. 2024", "2405.19316",
        note="The same loss is rpo_sq of reward-aware preference optimization (arXiv 2502.00203) and, on pairs of the "
        "current policy with beta = 1 / eta_rebel, REBEL (arXiv 2404.16767).",
        also=("distillation", "d_dpo", "rpo_sq", "rebel"),
        foreign=_NEMO,
    ),
    "pessimistic_distillation": Method(
        pessimistic_distillation, f"min over models of (beta rho - d)^2 - gamma (u_w + u_l) / 2,  {_GAP}",
        "Fisch et al. 2024", "2405.19316",
        note="Written from second-hand accounts (least distillation loss over the ensemble, plus KL(reference || "
        "policy)), not from the paper's equation. Ours: the minimum is taken pair by pair, and the default of gamma.",
    ),
    "rpo_bwd_kl": Method(
        rpo_bwd_kl, f"KL(Bernoulli(s(d)) || Bernoulli(s(beta rho))),  {_GAP}", *RPO,
        note="NeMo's name and default beta. Its rpo_sq is reward_distillation. DPO with NLL, also called RPO, is irpo.",
        foreign=_NEMO,
    ),
    "rpo_fwd_kl": Method(
        rpo_fwd_kl, f"KL(Bernoulli(s(beta rho)) || Bernoulli(s(d))),  {_GAP}", *RPO,
        note="NeMo's name and default beta. With one gap for all pairs it is exo.",
        foreign=_NEMO,
    ),
}
# fmt: on
