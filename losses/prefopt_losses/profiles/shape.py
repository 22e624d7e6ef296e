"""What a curve does: where it rests, where it breaks, how its tails pull, how low it falls, where it overflows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from prefopt_losses.convex import Function
from prefopt_losses.profiles.curve import Curve, bisect, slopes

Rest: TypeAlias = Literal["minimum", "maximum", "inflection", "flat"]
TailKind: TypeAlias = Literal[
    "grows exponentially", "grows", "levels off", "fades", "is zero", "turns round", "unknown"
]

FAR = 1e4
"""How far tails, bounds and overflow are looked at."""
UNDERFLOW = 1e-30
"""A slope smaller than this, relative to f'(0), has run out of digits rather than come to rest."""


@dataclass(frozen=True)
class Stationary:
    """Where f' is zero or changes its sign."""

    kind: Rest
    x: float
    end: float | None = None
    """Of a flat stretch: where it ends (the edge of the interval looked at, if it reaches that)."""


@dataclass(frozen=True)
class Kink:
    """Where f' jumps."""

    x: float
    left: float
    right: float


@dataclass(frozen=True)
class Tail:
    """How f pulls far from zero, measured in units of the pull at zero."""

    kind: TailKind
    ratio: float | None
    """-f'(at) / |f'(0)|: positive where the margin is pulled up, negative where it is pushed down."""
    at: float


@dataclass(frozen=True)
class LowerBound:
    """How low f falls."""

    value: float | None
    """The bound; None: none, or none found."""
    unbounded: bool
    at: float
    """Where the bound is taken or approached (inf: towards that side), or the witness of unboundedness."""
    witness: float | None = None
    """f there, if unbounded or not found."""


@dataclass(frozen=True)
class Overflow:
    """Nearest points on either side where value or slope is not finite in a dtype; None: finite to 1e4."""

    dtype: str
    below: float | None
    above: float | None
    refused: str = ""
    """What f said where it does not take this dtype at all."""

    @property
    def radius(self) -> float | None:
        """The smallest |x| that overflows."""
        return min((abs(x) for x in (self.below, self.above) if x is not None), default=None)


def stationary(curve: Curve) -> tuple[Stationary, ...]:
    """Return the zeros of f' in the domain, ascending: sign changes, bisected, and flat stretches."""
    x, _, slope = curve.sampled
    sign = torch.where(slope.abs() > UNDERFLOW * _scale(curve), slope.sign(), 0.0)
    signs, counts = torch.unique_consecutive(sign, return_counts=True)
    ends = counts.cumsum(0)
    runs = list(zip(signs.int().tolist(), (ends - counts).tolist(), (ends - 1).tolist()))
    found: list[Stationary] = []
    for (before, _, last), (after, first, end), (beyond, *_) in zip([(0, 0, 0), *runs], runs, [*runs[1:], (0, 0, 0)]):
        if after == 0 and end > first:
            found.append(_flat(curve, x, first, end))
        elif after == 0 and before and beyond:
            found.append(Stationary(_kind(before, beyond), x[first].item()))
        elif before and after and first:
            found.append(Stationary(_kind(before, after), _tidy(_turn(curve, before, x[last].item(), x[first].item()))))
    return tuple(found)


def _turn(curve: Curve, before: int, start: float, end: float) -> float:
    return bisect(lambda x: curve.slope(x) * before > 0, start, end)


def _flat(curve: Curve, x: Tensor, first: int, last: int) -> Stationary:
    still = UNDERFLOW * _scale(curve)

    def moves(point: float) -> bool:
        return abs(curve.slope(point)) > still

    start, end = x[first].item(), x[last].item()
    if first > 0:
        start = bisect(moves, x[first - 1].item(), start)
    if last < len(x) - 1:
        end = bisect(moves, x[last + 1].item(), end)
    return Stationary("flat", _tidy(start), _tidy(end))


def _kind(before: int, after: int) -> Rest:
    if before < 0 < after:
        return "minimum"
    return "maximum" if before > 0 > after else "inflection"


def _tidy(x: float) -> float:
    """Take a bisected number whose last digits are rounding to the short one it means."""
    return round(x, 9) + 0.0


def _scale(curve: Curve) -> float:
    return abs(curve.slope(0.0)) or 1.0


def kinks(curve: Curve) -> tuple[Kink, ...]:
    """Return where f' jumps inside the domain, at most 16 places."""
    x, _, slope = curve.sampled
    change = torch.diff(slope).abs()
    around = torch.stack([change.roll(shift) for shift in (-3, -2, 2, 3)]).amax(0)
    sudden = (change > 8 * around + 1e-6 * _scale(curve)).nonzero().flatten().tolist()
    found: list[Kink] = []
    for i in sudden[:64]:
        at = _tidy(_follow(curve, x[i].item(), x[i + 1].item()))
        left, right = curve.one_sided_slopes(at)
        if abs(right - left) > 0.5 * change[i].item() and all(abs(at - other.x) > 1e-6 for other in found):
            found.append(Kink(at, left, right))
    return tuple(found[:16])


def _follow(curve: Curve, start: float, end: float) -> float:
    """Halve an interval towards the larger change of f'."""
    for _ in range(60):
        middle = (start + end) / 2
        low, here, high = curve.slopes(torch.tensor([start, middle, end], dtype=torch.float64)).tolist()
        start, end = (start, middle) if abs(here - low) >= abs(high - here) else (middle, end)
    return (start + end) / 2


