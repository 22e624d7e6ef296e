"""Losses that look inside a completion: at each token's log-prob, or at the whole distribution it was drawn from.

LD-DPO, SamPO and D2PO are DPO with tokens weighted by their position; WPO is DPO with pairs weighted by how likely
the policy itself finds them; TDPO is DPO with the sequential KL of both completions as a shift. Formulas and
sources stand in the table of methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from prefopt_losses import convex
from prefopt_losses.hyperparameters import NonNegative, Positive, Range, UnitInterval
from prefopt_losses.inputs import LogProbs
from prefopt_losses.method import Method
from prefopt_losses.score import LOG_RATIO, Score, TokenWeights, widened
from prefopt_losses.terms import FromRecord, Term

Decay: TypeAlias = Annotated[float, Range(0, 1, includes_low=False)]


@dataclass(frozen=True)
class Whole:
    """The whole numbers from 0 on; `str` writes them for people."""

    def __contains__(self, value: float) -> bool:
        return value >= 0 and value == int(value)

    def __str__(self) -> str:
        return ">= 0 without fraction"


Seed: TypeAlias = Annotated[int, Whole()]


def ld_dpo(*, beta: Positive = 0.1, alpha: UnitInterval = 0.5) -> tuple[Term, ...]:
    """Length-Desensitized DPO: tokens beyond the length of the other completion count for less.

    Args:
        beta: as in dpo.
        alpha: weight of a token beyond the shorter completion's length; 0 drops them, 1 is dpo.
    """
    return (_weighted_dpo(beta, TokenWeights("length-desensitized", PrefixWeights(alpha))),)


def sampo(*, beta: Positive = 0.1, seed: Seed = 0) -> tuple[Term, ...]:
    """Down-sampled DPO: of the longer completion as many tokens as the shorter has, drawn anew at every step.

    Args:
        beta: as in dpo, per nat of the tokens that are kept.
        seed: of the draws; they are a pure function of it, of the number of the draw and of both lengths.
    """
    return (_weighted_dpo(beta, TokenWeights("down-sampled", SampledTokens(int(seed)), draws=True)),)


def d2po(*, beta: Positive = 0.1, gamma: Decay = 0.98) -> tuple[Term, ...]:
    """DPO with temporal decay: earlier tokens count for more.

    Args:
        beta: as in dpo, per nat of the weighted sum.
        gamma: token t, counted from 1, weighs gamma^t; a completion never weighs more than gamma / (1 - gamma)
            tokens (49 of 0.98).
    """
    return (_weighted_dpo(beta, TokenWeights("temporal decay", DecayingWeights(gamma))),)


def wpo(*, beta: Positive = 0.01) -> tuple[Term, ...]:
    """Weighted Preference Optimization: DPO on pairs as likely as the policy would have written them.

    Args:
        beta: as in dpo.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta, weight=POLICY_LIKELINESS),)


def tdpo1(*, beta: Positive = 0.1) -> tuple[Term, ...]:
    """Token-level DPO, first form: the rejected completion's sequential KL less the chosen one's is the margin.

    Args:
        beta: as in dpo, also per nat of sequential KL.
    """
    return (Term(convex.logistic, LOG_RATIO, beta=beta, shift=SEQUENTIAL_KL_DIFFERENCE),)


def tdpo2(*, beta: Positive = 0.1, alpha: NonNegative = 0.5) -> tuple[Term, ...]:
    """Token-level DPO, second form: as the first, in part, and nothing pushes the chosen completion's KL up.

    Args:
        beta: as in dpo, also per nat of sequential KL.
        alpha: weight of the difference of sequential KL; 0 is dpo.
    """
    difference = FromRecord("alpha * (KL_l - detached KL_w)", SEQUENTIAL_KLS, DetachedKLDifference(alpha))
    return (Term(convex.logistic, LOG_RATIO, beta=beta, shift=difference),)


@dataclass(frozen=True)
class PrefixWeights:
    """1 up to the shorter completion's length, alpha beyond."""

    alpha: float

    def __call__(self, positions: Tensor, own: Tensor, other: Tensor, draw: int) -> Tensor:
        """Return (batch, tokens)."""
        shared = positions < torch.minimum(own, other)
        return torch.full_like(positions, self.alpha).masked_fill(shared, 1.0)


@dataclass(frozen=True)
class DecayingWeights:
    """gamma^t of token t, counted from 1."""

    gamma: float

    def __call__(self, positions: Tensor, own: Tensor, other: Tensor, draw: int) -> Tensor:
        """Return (1, tokens)."""
        return self.gamma ** (positions + 1)


@dataclass(frozen=True)
class SampledTokens:
    """1 for as many tokens as the shorter completion has, sampled without replacement; 0 for the rest.

    Every token gets a key, a hash of (seed, draw, both lengths, position); the tokens with the smallest keys are
    kept. So the sample is the same on every device, process and resumed run, and in any split of the batch; pairs
    of the same two lengths share it within a draw.
    """

    seed: int

    def __call__(self, positions: Tensor, own: Tensor, other: Tensor, draw: int) -> Tensor:
        """Return (batch, tokens)."""
        own, other = own.long(), other.long()
        keys = _hashed(torch.full_like(own, self.seed))  # at once, or seed 1 draw 0 would be seed 0 draw 1
        for part in (draw, own, other, positions.long()):
            keys = _hashed(keys + part)
        keys = keys.masked_fill(positions >= own, 2**32)  # beyond every key of a token
        rank = keys.argsort(dim=-1, stable=True).argsort(dim=-1)
        return (rank < other).to(positions.dtype)


