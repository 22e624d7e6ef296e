"""Scalar functions f(x): what a loss does with a margin.

A preference loss is f of a margin x that is positive when the chosen completion wins. f decides how hard
a wrong pair pulls (left tail), how strongly the policy is held near the reference (kappa = f''(0)/|f'(0)|)
and whether a pair that is already right still moves it (right tail).

    name                  f(x)              f'(0)   f''(0)   convex   right tail
    logistic              log(1 + e^-x)     -1/2    1/4      yes      decays
    hinge                 max(0, 1 - x)     -1      0        yes      0 beyond 1
    squared               (x - 1)^2         -2      2        yes      pulls back beyond 1
    exponential           e^-x              -1      1        yes      decays
    truncated_quadratic   max(0, 1 - x)^2   -2      2        yes      0 beyond 1
    savage                1 / (1 + e^x)^2   -1/4    1/8      no       decays
    ramp                  1 / (1 + e^x)     -1/4    0        no       decays
    linear                -x                -1      0        yes      never rests
    quadratic             x^2               0       2        yes      regression, not classification

The first six are Table 1 of GPO (Tang et al. 2024, arXiv:2402.05749). Convexity is stated, not required:
Savage is in that table and is not convex. Every function is elementwise, keeps the dtype, and is finite with
a finite gradient for |x| <= 1e4 in fp32, except `exponential`, which is inf below x = -88.
"""

from __future__ import annotations

from collections.abc import Callable
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
}
