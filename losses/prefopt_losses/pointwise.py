"""Losses of single completions against a reference: each log-ratio is judged on its own.

None of them contrasts the two completions of a prompt (apo_down does in one of its terms), so the partition
function does not cancel and zero is the anchor; in return they can be fed unpaired feedback. Formulas and
sources stand in the table of methods.
"""

from __future__ import annotations

from prefopt_losses import convex
from prefopt_losses.hyperparameters import Positive
from prefopt_losses.method import Method
from prefopt_losses.score import Score
from prefopt_losses.terms import CHOSEN, NEGATED_CHOSEN, PAIR, REJECTED, Term

LOG_RATIO = Score(aggregate="sum", reference=True)


def bco_pair(*, beta: Positive = 0.1) -> tuple[Term, ...]:
    """Binary Classifier Optimization without reward shift: chosen against 0, rejected against 0.

    Args:
        beta: as in dpo.
    """
    return (
        Term(convex.logistic, LOG_RATIO, CHOSEN, beta),
        Term(convex.logistic, LOG_RATIO, REJECTED, beta),
    )


def nca_pair(*, beta: Positive = 0.01) -> tuple[Term, ...]:
    """Noise Contrastive Alignment of a pair: keeps the chosen log-ratio from falling with the rejected.

    Args:
        beta: as in dpo.
    """
    return (
        Term(convex.logistic, LOG_RATIO, CHOSEN, beta),
        Term(convex.logistic, LOG_RATIO, NEGATED_CHOSEN, beta, coefficient=0.5),
        Term(convex.logistic, LOG_RATIO, REJECTED, beta, coefficient=0.5),
    )


def sppo_hard(*, beta: Positive = 0.001) -> tuple[Term, ...]:
    """Self-Play Preference Optimization with hard wins: log-ratios regressed on +-1 / (2 beta).

    In the algebra: the squared function with GPO beta = 2 beta and coefficient 1 / (4 beta^2), per side.

    Args:
        beta: the paper's 1 / eta, per nat of the whole completion.
    """
    coefficient = 1 / (2 * beta) ** 2
    return (
        Term(convex.squared, LOG_RATIO, CHOSEN, 2 * beta, coefficient=coefficient),
        Term(convex.squared, LOG_RATIO, REJECTED, 2 * beta, coefficient=coefficient),
    )


def apo_zero(*, beta: Positive = 0.1) -> tuple[Term, ...]:
    """Anchored Preference Optimization, zero: chosen up, rejected down; for data better than the policy.

    Args:
        beta: as in dpo.
    """
    return (
        Term(convex.ramp, LOG_RATIO, CHOSEN, beta),
        Term(convex.ramp, LOG_RATIO, REJECTED, beta),
    )


def apo_down(*, beta: Positive = 0.1) -> tuple[Term, ...]:
    """Anchored Preference Optimization, down: both down, rejected more; for data worse than the policy.

    Args:
        beta: as in dpo.
    """
    return (
        Term(convex.ramp, LOG_RATIO, NEGATED_CHOSEN, beta),
        Term(convex.ramp, LOG_RATIO, PAIR, beta),
    )


APO = ("D'Oosterlinck et al. 2024", "2408.06266")

# fmt: off
ROWS: dict[str, Method] = {
    "bco_pair": Method(
        bco_pair, "-log s(beta u_w) - log s(-beta u_l)", "Jung et al. 2024", "2404.04656", trl="DPO: bco_pair",
        note="Without the paper's reward shift (a running mean), as TRL since 0.29. Default beta as TRL; the paper's "
        "recipe uses 0.01.",
        also=("bco",),
    ),
    "nca_pair": Method(
        nca_pair, "-log s(beta u_w) - log s(-beta u_w) / 2 - log s(-beta u_l) / 2", "Chen et al. 2024", "2402.05369",
        trl="DPO: nca_pair",
        note="TRL's default beta is 0.1.", also=("nca",),
    ),
    "sppo_hard": Method(
        sppo_hard, "(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2", "Wu et al. 2024", "2405.00675", "eq. 4.7",
        "DPO: sppo_hard",
        note="GPO beta = 2 beta on each side. Sum of the two sides, as TRL; the authors' code takes half. TRL's "
        "default beta is 0.1.",
        also=("sppo",),
    ),
    "apo_zero": Method(apo_zero, "1 - s(beta u_w) + s(beta u_l)", *APO, "eq. 7", "DPO: apo_zero"),
    "apo_down": Method(apo_down, "s(beta u_w) + 1 - s(beta rho)", *APO, "eq. 8", "DPO: apo_down"),
}
# fmt: on