def tail(curve: Curve, side: Literal["left", "right"]) -> Tail:
    """Return how f' goes on up to 20 and up to 40 on one side, or up to the last points where f exists."""
    sign = -1.0 if side == "left" else 1.0
    edge = curve.domain[0 if side == "left" else 1]
    at_zero = curve.slope(0.0)
    inside = abs(edge) < curve.radius
    end = edge if inside else sign * 40.0
    middle, far = _peak(curve, end / 3, end / 2), _peak(curve, end / 1.5, end)
    if not (math.isfinite(middle) and math.isfinite(far)):
        return Tail("unknown", None, end)
    ratio = -curve.slope(end) / abs(at_zero) + 0.0 if at_zero else None
    return Tail(_tail_kind(middle, far, at_zero), ratio, end)


def _peak(curve: Curve, start: float, end: float) -> float:
    """Return the slope that is largest in magnitude on a stretch, so that no ripple is taken for a trend."""
    slope = curve.slopes(torch.linspace(start, end, 65, dtype=torch.float64))
    return slope[slope.abs().nan_to_num(nan=math.inf).argmax()].item()


def _tail_kind(middle: float, far: float, at_zero: float) -> TailKind:
    scale = abs(at_zero) or 1.0
    if abs(middle) <= UNDERFLOW * scale and abs(far) <= UNDERFLOW * scale:
        return "is zero"
    if far > 1e-3 * scale:
        return "turns round"
    if abs(far) < 0.9 * abs(middle):
        return "fades"
    if abs(far) < 1.1 * abs(middle):
        return "levels off"
    return "grows exponentially" if abs(far) > 100 * abs(middle) else "grows"


def lower_bound(curve: Curve, rests: tuple[Stationary, ...]) -> LowerBound:
    """Return the least value of f out to 1e4 on both sides, and whether it goes on falling there."""
    distance = torch.logspace(-2, math.log10(FAR), 241, dtype=torch.float64)
    low, high = curve.domain
    tails = [t for t, edge in ((-distance.flip(0), low), (distance, high)) if abs(edge) >= curve.radius]
    for side in tails:
        if (falling := _falls_for_ever(curve, side)) is not None:
            return falling
    x = torch.cat([*tails, curve.sampled[0], torch.tensor([each.x for each in rests], dtype=torch.float64)])
    value = curve.values(x)
    x, value = x[value.isfinite()], value[value.isfinite()]
    least = value.min().item()
    first = x[value <= least + 1e-12 * max(1.0, abs(least))]
    at = first[first.abs().argmin()].item()
    if any(each.x - 1e-9 < at < (each.end if each.end is not None else each.x) + 1e-9 for each in rests):
        return LowerBound(_tidy(least), False, _tidy(at))
    for side in tails:
        end, before = curve.value(_outermost(side)), curve.value(_outermost(side) / 10)
        if end == least or abs(end - least) <= 1e-12:
            settled = abs(before - end) <= 1e-6 * max(1.0, abs(curve.value(0.0)))
            towards = math.copysign(math.inf, _outermost(side))
            return LowerBound(_tidy(least), False, towards) if settled else LowerBound(None, False, at, least)
    return LowerBound(*_beside(curve, at))


def _beside(curve: Curve, at: float) -> tuple[float, bool, float]:
    """Return the least value near a point of the grid where f does not rest: at an edge, or beside a jump."""
    step = 2 * curve.radius / len(curve.grid)
    while step > 1e-10 * max(1.0, abs(at)):
        x = at + step * torch.linspace(-1, 1, 65, dtype=torch.float64)
        value = curve.values(x)
        at, step = x[value.where(value.isfinite(), math.inf).argmin()].item(), step / 16
    return _tidy(curve.value(at)), False, _tidy(at)


def _outermost(side: Tensor) -> float:
    return side[side.abs().argmax()].item()


def _falls_for_ever(curve: Curve, side: Tensor) -> LowerBound | None:
    """Return a witness where f, walking outwards, falls with a slope that does not fade."""
    outward = side[side.abs().argsort()]
    value, slope = curve.values(outward), curve.slopes(outward) * outward.sign()
    kept = value.isfinite() & slope.isfinite()
    broken = (~kept).nonzero().flatten()
    last = int(broken[0]) if len(broken) else len(outward)
    if last < 20:
        return None
    outward, value, slope = outward[:last], value[:last], slope[:last]
    decade = slope[outward.abs() >= outward[-1].abs() / 10]
    steady = bool((decade < -1e-9 * _scale(curve)).all()) and decade[-1] <= 0.9 * decade[0]
    if not (steady and value[-1] < min(0.0, curve.value(0.0))):
        return None
    return LowerBound(None, True, outward[-1].item(), value[-1].item())


def overflow(f: Function, dtype: torch.dtype) -> Overflow:
    """Return where value or slope stop being finite when x is given in this dtype."""
    name = str(dtype).removeprefix("torch.")
    distance = torch.logspace(-2, math.log10(FAR), 1201, dtype=torch.float64)
    try:
        return Overflow(name, _first_broken(f, dtype, -distance), _first_broken(f, dtype, distance))
    except (RuntimeError, TypeError, ValueError) as error:
        return Overflow(name, None, None, str(error).strip().splitlines()[0])


def _first_broken(f: Function, dtype: torch.dtype, points: Tensor) -> float | None:
    def finite(x: Tensor) -> Tensor:
        cast = x.to(dtype)
        return f(cast.clone()).detach().isfinite() & slopes(f, cast).isfinite()

    broken = (~finite(points)).nonzero().flatten()
    if not len(broken):
        return None
    first = int(broken[0])
    edge = points[max(first - 1, 0)].item()
    inside = bisect(lambda x: bool(finite(torch.tensor([x], dtype=torch.float64))), edge, points[first].item())
    return round(inside, 1)
