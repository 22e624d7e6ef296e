"""Losses of single completions against a reference: each log-ratio is judged on its own.

None of them contrasts the two completions of a prompt (apo_down does in one of its terms), so the partition
function does not cancel and zero is the anchor; in return they can be fed unpaired feedback. Formulas and
sources stand in the table of methods.
"""

from __future__ import annotations

from prefopt_losses import convex
from prefopt_losses.hyperparameters import Positive
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
