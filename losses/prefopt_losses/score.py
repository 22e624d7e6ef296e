"""One score per completion: s(y) = link( A[log pi(y)] - c * A[log pi_ref(y)] ).

A is the sum or the mean over completion tokens, or a weighted sum; c is 1 with a reference and 0 without. The score
decides what a loss compares: log-ratios to a reference (DPO), length-normalised likelihoods (SimPO), log-odds
(ORPO), the beginning of a completion more than its end (D2PO).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt_losses.convex import Function
from prefopt_losses.errors import LossError
from prefopt_losses.inputs import LogProbs

Side: TypeAlias = Literal["chosen", "rejected"]


def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x), the log-probability of the complement, for x < 0.

    e^x - 1 is taken by expm1, so nothing cancels near x = 0 (1 - exp(-1e-7) keeps one digit in fp32, and
    log1p(-exp(x)) is -inf from x = -3e-8 on). x is held below -eps^2: at probability 1 (or above it, by
    rounding) the value stays finite (-32 in fp32) with gradient 0, and no gradient exceeds 1/eps^2.
    """
    ceiling = -(torch.finfo(x.dtype).eps ** 2)
    return torch.log(-torch.expm1(x.clamp(max=ceiling)))


def log_odds(x: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of a probability given by its logarithm x = log p."""
    return x - log1mexp(x)


EXPONENT = 80.0
"""Where the links of f-divergences hold their exponents: e^80 = 6e34 and its multiples by beta are fp32 numbers.
Further out the link is flat, so that value and gradient stay finite."""


def forward_kl(u: Tensor) -> Tensor:
    """Return f'(e^u) = 1 - e^-u of the forward KL divergence, f(t) = -log t."""
    return -torch.expm1((-u).clamp(max=EXPONENT))


def jensen_shannon(u: Tensor) -> Tensor:
    """Return f'(e^u) = log(2 e^u / (1 + e^u)) of the Jensen-Shannon divergence; at most log 2."""
    return math.log(2) + F.logsigmoid(u)


def chi_squared(u: Tensor) -> Tensor:
    """Return f'(e^u) = e^u + u (up to a constant) of the sum of chi-squared and reverse KL divergence."""
    return u + torch.exp(u.clamp(max=EXPONENT))


@dataclass(frozen=True)
class AlphaDivergence:
    """f'(e^u) = (1 - e^(-alpha u)) / alpha: reverse KL as alpha goes to 0, forward KL at 1."""

    alpha: float

    def __call__(self, u: Tensor) -> Tensor:
        """Return the link of log-ratios, elementwise."""
        return -torch.expm1((-self.alpha * u).clamp(max=EXPONENT)) / self.alpha


LINKS: dict[str, Function] = {
    "identity": identity,
    "log_odds": log_odds,
    "forward_kl": forward_kl,
    "jensen_shannon": jensen_shannon,
    "chi_squared": chi_squared,
}


@dataclass(frozen=True)
class TokenWeights:
    """A weighted sum over completion tokens, by position and by both lengths."""

    name: str
    weights: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    """(positions (1, tokens) from 0, in the dtype of the log-probs, own lengths (batch, 1), the other completion's
    (batch, 1), number of the draw) -> (batch, tokens) or what broadcasts to it, in the dtype of the positions.
    Weights beyond the own length are not read."""
    draws: bool = False
    """Whether the weights are sampled: another number of the draw, other weights."""


Aggregate: TypeAlias = Literal["sum", "mean"] | TokenWeights


@dataclass(frozen=True)
class Score:
    """How the tokens of one completion become one number."""

    aggregate: Aggregate = "sum"
    """Over completion tokens: their sum, their mean (which needs the lengths), or a weighted sum (which needs
    per-token log-probs and both lengths)."""
    reference: bool = True
    """Whether the reference's log-prob is subtracted."""
    link: Function = identity
    """Applied last: identity, log_odds, the derivative of an f-divergence, ..."""

    def __call__(self, logps: Tensor | None, ref_logps: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Return one score per completion, from summed log-probs.

        Args:
            logps: (batch,), the policy's, nats, summed over completion tokens.
            ref_logps: (batch,), the reference's, likewise; read only with `reference`.
            lengths: (batch,), scored tokens; read only for the mean.

        Returns:
            (batch,), in fp32 or wider: 16-bit log-probs are widened before anything is subtracted.

        Raises:
            LossError: one that is read is None.
        """
        value = widened(_given(logps, "logps"))
        if self.reference:
            value = value - widened(_given(ref_logps, "ref_logps"))
        if self.aggregate == "mean":
            value = value / _given(lengths, "lengths")
        return self.link(value)

    def of(self, record: LogProbs, side: Side) -> Tensor:
        """Return the score of one side of a record, shape (batch,); fp32 or wider."""
        other = "rejected" if side == "chosen" else "chosen"
        logps, ref_logps, lengths = (f"{side}_logps", f"ref_{side}_logps", f"{side}_lengths")
        if not isinstance(self.aggregate, TokenWeights):
            return self(getattr(record, logps), getattr(record, ref_logps), getattr(record, lengths))
        value = widened(_given(getattr(record, f"{side}_token_logps"), f"{side}_token_logps"))
        if self.reference:
            name = f"ref_{side}_token_logps"
            value = value - widened(_given(getattr(record, name), name))
        own = _given(getattr(record, lengths), lengths)[:, None]
        others = _given(getattr(record, f"{other}_lengths"), f"{other}_lengths")[:, None]
        positions = torch.arange(value.shape[1], device=value.device, dtype=value.dtype)[None]
        weights = self.aggregate.weights(positions, own, others, record.draw)
        return self.link((value * weights).masked_fill(positions >= own, 0).sum(-1))

    def reads(self, side: Side) -> frozenset[str]:
        """Return the fields of `LogProbs` that the score of a side needs."""
        if isinstance(self.aggregate, TokenWeights):
            return frozenset(
                {f"{side}_token_logps", "chosen_lengths", "rejected_lengths"}
                | ({f"ref_{side}_token_logps"} if self.reference else set())
            )
        fields = {f"{side}_logps"}
        if self.reference:
            fields.add(f"ref_{side}_logps")
        if self.aggregate == "mean":
            fields.add(f"{side}_lengths")
        return frozenset(fields)

    @property
    def aggregate_name(self) -> str:
        """`sum`, `mean`, or the name of the token weights."""
        return self.aggregate.name if isinstance(self.aggregate, TokenWeights) else self.aggregate


LOG_RATIO = Score(aggregate="sum", reference=True)
MEAN_LOG_RATIO = Score(aggregate="mean", reference=True)
LIKELIHOOD = Score(aggregate="sum", reference=False)
MEAN_LIKELIHOOD = Score(aggregate="mean", reference=False)


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise LossError(f"{name}: this score needs it and it is missing.")
    return tensor


def widened(logps: Tensor) -> Tensor:
    """Return 16-bit log-probs, and scores that are whole numbers, as fp32; wider ones as they are."""
    return logps if logps.dtype in (torch.float32, torch.float64) else logps.float()
