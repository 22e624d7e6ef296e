"""A scalar function in float64: values, slopes and curvatures at points, and where they exist.

Everything a profile says is read off this one object. Slopes come from autograd, so they are what training
sees, including the convention that a function's author chose at a kink; one-sided slopes tell the kink itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from prefopt_losses.convex import Function
from prefopt_losses.errors import LossError
from prefopt_losses.own_function import checked

POINTS = 4000
"""Grid points on each side of zero; within 10 of zero they lie 0.0025 apart."""
CLOSE = 1e-11
"""How near both sides of an edge are when bisection ends, relative to where they lie (absolute within 1)."""


@dataclass(frozen=True)
class Curve:
    """An elementwise function and the grid it is looked at on."""

    f: Function
    name: str
    radius: float = 20.0
    eps: float = field(init=False)
    """Relative rounding of the values: coarser than float64 where f works in another dtype inside."""

    def __post_init__(self) -> None:
        if not (isinstance(self.radius, int | float) and 1.5 <= self.radius <= 1e4):
            raise LossError(f"radius: expected a number from 1.5 to 10000, given {self.radius!r}.")
        object.__setattr__(self, "eps", checked(self.f, self.name))
        at_zero = self.value(0.0), self.slope(0.0)
        if not all(map(math.isfinite, at_zero)):
            raise LossError(
                f"{self.name}: expected a finite value and slope at x = 0, where training starts, "
                f"given f(0) = {at_zero[0]:g} and f'(0) = {at_zero[1]:g}."
            )

    @cached_property
    def grid(self) -> Tensor:
        """Points from -radius to radius that hold 0, ascending; finer near zero if the radius is large."""
        wide = torch.arange(-POINTS, POINTS + 1, dtype=torch.float64) / POINTS
        if self.radius <= 10:
            return self.radius * wide
        return torch.cat([self.radius * wide, 10 * wide]).unique()

    @cached_property
    def domain(self) -> tuple[float, float]:
        """The interval around zero, within the grid, where value and slope are finite."""
        finite = self.values(self.grid).isfinite() & self.slopes(self.grid).isfinite()
        zero = int((self.grid == 0).nonzero())
        broken = (~finite).nonzero().flatten()
        below, above = broken[broken < zero], broken[broken > zero]
        left = int(below[-1]) + 1 if len(below) else 0
        right = int(above[0]) - 1 if len(above) else len(self.grid) - 1
        return self.grid[left].item(), self.grid[right].item()

    @cached_property
    def sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the domain with their values and slopes."""
        low, high = self.domain
        x = self.grid[(self.grid >= low) & (self.grid <= high)]
        return x, self.values(x), self.slopes(x)

    def values(self, x: Tensor) -> Tensor:
        """Return f at float64 points of shape (points,)."""
        return self.f(x.clone()).detach().double()

    def slopes(self, x: Tensor) -> Tensor:
        """Return f' at float64 points of shape (points,), by autograd."""
        return slopes(self.f, x)

    def value(self, x: float) -> float:
        """Return f at one point."""
        return self.values(torch.tensor([x], dtype=torch.float64)).item()

    def slope(self, x: float) -> float:
        """Return f' at one point, as autograd has it."""
        return self.slopes(torch.tensor([x], dtype=torch.float64)).item()

    def one_sided_slopes(self, x: float) -> tuple[float, float]:
        """Return f' just left and just right of a point, extrapolated from two points on each side."""
        h = math.sqrt(self.eps) * max(1.0, abs(x)) * 64
        near = self.slopes(torch.tensor([x - 2 * h, x - h, x + h, x + 2 * h], dtype=torch.float64)).tolist()
        return 2 * near[1] - near[0], 2 * near[2] - near[3]

    def curvature(self, x: float) -> float | None:
        """Return f'' at one point by a second autograd, else by differences; None at a kink."""
        left, right = self.one_sided_slopes(x)
        if abs(right - left) > 1e-4 * max(1.0, abs(left), abs(right)):
            return None
        h = 1e-3 if self.eps < 1e-10 else 1e-2
        by_difference = (self.slope(x + h) - self.slope(x - h)) / (2 * h)
        try:
            point = torch.tensor([x], dtype=torch.float64, requires_grad=True)
            (first,) = torch.autograd.grad(self.f(point.clone()).sum(), point, create_graph=True)
            second = torch.autograd.grad(first.sum(), point)[0].item() if first.requires_grad else 0.0
        except RuntimeError:
            return by_difference
        # An own autograd.Function may give a right slope and, silently, no curvature.
        return second if abs(second - by_difference) <= 1e-3 * max(1.0, abs(by_difference)) else by_difference


def slopes(f: Function, x: Tensor) -> Tensor:
    """Return f' at the points x, in float64; 0 where f does not depend on x."""
    point = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(point.clone()).sum(), point, allow_unused=True)
    return torch.zeros_like(x, dtype=torch.float64) if slope is None else slope.double()


def bisect(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Return the edge between a point where a condition holds and a point where it does not."""
    while abs(outside - inside) > CLOSE * max(1.0, abs(inside)):
        middle = (inside + outside) / 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside
