"""The group reduction above the algebra: one value per prompt from the scores of all its completions.

    loss = coefficient * reduce(x, targets),  x_k = beta * s(y_k)

A pair is a list of two; a reduction that takes only a difference of two x then is a `Term`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from prefopt_losses.inputs import ListLogProbs, LogProbs
from prefopt_losses.score import Score, Side
from prefopt_losses.terms import PAIR, Contrast, Running, Unit, function_name

Reduction = Callable[[Tensor, ListLogProbs], Tensor]
"""(x (completions,), record) -> (lists,)."""


@dataclass(frozen=True)
class ListTerm:
    """coefficient * reduce(beta * s), over the completions of each list."""

    reduce: Reduction
    score: Score
    beta: float = 1.0
    coefficient: float = 1.0
    scored: bool = True
    """Whether the reduction reads the completions' scores (or ranks)."""
    contrast: Contrast = PAIR
    """How rewards of two of its completions are compared in metrics."""

    def __call__(self, record: ListLogProbs) -> Tensor:
        """Return the term's value, shape (lists,)."""
        x = self.beta * self.score(record.logps, record.ref_logps, record.lengths)
        return self.coefficient * self.reduce(x, record)

    @property
    def reads(self) -> frozenset[str]:
        """The fields of `ListLogProbs` the term needs."""
        fields = {"logps"} | ({"scores"} if self.scored else set())
        fields |= {"ref_logps"} if self.score.reference else set()
        return frozenset(fields | ({"lengths"} if self.score.aggregate == "mean" else set()))

    def scaled(self, factor: float) -> ListTerm:
        """Return the same term with its coefficient multiplied."""
        return replace(self, coefficient=factor * self.coefficient)

    # What metrics of two of its completions read, as of a `Term`.

    def score_chosen(self, record: LogProbs) -> Tensor:
        """Return s(chosen) of a comparison, shape (batch,)."""
        return self.score.of(record, "chosen")

    def score_rejected(self, record: LogProbs) -> Tensor:
        """Return s(rejected) of a comparison, shape (batch,)."""
        return self.score.of(record, "rejected")

    def scale(self, record: LogProbs) -> float:
        """Return beta."""
        return self.beta

    def reads_of(self, *sides: Side) -> frozenset[str]:
        """Return the fields of `LogProbs` that the scores of these sides need."""
        return frozenset().union(*(self.score.reads(side) for side in sides))

    @property
    def unit(self) -> Unit:
        """What the term is counted in."""
        return "comparison"

    @property
    def running(self) -> tuple[Running, ...]:
        """Numbers carried from step to step: none."""
        return ()

    @property
    def batch(self) -> tuple[str, ...]:
        """What couples lists of a batch: nothing."""
        return ()

    @property
    def minimum_batch(self) -> int:
        """Lists a batch must hold."""
        return 1

    def coordinates(self) -> dict[str, object]:
        """Return every coordinate as plain data; functions by name."""
        return {
            "reduce": function_name(self.reduce),
            "aggregate": self.score.aggregate_name,
            "reference": self.score.reference,
            "link": function_name(self.score.link),
            "beta": self.beta,
            "coefficient": self.coefficient,
            "unit": self.unit,
        }
