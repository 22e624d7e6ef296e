"""Losses of a pair that look at the whole batch: they sort it, or take their beta or their margin from it.

An example's value depends on the other examples of its optimizer step, so the mean over micro-batches is another
loss than the mean over the step; `needs.batch` says what couples them. Formulas and sources stand in the table of
methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from prefopt_losses import convex
from prefopt_losses.hyperparameters import NonNegative, Positive, Range, Smoothing
from prefopt_losses.inputs import LogProbs
from prefopt_losses.method import Method
from prefopt_losses.methods.running import MovingAverage, carried
from prefopt_losses.score import LOG_RATIO, MEAN_LIKELIHOOD, MEAN_LOG_RATIO
from prefopt_losses.terms import FromRecord, Running, Term

Share = Annotated[float, Range(0, 1)]


def aot(*, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0) -> tuple[Term, ...]:
    """AOT: the policy's margins dominate the reference's as distributions, each sorted over the batch.

    Args:
        beta: as in dpo.
        label_smoothing: eps, as in cdpo.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta, q=1 - label_smoothing, sort="margins"),)


def aot_unpaired(*, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0) -> tuple[Term, ...]:
    """AOT of unrelated completions: sorted chosen log-ratios against sorted rejected ones.

    Args:
        beta: as in dpo.
        label_smoothing: eps, as in cdpo.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta, q=1 - label_smoothing, sort="scores"),)


def beta_dpo(
    *, beta: Positive = 0.1, alpha: NonNegative = 0.6, filtered: Share = 0.2, decay: Share = 0.9
) -> tuple[Term, ...]:
    """DPO with a beta that grows with the batch's mean margin, outlying pairs left out.

    Args:
        beta: of a batch whose margin is the running one, per nat of the whole completion; never below 0.001.
        alpha: growth of beta, relative, per nat by which the batch's mean margin exceeds the running one.
        filtered: share of the pairs left out: those whose margin is farthest from the running one.
        decay: of the running margin, per optimizer step; it starts at 0.
    """
    running = (Running("beta_dpo_margin", 0.0, _LOGPS, MovingAverage(_mean_margin, decay)),)
    return (
        Term(
            convex.logistic,
            LOG_RATIO,
            beta=FromRecord("dynamic_beta", _LOGPS, DynamicBeta(beta, alpha, filtered), None, True, 2, running),
            weight=FromRecord("nearest_margins", _LOGPS, NearestMargins(filtered), None, True, 2, running),
        ),
    )


def alpha_dpo(
    *, beta: Positive = 10.0, gamma_beta_ratio: NonNegative = 0.4, alpha: NonNegative = 0.1, decay: Share = 0.9
) -> tuple[Term, ...]:
    """AlphaDPO: SimPO whose target margin grows with the pair's own, standardised margin over the reference.

    Args:
        beta: scale of the reward, per nat per token.
        gamma_beta_ratio: target margin of an average pair, in nats per token.
        alpha: nats per token by which the target grows per running standard deviation; no gradient flows there.
        decay: of the running mean and standard deviation, per optimizer step; both start at 0.
    """
    running = (
        Running("alpha_dpo_mean", 0.0, _MEAN_LOGPS, MovingAverage(_mean_margin_per_token, decay)),
        Running("alpha_dpo_std", 0.0, _MEAN_LOGPS, MovingAverage(_std_margin_per_token, decay)),
    )
    target = FromRecord("adaptive_margin", _MEAN_LOGPS, AdaptiveMargin(gamma_beta_ratio, alpha), None, True, 2, running)
    return (Term(convex.logistic, MEAN_LIKELIHOOD, beta=beta, shift=target),)


@dataclass(frozen=True)
class NearestMargins:
    """Weight 1 / (share kept) of the pairs nearest to the running margin, 0 of the others; (batch,).

    As many are kept as leaves the share `filtered` out, rounded down, and ties with the last of them: at the reference
    all margins are ties, up to the rounding of sums that were added up elsewhere.
    """

    filtered: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return the weights; their mean is 1."""
        distance = (_margins(record) - carried(record, "beta_dpo_margin")).abs()
        count = max(1, math.floor(len(distance) * (1 - self.filtered) + 1e-9))
        kept = (distance <= distance.kthvalue(count).values + _rounding(record)).to(distance.dtype)
        return kept / kept.mean()


@dataclass(frozen=True)
class DynamicBeta:
    """beta * (1 + alpha * (mean margin of the kept pairs - running margin)), at least 0.001; shape ()."""

    beta: float
    alpha: float
    filtered: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return the beta of the batch, without gradient."""
        mean = (NearestMargins(self.filtered)(record) * _margins(record)).mean()
        growth = self.alpha * (mean - carried(record, "beta_dpo_margin"))
        return (self.beta * (1 + growth)).clamp(min=1e-3)


@dataclass(frozen=True)
class AdaptiveMargin:
    """gamma / beta + alpha * (margin over the reference - running mean) / running standard deviation; (batch,)."""

    gamma_beta_ratio: float
    alpha: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return the target margins in nats per token, without gradient."""
        deviation = _margins_per_token(record) - carried(record, "alpha_dpo_mean")
        # At the reference every margin, and the deviation with it, is 0, up to rounding: standardised, that would be
        # as large as any.
        lengths: list[Tensor] = [getattr(record, name).min().clamp(min=1) for name in _MEAN_LOGPS[-2:]]
        noise = _rounding(record) / torch.stack(lengths).min()
        deviation = torch.where(deviation.abs() <= noise, torch.zeros_like(deviation), deviation)
        spread = torch.maximum(carried(record, "alpha_dpo_std"), noise)
        return self.gamma_beta_ratio + self.alpha * deviation / spread


def _margins(record: LogProbs) -> Tensor:
    """Return rho in nats, (batch,), detached."""
    return (LOG_RATIO.of(record, "chosen") - LOG_RATIO.of(record, "rejected")).detach()


def _rounding(record: LogProbs) -> Tensor:
    """Nats by which fp32 sums of one sequence may differ, added up here and in a cache; shape (), detached."""
    sums = [getattr(record, name).detach().abs().max() for name in _LOGPS]
    return 8 * torch.finfo(torch.float32).eps * torch.stack(sums).max()


def _margins_per_token(record: LogProbs) -> Tensor:
    """Return ū_w - ū_l in nats per token, (batch,), detached."""
    return (MEAN_LOG_RATIO.of(record, "chosen") - MEAN_LOG_RATIO.of(record, "rejected")).detach()


def _mean_margin(record: LogProbs) -> Tensor:
    return _margins(record).double().mean()


def _mean_margin_per_token(record: LogProbs) -> Tensor:
    return _margins_per_token(record).double().mean()


def _std_margin_per_token(record: LogProbs) -> Tensor:
    return _margins_per_token(record).double().std()


_LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
_MEAN_LOGPS = (*_LOGPS, "chosen_lengths", "rejected_lengths")

AOT = ("Melnyk et al. 2024", "2406.05882")

# fmt: off
ROWS: dict[str, Method] = {
    "aot": Method(
        aot, "-log s(beta (sort(l_w - l_l) - sort(r_w - r_l)))", *AOT, trl="DPO: aot",
        note="Sorted over the optimizer step. With label_smoothing eps: (1 - eps) f(x) + eps f(-x). TRL's default "
        "beta is 0.1.",
        also=("aot_pair",),
    ),
    "aot_unpaired": Method(
        aot_unpaired, "-log s(beta (sort(u_w) - sort(u_l)))", *AOT, trl="DPO: aot_unpaired",
        note="Sorted over the optimizer step. As many chosen as rejected completions, so it is fed pairs, whose "
        "members need not answer the same prompt. TRL's default beta is 0.1.",
    ),
    "beta_dpo": Method(
        beta_dpo, "-w log s(beta' rho),  beta' = max(0.001, beta (1 + alpha (mean rho - M))),  M running",
        "Wu et al. 2024", "2407.08639",
        note="rho in nats; M is its moving average, this batch included, as in the authors' code. They draw the pairs "
        "they keep, with Gaussian weights around M; here the nearest to M are kept, so that a step can be repeated; w "
        "is 0, or 1 / (share kept).",
        foreign={
            "a": "it is called alpha here, as in the paper.",
            "mode_weight": "it is called filtered here: the share of the pairs left out.",
        },
    ),
    "alpha_dpo": Method(
        alpha_dpo, "-log s(beta (l̄_w - l̄_l - t)),  t = gamma / beta + alpha (ū_w - ū_l - M) / S,  M, S running",
        "Wu et al. 2024", "2410.10148",
        note="gamma_beta_ratio as in simpo. S averages the batches' standard deviations. M and S start at 0 and are "
        "not corrected for it, as in the authors' code: at decay 0.9 the first step's targets spread ten times wider.",
        foreign={"gamma": "that is the absolute margin. Pass gamma_beta_ratio = gamma / beta."},
    ),
}
# fmt: on
