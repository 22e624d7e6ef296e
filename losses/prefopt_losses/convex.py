"""Scalar functions f(x): what a loss does with a margin.

A preference loss is f of a margin x that is positive when the chosen completion wins. f decides how hard
a wrong pair pulls (left tail), how strongly the policy is held near the reference (kappa = f''(0)/|f'(0)|)
and whether a pair that is already right still moves it (right tail).

    name                  f(x)                f'(0)   f''(0)   convex   right tail
    logistic              log(1 + e^-x)       -1/2    1/4      yes      decays
    hinge                 max(0, 1 - x)       -1      0        yes      0 beyond 1
    squared               (x - 1)^2           -2      2        yes      pulls back beyond 1
    exponential           e^-x                -1      1        yes      decays
    truncated_quadratic   max(0, 1 - x)^2     -2      2        yes      0 beyond 1
    savage                1 / (1 + e^x)^2     -1/4    1/8      no       decays
    ramp                  1 / (1 + e^x)       -1/4    0        no       decays
    linear                -x                  -1      0        yes      never rests
    quadratic             x^2                 0       2        yes      regression, not classification
    cell                  (logistic + e^-x)/2 -3/4    5/8      yes      decays
    padll                 0.9 or 0.45 logistic  -0.45   0.225    no       decays

The first six are Table 1 of GPO (Tang et al. 2024, arXiv:2402.05749); the last two were found by search, with
DiscoPOP (Lu et al. 2024, arXiv:2406.08414). Convexity is stated, not required: Savage is in GPO's table and is not
convex. Every function is elementwise, keeps the dtype, and is finite with a finite gradient for |x| <= 1e4 in fp32,
except `exponential` and `cell`, which are inf below x = -88.

Some have a parameter; none of these is convex:

    class                    f'(0)                         f''(0)            right tail
    ReverseKL(eps)           -log((1 - eps) / eps) / 4     1/4               pulls back beyond log((1 - eps) / eps)
    LogRatioModulated(tau)   -3/4 + (1 - log 2) / 4 tau    5/8 - 1 / 4 tau   decays
    ScaledBasu(lam)          -1/2                          1/4               grows; overflows on both sides
    ClippedLogistic(bound)   -1/2                          1/4               0 beyond the bound, on both sides
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Function: TypeAlias = Callable[[Tensor], Tensor]


def logistic(x: Tensor) -> Tensor:
    """Return log(1 + e^-x), the negative log-likelihood of Bradley-Terry."""
    return -F.logsigmoid(x)


def hinge(x: Tensor) -> Tensor:
    """Return max(0, 1 - x); its derivative at the kink x = 1 is taken as 0."""
    return torch.relu(1 - x)


def squared(x: Tensor) -> Tensor:
    """Return (x - 1)^2; the only one of the family that pulls back once x > 1."""
    return (x - 1).square()


def exponential(x: Tensor) -> Tensor:
    """Return e^-x; overflows to inf below x = -88 in fp32 and bf16, -709 in fp64."""
    return torch.exp(-x)


def truncated_quadratic(x: Tensor) -> Tensor:
    """Return max(0, 1 - x)^2."""
    return torch.relu(1 - x).square()


def savage(x: Tensor) -> Tensor:
    """Return 1 / (1 + e^x)^2; not convex below x = -log 2, where hopeless pairs are given up."""
    return torch.sigmoid(-x).square()


def ramp(x: Tensor) -> Tensor:
    """Return 1 / (1 + e^x); bounded, not convex below x = 0 (KTO's and APO's value function)."""
    return torch.sigmoid(-x)


def linear(x: Tensor) -> Tensor:
    """Return -x; of a log-probability it is the negative log-likelihood."""
    return -x


def quadratic(x: Tensor) -> Tensor:
    """Return x^2, for regression of the margin on a target held in the shift."""
    return x.square()


def cell(x: Tensor) -> Tensor:
    """Return (log(1 + e^-x) + e^-x) / 2; overflows where the exponential does, below x = -88 in fp32."""
    return (logistic(x) + exponential(x)) / 2


def padll(x: Tensor) -> Tensor:
    """Return 0.9 log(1 + e^-x), halved where x < 0: it jumps at 0, and wrong pairs weigh half."""
    return torch.where(x < 0, 0.45 * logistic(x), 0.9 * logistic(x))


def negative_entropy(x: Tensor) -> Tensor:
    """Return s(x) log s(x) + s(-x) log s(-x), the negative entropy of a coin of log-odds x; even in x."""
    return -torch.sigmoid(x) * logistic(x) - torch.sigmoid(-x) * logistic(-x)


@dataclass(frozen=True)
class ReverseKL:
    """KL( Bernoulli(s(x)) || Bernoulli(1 - eps) ): 0 at x = log((1 - eps) / eps), bounded on both sides (EXO)."""

    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return f(x), elementwise."""
        log_odds = math.log1p(-self.eps) - math.log(self.eps)
        return negative_entropy(x) + log_odds * ramp(x) - math.log1p(-self.eps)


@dataclass(frozen=True)
class LogRatioModulated:
    """(1 - s(x / tau)) log(1 + e^-x) + s(x / tau) e^-x: logistic below 0, exponential above (DiscoPOP's LRML).

    For tau < 0.102 the switch from the smaller to the larger of the two outweighs their slopes: f rises through 0.
    """

    tau: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return f(x), elementwise."""
        # s(x / tau) e^-x in one exponential: for tau <= 1 it is finite where e^-x alone overflows.
        exponential_part = torch.exp(-x - logistic(x / self.tau))
        return torch.sigmoid(-x / self.tau) * logistic(x) + exponential_part


@dataclass(frozen=True)
class ScaledBasu:
    """e^(-(lam + 1) x) / (4 (lam + 1)) - e^(lam x) / (4 lam): BPO's scaled Basu power divergence.

    Falls without bound to the right; overflows to either side, in fp32 beyond x = 88 / lam and -88 / (lam + 1).
    """

    lam: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return f(x), elementwise."""
        rising = self.lam + 1
        return torch.exp(-rising * x) / (4 * rising) - torch.exp(self.lam * x) / (4 * self.lam)


@dataclass(frozen=True)
class ClippedLogistic:
    """log(1 + e^-x) of x held within +-bound: beyond it, pairs pull no more, right or wrong."""

    bound: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return f(x), elementwise."""
        return logistic(x.clamp(-self.bound, self.bound))


FUNCTIONS: dict[str, Function] = {
    "logistic": logistic,
    "hinge": hinge,
    "squared": squared,
    "exponential": exponential,
    "truncated_quadratic": truncated_quadratic,
    "savage": savage,
    "ramp": ramp,
    "linear": linear,
    "quadratic": quadratic,
    "cell": cell,
    "padll": padll,
}
