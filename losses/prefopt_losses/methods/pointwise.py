"""Losses of single completions against a reference: each log-ratio is judged on its own.

None of them contrasts the two completions of a prompt (apo_down does in one of its terms), so the partition
function does not cancel and they need an anchor: zero, a mean over the batch (kto, bco), or a target from the data
(sppo, dro, a_star_po). In return they can be fed unpaired feedback. Formulas and sources stand in the table of
methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt_losses import convex
from prefopt_losses.hyperparameters import NonNegative, Positive
from prefopt_losses.inputs import LogProbs
from prefopt_losses.method import Method
from prefopt_losses.methods.running import Count, CumulativeMean, carried
from prefopt_losses.score import LOG_RATIO, Side, widened
from prefopt_losses.terms import CHOSEN, NEGATED_CHOSEN, PAIR, REJECTED, FromRecord, Running, Term


def kto(
    *, beta: Positive = 0.1, desirable_weight: NonNegative = 1.0, undesirable_weight: NonNegative = 1.0
) -> tuple[Term, ...]:
    """Kahneman-Tversky Optimization: a bounded value of each log-ratio, counted from the mean drift.

    Args:
        beta: as in dpo.
        desirable_weight: the paper's lambda_D, weight of desirable (chosen) completions.
        undesirable_weight: the paper's lambda_U, weight of undesirable (rejected) completions.
    """
    return (
        Term(convex.ramp, LOG_RATIO, CHOSEN, beta, shift=MISMATCHED_KL, coefficient=desirable_weight),
        Term(convex.ramp, LOG_RATIO, REJECTED, beta, shift=MINUS_MISMATCHED_KL, coefficient=undesirable_weight),
    )


def bco(*, beta: Positive = 0.01) -> tuple[Term, ...]:
    """Binary Classifier Optimization: chosen and rejected classified against the running mean of all rewards.

    Args:
        beta: as in dpo.
    """
    return (
        Term(convex.logistic, LOG_RATIO, CHOSEN, beta, shift=MEAN_LOGRATIO),
        Term(convex.logistic, LOG_RATIO, REJECTED, beta, shift=MINUS_MEAN_LOGRATIO),
    )


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


def sppo(*, beta: Positive = 0.001) -> tuple[Term, ...]:
    """Self-Play Preference Optimization: log-ratios regressed on +-(p - 1/2) / beta, p the preference_probability.

    In the algebra: x^2 with GPO beta = 2 beta and coefficient 1 / (4 beta^2), per side; sppo_hard is p = 1.

    Args:
        beta: the paper's 1 / eta, per nat of the whole completion.
    """
    coefficient = 1 / (2 * beta) ** 2
    target = FromRecord("(p - 1/2) / beta", ("preference_probability",), LogRatioOfWin(1 / beta))
    return (
        Term(convex.quadratic, LOG_RATIO, CHOSEN, 2 * beta, shift=target, coefficient=coefficient),
        Term(convex.quadratic, LOG_RATIO, REJECTED, 2 * beta, shift=target, coefficient=coefficient),
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


def dro(*, beta: Positive = 1.0) -> tuple[Term, ...]:
    """Direct Reward Optimisation: every completion's log-ratio regressed on its score less the prompt's value.

    Args:
        beta: the paper's tau, in the unit of the scores per nat of the whole completion.
    """
    return _towards_the_advantage(beta, coefficient=0.5, learns=("values",))


def a_star_po(*, beta: Positive = 0.001) -> tuple[Term, ...]:
    """A*-PO: every completion's log-ratio regressed on its optimal advantage, the score less the optimal value.

    Args:
        beta: the paper's beta_2, in the unit of the scores per nat of the whole completion.
    """
    return _towards_the_advantage(beta)


def _towards_the_advantage(beta: float, *, coefficient: float = 1.0, learns: tuple[str, ...] = ()) -> tuple[Term, ...]:
    """Regress the log-ratios of both completions on (score - value) / beta."""
    chosen = FromRecord(
        "(score - value) / beta", ("chosen_scores", "values"), Advantage("chosen", 1 / beta), learns=learns
    )
    rejected = FromRecord(
        "-(score - value) / beta", ("rejected_scores", "values"), Advantage("rejected", -1 / beta), learns=learns
    )
    return (
        Term(convex.quadratic, LOG_RATIO, CHOSEN, beta, shift=chosen, coefficient=coefficient),
        Term(convex.quadratic, LOG_RATIO, REJECTED, beta, shift=rejected, coefficient=coefficient),
    )


@dataclass(frozen=True)
class LogRatioOfWin:
    """scale * (p - 1/2), (batch,), nats."""

    scale: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return the log-ratio that a completion winning with probability p should have."""
        assert record.preference_probability is not None  # in `reads`, so Loss has looked
        return self.scale * (widened(record.preference_probability) - 0.5)