def _hashed(value: Tensor) -> Tensor:
    """Return a 32-bit hash of whole numbers >= 0, elementwise (lowbias32, https://github.com/skeeto/hash-prospector).

    Computed in int64: a product may wrap around, its lower 32 bits are right all the same.
    """
    value = (value + 0x9E3779B9) & 0xFFFFFFFF  # the golden ratio: 0 is a fixed point of what follows
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ (value >> 16)


def _weighted_dpo(beta: float, weights: TokenWeights) -> Term:
    return Term(convex.logistic, Score(aggregate=weights, reference=True), beta=beta)


def _policy_likeliness(record: LogProbs) -> Tensor:
    """min(1, w_w w_l), w = exp(mean over tokens of log p(y_t) - log sum_v p(v)^2)."""
    assert record.chosen_relative_logps is not None  # all four are in `reads`, so Loss has looked
    assert record.rejected_relative_logps is not None
    assert record.chosen_lengths is not None
    assert record.rejected_lengths is not None
    chosen = widened(record.chosen_relative_logps) / record.chosen_lengths
    rejected = widened(record.rejected_relative_logps) / record.rejected_lengths
    return torch.exp((chosen + rejected).clamp(max=0))


def _sequential_kls(record: LogProbs) -> tuple[Tensor, Tensor]:
    """Return KL_w and KL_l, each (batch,)."""
    assert record.chosen_sequential_kl is not None  # both are in `reads`, so Loss has looked
    assert record.rejected_sequential_kl is not None
    return widened(record.chosen_sequential_kl), widened(record.rejected_sequential_kl)


def _kl_difference(record: LogProbs) -> Tensor:
    """KL_l - KL_w, the gradient through both."""
    chosen, rejected = _sequential_kls(record)
    return rejected - chosen


@dataclass(frozen=True)
class DetachedKLDifference:
    """alpha * (KL_l - KL_w), the gradient through KL_l only."""

    alpha: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return (batch,)."""
        chosen, rejected = _sequential_kls(record)
        return self.alpha * (rejected - chosen.detach())


POLICY_LIKELINESS = FromRecord(
    "min(1, w_w w_l)",
    reads=("chosen_relative_logps", "rejected_relative_logps", "chosen_lengths", "rejected_lengths"),
    value=_policy_likeliness,
)
SEQUENTIAL_KLS = ("chosen_sequential_kl", "rejected_sequential_kl")
SEQUENTIAL_KL_DIFFERENCE = FromRecord("KL_l - KL_w", SEQUENTIAL_KLS, _kl_difference)

TDPO = ("Zeng et al. 2024", "2404.11999")

# fmt: off
ROWS: dict[str, Method] = {
    "ld_dpo": Method(
        ld_dpo, "-log s(beta (u'_w - u'_l)),  u' = sum of the first min(|y_w|, |y_l|) tokens + alpha * the rest of u",
        "Liu et al. 2024", "2409.06411", trl="DPO: sigmoid, ld_alpha",
        note="Policy and reference are weighted alike, as in TRL since 0.29. LLaMA-Factory weights the policy only, "
        "so its margin is not 0 at the reference.",
        foreign={"ld_alpha": "it is called alpha here."},
    ),
    "sampo": Method(
        sampo, "-log s(beta (û_w - û_l)),  û = sum over min(|y_w|, |y_l|) random tokens of u", "Lu et al. 2024",
        "2406.10957",
        note="The sample is a function of seed, draw and lengths: policy and reference keep the same tokens, so the "
        "margin at the reference is 0. The authors' code samples for policy and reference apart.",
        foreign={"len_norm": "sampo always samples; without it is dpo."},
    ),
    "d2po": Method(
        d2po, "-log s(beta (v_w - v_l)),  v = sum_t gamma^t u_t,  t from 1", "Shao et al. 2025", "2502.14340",
        note="t counts from 1 as in the authors' code; counted from 0 it is this loss at beta / gamma. Not the "
        "discriminator-guided D2PO (2405.01511), which is online DPO.",
    ),
    "wpo": Method(
        wpo, "-min(1, w_w w_l) log s(beta rho),  w = exp(mean_t (log p(y_t) - log sum_v p(v)^2))", "Zhou et al. 2024",
        "2406.11827", trl="DPO: sigmoid, use_weighting",
        note="The weight is clamped at 1 as in the authors' code (TRL 1.16 does not clamp) and carries no gradient.",
    ),
    "tdpo1": Method(
        tdpo1, "-log s(beta (rho - (KL_l - KL_w))),  KL = sum_t KL(reference || policy)", *TDPO,
        note="Reads the sequential KL, so the reference's whole distribution is needed at every step.",
        foreign={"alpha": "tdpo1 has none; tdpo2 has."},
    ),
    "tdpo2": Method(
        tdpo2, "-log s(beta (rho - alpha (KL_l - sg KL_w))),  KL = sum_t KL(reference || policy)", *TDPO,
        note="sg stops the gradient. Reads the sequential KL, so the reference's whole distribution is needed at "
        "every step.",
        also=("tdpo",),
        foreign={"if_tdpo2": "tdpo2 is tdpo2 and tdpo1 is tdpo1 here."},
    ),
}
# fmt: on
