"""What varies in a sweep: axes, points, draws, and the combinations that they make."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

MATCH_KEY = "match"
"""In a point: whether this point's betas are matched."""


@dataclass(frozen=True)
class Axis:
    """One key and its values."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Distribution:
    """One key and what its values are drawn from."""

    key: str
    kind: str
    given: tuple[Any, ...]
    """Lower and upper end, or the choices."""

    def draw(self, generator: random.Random) -> Any:
        """Return one value; numbers are rounded to three digits, for they become names of folders."""
        if self.kind == "choice":
            return generator.choice(self.given)
        low, high = self.given
        if self.kind == "uniform":
            return float(f"{generator.uniform(low, high):.3g}")
        return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.3g}")


@dataclass(frozen=True)
class Match:
    """Betas are DPO's; every other loss takes the beta that regularises as strongly."""

    tokens: float | None = None
    """Tokens of a completion, for losses that take means; None measures them on the data."""


@dataclass(frozen=True)
class EarlyStopping:
    """ASHA: at each rung only the best 1 / factor of the runs go on."""

    metric: str = "eval.accuracy"
    """One of `BETTER`."""
    grace: float = 0.25
    """Share of a run before which it is not stopped."""
    factor: int = 3


@dataclass(frozen=True)
class Axes:
    """Everything that the section says."""

    grid: tuple[Axis, ...] = ()
    points: tuple[tuple[Axis, ...], ...] = ()
    """Each a small grid of its own; crossed with the axes."""
    distributions: tuple[Distribution, ...] = ()
    samples: int = 1
    samples_seed: int = 0
    match: Match | None = None
    early_stopping: EarlyStopping | None = None

    def varied(self) -> list[str]:
        """Return every key that varies, each once, in the order in which they are written."""
        inside = [axis.key for point in self.points for axis in point if axis.key != MATCH_KEY]
        return list(
            dict.fromkeys([*inside, *(axis.key for axis in self.grid), *(each.key for each in self.distributions)])
        )

    def with_default(self, axis: Axis) -> Axes:
        """Return the same with an axis wherever its key does not vary: in some of the points, or crossed with all."""
        if axis.key in [each.key for each in self.grid] + [each.key for each in self.distributions]:
            return self
        if not any(each.key == axis.key for point in self.points for each in point):
            return replace(self, grid=(*self.grid, axis))
        points = [point if any(each.key == axis.key for each in point) else (*point, axis) for point in self.points]
        return replace(self, points=tuple(points))

    def count(self) -> int:
        """Return the number of runs."""
        points = sum(math.prod(len(axis.values) for axis in point) for point in self.points) if self.points else 1
        return points * self.samples * math.prod(len(axis.values) for axis in self.grid)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yield what each run changes; seeds vary slowest, so that a sweep that is stopped has whole seeds."""
        seeds = [axis for axis in self.grid if axis.key == "seed"]
        others = [axis for axis in self.grid if axis.key != "seed"]
        generator = random.Random(self.samples_seed)
        drawn = [{each.key: each.draw(generator) for each in self.distributions} for _ in range(self.samples)]
        points: list[dict[str, Any]] = [changes for point in self.points for changes in _grid(point)] or [{}]
        for outer in _grid(seeds):
            for point, inner, draws in itertools.product(points, list(_grid(others)), drawn):
                yield {**point, **inner, **draws, **outer}


def _grid(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*(axis.values for axis in axes)):
        yield {axis.key: value for axis, value in zip(axes, values)}
