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

import torch
from torch import Tensor

from prefopt_losses.convex import Function
from prefopt_losses.inputs import LogProbs
from prefopt_losses.score import Score, Side

Contrast: TypeAlias = tuple[float, float]
"""a: what the chosen and the rejected score are multiplied by before they are added."""

PAIR: Contrast = (1.0, -1.0)
CHOSEN: Contrast = (1.0, 0.0)
REJECTED: Contrast = (0.0, -1.0)
NEGATED_PAIR: Contrast = (-1.0, 1.0)
NEGATED_CHOSEN: Contrast = (-1.0, 0.0)
NEITHER: Contrast = (0.0, 0.0)

Unit: TypeAlias = Literal["comparison", "completion", "token"]


@dataclass(frozen=True)
class Running:
    """A number that a loss carries from one optimizer step to the next, such as a running mean of rewards."""

    name: str
    start: float
    reads: tuple[str, ...]
    """The fields of `LogProbs` its update needs."""
    update: Callable[[Tensor, LogProbs], Tensor]
    """(number so far, record of a whole optimizer step) -> number after it; called without gradient."""


@dataclass(frozen=True)
class FromRecord:
    """A coordinate whose value each example brings with it, or that a whole batch settles together."""

    name: str
    reads: tuple[str, ...]
    """The fields of `LogProbs` it needs."""
    value: Callable[[LogProbs], Tensor]
    """Record -> (batch,), or one number for the batch."""
    unit: Unit | None = None
    """The unit over which it normalises the term, if it does."""
    batch: bool = False
    """Whether an example's value depends on the other examples of the optimizer step."""
    minimum: int = 1
    """Examples a batch must hold for it to mean something."""
    running: tuple[Running, ...] = ()
    """Numbers carried from step to step that it reads, as `record.state[name]`."""
    learns: tuple[str, ...] = ()
    """Those of its tensors that may be learned beside the policy, for gradient flows through them."""


Coordinate: TypeAlias = float | FromRecord
Sort: TypeAlias = Literal["margins", "scores"]


