"""Is f convex? Certified by its algebra, refuted by a point, or not refuted on an interval; never guessed.

Sampling can only refute: a chord that runs below the curve is a proof, a thousand that do not are none. A
certificate comes from the table of atoms below and from what keeps convexity: f of an affine argument, and
q f(x) + (1 - q) f(-x) with q between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from prefopt_losses.convex import FUNCTIONS, Function
from prefopt_losses.profiles.curve import Curve, bisect

Status: TypeAlias = Literal["certified", "refuted", "not refuted"]

# Why each atom is convex. A function that is not here is sampled.
PROOFS: dict[str, str] = {
    "logistic": "f'' = s(x) s(-x) > 0",
    "hinge": "the larger of two lines, 0 and 1 - x",
    "squared": "f'' = 2",
    "exponential": "f'' = e^-x > 0",
    "truncated_quadratic": "u^2, rising for u >= 0, of the convex u = max(0, 1 - x)",
    "linear": "a line",
    "cell": "half the sum of exponential and logistic, both convex",
    "quadratic": "f'' = 2",
}

STEP = 1e-9
"""A step in f, relative to f, below which it is rounding: torch's softplus changes to a line with one of 1e-10."""
REFINED = 16
"""Regions, from zero outwards, whose edges are bisected; those of a wilder function stay on the grid."""


@dataclass(frozen=True)
class Convexity:
    """The verdict, and what it rests on."""

    status: Status
    reason: str
    """certified: the proof. refuted: where f bends the wrong way. not refuted: what was looked at."""
    witness: float | None = None
    """Refuted: a point where f lies above the chord between its neighbours at `witness` - and + `width`."""
    width: float | None = None
    regions: tuple[tuple[float, float], ...] = ()
    """Refuted: intervals, inside the one looked at, where f' falls; a jump is an interval of one point."""


def certificate(f: Function, low: float = 1.0, high: float = 1.0) -> str | None:
    """Return why q f(x) + (1 - q) f(-x) is convex for every label q in [low, high], or None."""
    proof = next((PROOFS[name] for name, known in FUNCTIONS.items() if known is f and name in PROOFS), None)
    if proof is None or not (0 <= low <= high <= 1):
        return None
    return proof if low == high == 1 else f"{proof}; q f(x) + (1 - q) f(-x) with 0 <= q <= 1 keeps it"


def convexity(curve: Curve, proof: str | None = None) -> Convexity:
    """Return the verdict on a curve.

    Args:
        curve: the function and its grid.
        proof: of its convexity; without one it is sampled.
    """
    if proof:
        return Convexity("certified", proof)
    low, high = curve.domain
    x, value, slope = curve.sampled
    suspects = sorted(_suspects(curve, x, value, slope), key=lambda run: min(map(abs, run)))
    found = [_refined(curve, *run) for run in suspects[:REFINED]] + suspects[REFINED:]
    kept = [(region, witness) for region in _joined(found) if (witness := _witness(curve, region))]
    if not kept:
        return Convexity("not refuted", f"no chord below the curve among {len(x)} points on [{low:g}, {high:g}]")
    regions = tuple(region for region, _ in kept)
    point, width, _ = max((witness for _, witness in kept), key=lambda each: each[2])
    return Convexity("refuted", where(regions, (low, high)), point, width, regions)


def where(regions: tuple[tuple[float, float], ...], domain: tuple[float, float]) -> str:
    """Say where f bends the wrong way: below, above, between or at; of many places the four widest."""
    widest = sorted(sorted(regions, key=lambda region: region[0] - region[1])[:4])
    shown = [_region(start, end, domain) for start, end in widest]
    more = f" and {len(regions) - 4} more places" if len(regions) > 4 else ""
    return ", ".join(shown) + more


def _region(start: float, end: float, domain: tuple[float, float]) -> str:
    low, high = domain
    start, end = round(start, 3) + 0.0, round(end, 3) + 0.0  # + 0.0: no "-0.000"
    if start == end:
        return f"at x = {start:.3f}"
    if start <= low and end >= high:
        return f"everywhere on [{low:g}, {high:g}]"
    if start <= low:
        return f"below x = {end:.3f}"
    return f"above x = {start:.3f}" if end >= high else f"between x = {start:.3f} and {end:.3f}"


