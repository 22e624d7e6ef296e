"""The algebra: every offline preference loss is a sum of terms with five coordinates.

    loss = sum of terms                                            one value per example
    term = coefficient * weight * ( q f(x) + (1 - q) f(-x) )       function f, label q, weight
    x    = beta * ( a . s - shift )                                contrast (a, shift, beta)
    s(y) = link( A[log pi(y)] - c * A[log pi_ref(y)] )             score (A, c, link)

A coordinate is a number, a plain function, or - where each example brings its own value - a `FromRecord`,
which says what it reads. So a term can be printed, compared and profiled without being called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import Tensor

from prefopt_losses.convex import Function
from prefopt_losses.inputs import LogProbs
from prefopt_losses.score import Score

Contrast: TypeAlias = tuple[float, float]
"""a: what the chosen and the rejected score are multiplied by before they are added."""

PAIR: Contrast = (1.0, -1.0)
CHOSEN: Contrast = (1.0, 0.0)
REJECTED: Contrast = (0.0, -1.0)
NEGATED_CHOSEN: Contrast = (-1.0, 0.0)

Unit: TypeAlias = Literal["comparison", "completion", "token"]


@dataclass(frozen=True)
class FromRecord:
    """A coordinate whose value each example brings with it."""

    name: str
    reads: tuple[str, ...]
    """The fields of `LogProbs` it needs."""
    value: Callable[[LogProbs], Tensor]
    """Record -> (batch,)."""
    unit: Unit | None = None
    """The unit over which it normalises the term, if it does."""


Coordinate: TypeAlias = float | FromRecord


@dataclass(frozen=True)
class Term:
    """coefficient * weight * ( q f(x) + (1 - q) f(-x) ), with x = beta * (a . s - shift)."""

    f: Function
    score: Score
    contrast: Contrast = PAIR
    beta: float = 1.0
    shift: Coordinate = 0.0
    """Target margin in the unit of the score, subtracted before beta multiplies."""
    q: Coordinate = 1.0
    """Label: 1 hard, 1 - eps smoothed, (1 - eps) / (1 - 2 eps) robust, a probability soft."""
    coefficient: float = 1.0
    weight: Coordinate = 1.0
    """Factor per example; no gradient flows through it."""

    def __call__(self, record: LogProbs) -> Tensor:
        """Return the term's value, shape (batch,)."""
        x = self.argument(record)
        value = self._labelled(x, _value(self.q, record))
        if isinstance(self.weight, FromRecord):
            value = self.weight.value(record).detach() * value
        elif self.weight != 1.0:
            value = self.weight * value
        return value if self.coefficient == 1.0 else self.coefficient * value

    def argument(self, record: LogProbs) -> Tensor:
        """Return x = beta * (a . s - shift), shape (batch,): what f is applied to."""
        of_chosen, of_rejected = self.contrast
        if not of_rejected:
            contrasted = of_chosen * self.score_chosen(record)
        elif not of_chosen:
            contrasted = of_rejected * self.score_rejected(record)
        else:
            contrasted = of_chosen * self.score_chosen(record) + of_rejected * self.score_rejected(record)
        return self.beta * (contrasted - _value(self.shift, record))

    def score_chosen(self, record: LogProbs) -> Tensor:
        """Return s(chosen), shape (batch,)."""
        return self.score(record.chosen_logps, record.ref_chosen_logps, record.chosen_lengths)

    def score_rejected(self, record: LogProbs) -> Tensor:
        """Return s(rejected), shape (batch,)."""
        return self.score(record.rejected_logps, record.ref_rejected_logps, record.rejected_lengths)

    @property
    def unit(self) -> Unit:
        """What the term is counted in: a comparison, a completion, or a token."""
        if isinstance(self.weight, FromRecord) and self.weight.unit:
            return self.weight.unit
        return "comparison" if all(self.contrast) else "completion"

    @property
    def reads(self) -> frozenset[str]:
        """The fields of `LogProbs` the term needs."""
        sides = {side for side, a in zip(("chosen", "rejected"), self.contrast) if a}
        from_record = (c for c in (self.shift, self.q, self.weight) if isinstance(c, FromRecord))
        return self.reads_of(*sides).union(*(c.reads for c in from_record))

    def reads_of(self, *sides: str) -> frozenset[str]:
        """Return the fields that the scores of these sides ("chosen", "rejected") need."""
        fields = {f"{side}_logps" for side in sides}
        if self.score.reference:
            fields |= {f"ref_{side}_logps" for side in sides}
        if self.score.aggregate == "mean":
            fields |= {f"{side}_lengths" for side in sides}
        return frozenset(fields)

    def scaled(self, factor: float) -> Term:
        """Return the same term with its coefficient multiplied."""
        return replace(self, coefficient=factor * self.coefficient)

    def coordinates(self) -> dict[str, object]:
        """Return every coordinate as plain data; functions and record coordinates by name."""
        return {
            "f": function_name(self.f),
            "aggregate": self.score.aggregate,
            "reference": self.score.reference,
            "link": function_name(self.score.link),
            "contrast": self.contrast,
            "shift": _named(self.shift),
            "beta": self.beta,
            "q": _named(self.q),
            "coefficient": self.coefficient,
            "weight": _named(self.weight),
            "unit": self.unit,
        }

    def _labelled(self, x: Tensor, q: float | Tensor) -> Tensor:
        # A hard label leaves f(-x) out: where f overflows at -x, 0 * inf would be NaN.
        if not isinstance(q, Tensor) and q == 1.0:
            return self.f(x)
        return q * self.f(x) + (1 - q) * self.f(-x)


def function_name(function: Callable[..., object]) -> str:
    """Return the name of a function, or of the class of a callable object."""
    return getattr(function, "__name__", type(function).__name__)


def _value(coordinate: Coordinate, record: LogProbs) -> float | Tensor:
    return coordinate.value(record) if isinstance(coordinate, FromRecord) else coordinate


def _named(coordinate: Coordinate) -> float | str:
    return coordinate.name if isinstance(coordinate, FromRecord) else coordinate