@dataclass(frozen=True)
class Term:
    """coefficient * weight * ( q f(x) + (1 - q) f(-x) ), with x = beta * (a . s - shift)."""

    f: Function
    score: Score
    contrast: Contrast = PAIR
    beta: Coordinate = 1.0
    shift: Coordinate = 0.0
    """Target margin in the unit of the score, subtracted before beta multiplies."""
    q: Coordinate = 1.0
    """Label: 1 hard, 1 - eps smoothed, (1 - eps) / (1 - 2 eps) robust, a probability soft."""
    coefficient: float = 1.0
    weight: Coordinate = 1.0
    """Factor per example; no gradient flows through it."""
    sort: Sort | None = None
    """Compare distributions over the batch instead of pairs: sort the policy's and the reference's margins, or
    the chosen and the rejected scores, before they are subtracted (AOT). The value stays with the example whose
    policy margin, or chosen score, it is."""

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
        contrasted = _sorted_difference(self, record) if self.sort else self._contrasted(record)
        return _value(self.beta, record) * (contrasted - _value(self.shift, record))

    def score_chosen(self, record: LogProbs) -> Tensor:
        """Return s(chosen), shape (batch,)."""
        return self.score.of(record, "chosen")

    def score_rejected(self, record: LogProbs) -> Tensor:
        """Return s(rejected), shape (batch,)."""
        return self.score.of(record, "rejected")

    def scale(self, record: LogProbs) -> float | Tensor:
        """Return beta, of the record where it comes from there."""
        return _value(self.beta, record)

    @property
    def unit(self) -> Unit:
        """What the term is counted in: a comparison, a completion, or a token."""
        if isinstance(self.weight, FromRecord) and self.weight.unit:
            return self.weight.unit
        return "comparison" if all(self.contrast) or not any(self.contrast) else "completion"

    @property
    def reads(self) -> frozenset[str]:
        """The fields of `LogProbs` the term needs."""
        scored = self.reads_of(*(side for side, a in zip(SIDES, self.contrast) if a))
        return scored.union(*(each.reads for each in self.from_record), *(each.reads for each in self.running))

    def reads_of(self, *sides: Side) -> frozenset[str]:
        """Return the fields that the scores of these sides ("chosen", "rejected") need."""
        return frozenset().union(*(self.score.reads(side) for side in sides))

    @property
    def from_record(self) -> tuple[FromRecord, ...]:
        """The coordinates that come from the record."""
        return tuple(c for c in (self.beta, self.shift, self.q, self.weight) if isinstance(c, FromRecord))

    @property
    def running(self) -> tuple[Running, ...]:
        """Numbers it carries from step to step, each once."""
        return tuple(dict.fromkeys(number for each in self.from_record for number in each.running))

    @property
    def batch(self) -> tuple[str, ...]:
        """Names of what an example's value depends on beyond itself; empty for a term that decomposes."""
        coupled = tuple(each.name.lstrip("-") for each in self.from_record if each.batch)
        return (f"sorted {self.sort}", *coupled) if self.sort else coupled

    @property
    def minimum_batch(self) -> int:
        """Examples a batch must hold for the term to mean something."""
        return max([2 if self.sort else 1, *(each.minimum for each in self.from_record)])

    def scaled(self, factor: float) -> Term:
        """Return the same term with its coefficient multiplied."""
        return replace(self, coefficient=factor * self.coefficient)

    def coordinates(self) -> dict[str, object]:
        """Return every coordinate as plain data; functions and record coordinates by name."""
        return {
            "f": function_name(self.f),
            "aggregate": self.score.aggregate_name,
            "reference": self.score.reference,
            "link": function_name(self.score.link),
            "contrast": self.contrast,
            "shift": _named(self.shift),
            "beta": _named(self.beta),
            "q": _named(self.q),
            "coefficient": self.coefficient,
            "weight": _named(self.weight),
            "unit": self.unit,
            **({"sort": self.sort} if self.sort else {}),
        }

    def _contrasted(self, record: LogProbs) -> Tensor:
        of_chosen, of_rejected = self.contrast
        if of_chosen and of_rejected:
            return of_chosen * self.score_chosen(record) + of_rejected * self.score_rejected(record)
        if of_chosen:
            return of_chosen * self.score_chosen(record)
        if of_rejected:
            return of_rejected * self.score_rejected(record)
        return torch.zeros(())

    def _labelled(self, x: Tensor, q: float | Tensor) -> Tensor:
        # A hard label leaves f(-x) out: where f overflows at -x, 0 * inf would be NaN.
        if not isinstance(q, Tensor) and q == 1.0:
            return self.f(x)
        return q * self.f(x) + (1 - q) * self.f(-x)


SIDES: tuple[Side, Side] = ("chosen", "rejected")


def function_name(function: Callable[..., object]) -> str:
    """Return the name of a function, or of the class of a callable object."""
    return getattr(function, "__name__", type(function).__name__)


def _sorted_difference(term: Term, record: LogProbs) -> Tensor:
    """Subtract order statistics; value i goes back to the example that brought the i-th smallest minuend."""
    if term.sort == "scores":
        minuend, subtrahend = term.score_chosen(record), term.score_rejected(record)
    else:
        policy, reference = replace(term.score, reference=False), _reference_of(record)
        minuend = policy.of(record, "chosen") - policy.of(record, "rejected")
        subtrahend = policy.of(reference, "chosen") - policy.of(reference, "rejected")
    ordered, order = minuend.sort()
    return torch.zeros_like(ordered).scatter(0, order, ordered - subtrahend.sort().values)


def _reference_of(record: LogProbs) -> LogProbs:
    """Return the record with the reference in the policy's place."""
    return replace(
        record,
        chosen_logps=record.ref_chosen_logps,
        rejected_logps=record.ref_rejected_logps,
        chosen_token_logps=record.ref_chosen_token_logps,
        rejected_token_logps=record.ref_rejected_token_logps,
    )


def _value(coordinate: Coordinate, record: LogProbs) -> float | Tensor:
    return coordinate.value(record) if isinstance(coordinate, FromRecord) else coordinate


def _named(coordinate: Coordinate) -> float | str:
    return coordinate.name if isinstance(coordinate, FromRecord) else coordinate