@dataclass(frozen=True)
class Advantage:
    """scale * (score - value), (batch,), nats; the scores of an ensemble are averaged."""

    side: Side
    scale: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return the log-ratio that a completion of this score should have."""
        scores = record.chosen_scores if self.side == "chosen" else record.rejected_scores
        assert scores is not None  # both are in `reads`, so Loss has looked
        assert record.values is not None
        mean = widened(scores).mean(1) if scores.ndim == 2 else widened(scores)
        return self.scale * (mean - widened(record.values))


def _mismatched_kl(record: LogProbs) -> Tensor:
    """Return max(0, mean log-ratio of mismatched completions), nats, shape (); an estimate of KL(policy || ref)."""
    assert record.mismatched_logps is not None  # both are in `reads`, so Loss has looked
    assert record.ref_mismatched_logps is not None
    logratios = widened(record.mismatched_logps) - widened(record.ref_mismatched_logps)
    return logratios.mean().clamp(min=0).detach()


def _logratios(record: LogProbs) -> Tensor:
    """Return the log-ratios of all completions, nats, detached: both of each pair, or the real one of each row."""
    chosen = LOG_RATIO.of(record, "chosen").detach()
    if record.desirable is not None:  # unpaired feedback stands on both sides; count it once
        return chosen
    return torch.cat([chosen, LOG_RATIO.of(record, "rejected").detach()])


def _mean_logratio(record: LogProbs) -> Tensor:
    return carried(record, "bco_mean_logratio")


def _minus_mismatched_kl(record: LogProbs) -> Tensor:
    return -_mismatched_kl(record)


def _minus_mean_logratio(record: LogProbs) -> Tensor:
    return -_mean_logratio(record)


_MISMATCHED = ("mismatched_logps", "ref_mismatched_logps")
MISMATCHED_KL = FromRecord("mismatched_kl", _MISMATCHED, _mismatched_kl, batch=True)
MINUS_MISMATCHED_KL = FromRecord("-mismatched_kl", _MISMATCHED, _minus_mismatched_kl, batch=True)

_LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
_BCO = (
    Running("bco_mean_logratio", 0.0, _LOGPS, CumulativeMean(_logratios, count="bco_count")),
    Running("bco_count", 0.0, _LOGPS, Count(_logratios)),
)
MEAN_LOGRATIO = FromRecord("mean_logratio", _LOGPS, _mean_logratio, batch=True, running=_BCO)
MINUS_MEAN_LOGRATIO = FromRecord("-mean_logratio", _LOGPS, _minus_mean_logratio, batch=True, running=_BCO)


APO = ("D'Oosterlinck et al. 2024", "2408.06266")

# fmt: off
ROWS: dict[str, Method] = {
    "kto": Method(
        kto, "lambda_D (1 - s(beta (u_w - z))) + lambda_U (1 - s(beta (z - u_l))),  z = max(0, mean u of mismatched)",
        "Ethayarajh et al. 2024", "2402.01306", trl="KTO: kto",
        note="z is taken over the optimizer step, in nats, from completions scored after other prompts; no gradient "
        "flows through it. Of a pair the two sides are added.",
        foreign={
            "lambda_D": "it is called desirable_weight here, as in TRL.",
            "lambda_U": "it is called undesirable_weight here, as in TRL.",
        },
    ),
    "bco": Method(
        bco, "-log s(beta (u_w - m)) - log s(-beta (u_l - m)),  m the running mean of u", "Jung et al. 2024",
        "2404.04656",
        note="beta m is the paper's delta: the mean over every completion since the first step, this batch's "
        "included, as in TRL's BCOTrainer. Without its density-ratio weights (UDM), which need prompt embeddings and "
        "a classifier.",
        foreign={"delta": "it is not chosen but measured: the running mean of the rewards."},
    ),
    "bco_pair": Method(
        bco_pair, "-log s(beta u_w) - log s(-beta u_l)", "Jung et al. 2024", "2404.04656", trl="DPO: bco_pair",
        note="Without the paper's reward shift (that is bco), as TRL since 0.29. Default beta as TRL; the paper's "
        "recipe uses 0.01.",
    ),
    "nca_pair": Method(
        nca_pair, "-log s(beta u_w) - log s(-beta u_w) / 2 - log s(-beta u_l) / 2", "Chen et al. 2024", "2402.05369",
        trl="DPO: nca_pair",
        note="TRL's default beta is 0.1.", also=("nca",),
    ),
    "sppo": Method(
        sppo, "(u_w - (p - 1/2) / beta)^2 + (u_l + (p - 1/2) / beta)^2", "Wu et al. 2024", "2405.00675",
        note="Sum of the two sides; the authors' code takes half (its loss_type sppo_single; its sppo has a win rate "
        "against all samples for each side).",
        also=("sppo_single",),
    ),
    "sppo_hard": Method(
        sppo_hard, "(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2", "Wu et al. 2024", "2405.00675", "eq. 4.7",
        "DPO: sppo_hard",
        note="GPO beta = 2 beta on each side. Sum of the two sides, as TRL; the authors' code takes half. TRL's "
        "default beta is 0.1.",
    ),
    "apo_zero": Method(apo_zero, "1 - s(beta u_w) + s(beta u_l)", *APO, "eq. 7", "DPO: apo_zero"),
    "apo_down": Method(apo_down, "s(beta u_w) + 1 - s(beta rho)", *APO, "eq. 8", "DPO: apo_down"),
    "dro": Method(
        dro, "((score_w - V - beta u_w)^2 + (score_l - V - beta u_l)^2) / 2", "Richemond et al. 2024", "2405.19107",
        note="beta is the paper's tau. V is values: the data's, or learned beside the policy (gradient flows into it; "
        "prefopt train puts a linear head on the prompt's last hidden state). The loss as written: the paper divides "
        "the policy's gradient by tau, as weight 1 / beta does. Of a pair both completions count.",
        foreign={"tau": "it is called beta here."},
    ),
    "a_star_po": Method(
        a_star_po, "(beta u_w - (score_w - V))^2 + (beta u_l - (score_l - V))^2", "Brantley et al. 2025",
        "2505.20686", trl="A2PO",
        note="beta is the paper's beta_2; V is values: V* = beta_1 log mean exp(score / beta_1) over samples of the "
        "reference. The paper samples its completions from the policy. Of a pair both completions count.",
        also=("a2po",),
        foreign={
            "beta2": "it is called beta here.",
            "beta1": "it belongs to the values: V* = beta1 * log mean exp(score / beta1). Compute them with the data.",
        },
    ),
}
# fmt: on
