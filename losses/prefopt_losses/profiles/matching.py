"""What f makes of a preference of strength p, and the beta at which two losses regularise alike.

If the first completion wins with probability p, the margin that minimises p f(x) + (1 - p) f(-x) is x*(p). Turned
round, a margin x implies the win probability p_f(x) = f'(-x) / (f'(x) + f'(-x)); two functions with the same p_f have
the same optimum at every strength and differ only in how finite data get there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from prefopt_losses.profiles.curve import Curve, bisect

Class: TypeAlias = Literal["logistic", "linear", "step", "constant", "own", "none"]


@dataclass(frozen=True)
class Population:
    """Which losses share the optimum of this one on unlimited data."""

    kind: Class
    """logistic: p_f(x) = s(scale x), DPO's. linear: (1 + scale x) / 2, IPO's. step: the hinge's. constant: 1/2
    everywhere. own: none of these. none: no single optimum, for f'(x) + f'(-x) is not negative around zero."""
    scale: float | None = None


def win_probability(curve: Curve, x: Tensor) -> Tensor:
    """Return p_f(x) = f'(-x) / (f'(x) + f'(-x)), NaN where the denominator is not negative: no optimum there."""
    there, mirrored = curve.slopes(x), curve.slopes(-x)
    total = there + mirrored
    return torch.where(total < 0, mirrored / total, torch.nan)


def population(curve: Curve, kappa: float | None) -> Population:
    """Return the class of p_f, compared on |x| <= 4 to six digits."""
    x = torch.linspace(-4, 4, 82, dtype=torch.float64)  # an even number of points leaves kinks at integers out
    x = x[(x.abs() <= min(map(abs, curve.domain)))]
    p = win_probability(curve, x)
    if bool(p[x.abs() < 1].isnan().any()):
        return Population("none")
    near = lambda other, within=slice(None): torch.allclose(p[within], other[within], rtol=0, atol=1e-6)  # noqa: E731
    if near(torch.full_like(p, 0.5)):
        return Population("constant")
    if near((2 * p).round() / 2):
        return Population("step", x[p > 0.75].min().round(decimals=1).item() if bool((p > 0.75).any()) else None)
    if not kappa:
        return Population("own")
    if near(torch.sigmoid(2 * kappa * x)):
        return Population("logistic", _short(2 * kappa))
    inner = (kappa * x).abs() < 0.999
    return Population("linear", _short(kappa)) if near((1 + kappa * x) / 2, inner) else Population("own")


def _short(number: float) -> float:
    return float(f"{number:.9g}")


def optimum(curve: Curve, p: float) -> float | None:
    """Return x*(p): where p f(x) + (1 - p) f(-x), walked down from x = 0, comes to rest.

    Args:
        curve: the function.
        p: probability that the first completion wins, from 1/2 (excluded) to 1.

    Returns:
        the margin; None where it does not fall from zero to the right, or never comes to rest.
    """

    def slope(x: Tensor) -> Tensor:
        mirrored = (1 - p) * curve.slopes(-x) if p < 1 else 0.0  # 0 * inf would be NaN
        return p * curve.slopes(x) - mirrored

    edge = curve.domain[1] if p == 1 else min(map(abs, curve.domain))
    near = torch.linspace(0, min(10.0, edge), 4001, dtype=torch.float64)
    far = torch.logspace(1, 4, 601, dtype=torch.float64)[1:] if edge >= curve.radius else near[:0]
    x = torch.cat([near, far])
    h = slope(x)
    if not h[0] < 0:
        return None
    stops = (~(h < 0)).nonzero().flatten()
    if not len(stops) or not math.isfinite(h[stops[0]]):
        return None
    stop = int(stops[0])
    if abs(h[stop - 1]) < 1e-25 * abs(h[0]):  # it ran out of digits, not downhill
        return None
    falls = lambda at: slope(torch.tensor([at], dtype=torch.float64)).item() < 0  # noqa: E731
    return round(bisect(falls, x[stop - 1].item(), x[stop].item()), 9)