def _suspects(curve: Curve, x: Tensor, value: Tensor, slope: Tensor) -> list[tuple[float, float]]:
    """Return runs of grid points along which f' falls, or f lies above the chord of its neighbours."""
    noise = 64 * curve.eps * torch.maximum(slope[1:].abs(), slope[:-1].abs())
    falls = torch.diff(slope) < -noise
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    chord = value[:-2] + share * (value[2:] - value[:-2])
    scale = torch.maximum(value[:-2].abs(), value[2:].abs()).clamp(min=torch.finfo(torch.float64).tiny)
    above = value[1:-1] - chord > 1e4 * curve.eps * scale
    falls[:-1] |= above
    falls[1:] |= above
    edges = torch.diff(torch.cat([falls.new_zeros(1), falls, falls.new_zeros(1)]).int())
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [(x[i].item(), x[j].item()) for i, j in zip(starts.tolist(), ends.tolist())]


def _refined(curve: Curve, start: float, end: float) -> tuple[float, float]:
    """Move both ends of a run to where f' really stops falling, by bisection on the sign of the curvature."""
    low, high = curve.domain
    step = 2 * curve.radius / len(curve.grid)

    def bends_down(x: float) -> bool:
        curvature = curve.curvature(x)
        return curvature is not None and curvature < 0

    inside = next((x for x in _within(start, end) if bends_down(x)), None)
    if inside is None or end - start < 4 * step:
        point = _steepest_fall(curve, start, end)
        if inside is None or _breaks(curve, point):
            return point, point
    left = start if start <= low else bisect(bends_down, inside, max(low, start - step))
    right = end if end >= high else bisect(bends_down, inside, min(high, end + step))
    return left, right


def _within(start: float, end: float) -> list[float]:
    return torch.linspace(start, end, 9, dtype=torch.float64)[1:-1].tolist()


def _steepest_fall(curve: Curve, start: float, end: float) -> float:
    """Follow the larger drop of f', or where f' does not drop the larger jump of f, down to one point."""
    for _ in range(50):
        middle = (start + end) / 2
        x = torch.tensor([start, middle, end], dtype=torch.float64)
        drops = -torch.diff(curve.slopes(x))
        jumps = torch.diff(curve.values(x)).abs()
        first, second = drops.tolist() if drops.max() > 0 else jumps.tolist()
        start, end = (start, middle) if first >= second else (middle, end)
    return (start + end) / 2


def _breaks(curve: Curve, x: float) -> bool:
    """Whether f jumps or has a kink there."""
    left, right = curve.one_sided_slopes(x)
    jump = abs(curve.value(x + 1e-9) - curve.value(x - 1e-9))
    return abs(right - left) > 1e-3 * max(abs(left), abs(right)) or jump > 1e-6 * max(1.0, abs(curve.value(x)))


def _joined(regions: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(regions):
        if joined and start <= joined[-1][1] + 1e-9:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _witness(curve: Curve, region: tuple[float, float]) -> tuple[float, float, float] | None:
    """Return (point, width, gap) of a chord that runs below the curve by more than rounding; the widest gap."""
    (low, high), (start, end) = curve.domain, region
    sudden = end - start < 1e-6
    widths = [2.0**-k for k in range(-3, 12)] if sudden else [(end - start) / 2**k for k in range(1, 8)]
    tries = []
    for point in {(start + end) / 2, start - 1e-9, start + 1e-9} if sudden else _within(start, end):
        for width in widths:
            if low <= point - width and point + width <= high:
                left, here, right = (curve.value(point + by) for by in (-width, 0.0, width))
                gap, rounding = here - (left + right) / 2, STEP if sudden else 32 * curve.eps
                if gap > rounding * max(abs(left), abs(here), abs(right)):
                    tries.append((point, width, gap))
    return max(tries, key=lambda each: each[2], default=None)
