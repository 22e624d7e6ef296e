"""Numbers that a loss carries from one optimizer step to the next: how they move, and how they are read.

They live in fp64 on the CPU, wherever the model is; `carried` brings one to where the log-probs are. An update is
pure and sees a whole optimizer step at once, so neither micro-batches nor processes nor evaluation can move them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt_losses.inputs import LogProbs
from prefopt_losses.score import widened

Statistic = Callable[[LogProbs], Tensor]
"""Record of a whole step -> the numbers that an update takes its mean of, or one number."""


def carried(record: LogProbs, name: str) -> Tensor:
    """Return a carried number, shape (), with device and dtype of the (widened) policy log-probs; no gradient."""
    assert record.state is not None  # Loss puts it there
    assert record.chosen_logps is not None  # in `reads`, so Loss has looked
    return record.state[name].to(widened(record.chosen_logps)).detach()


@dataclass(frozen=True)
class MovingAverage:
    """new = decay * old + (1 - decay) * statistic of the step; without correction for its start."""

    statistic: Statistic
    decay: float

    def __call__(self, so_far: Tensor, record: LogProbs) -> Tensor:
        """Return the average after the step, shape ()."""
        return self.decay * _at_home(so_far) + (1 - self.decay) * _at_home(self.statistic(record))


@dataclass(frozen=True)
class CumulativeMean:
    """Mean of every value ever seen; the number of them is carried as `count`."""

    values: Statistic
    count: str

    def __call__(self, so_far: Tensor, record: LogProbs) -> Tensor:
        """Return the mean after the step, shape ()."""
        assert record.state is not None  # Loss.advance puts the numbers before the step there
        values = _at_home(self.values(record))
        total = _at_home(record.state[self.count]) + values.numel()
        return _at_home(so_far) + (values - _at_home(so_far)).sum() / total


@dataclass(frozen=True)
class Count:
    """Number of values ever seen."""

    values: Statistic

    def __call__(self, so_far: Tensor, record: LogProbs) -> Tensor:
        """Return the number after the step, shape ()."""
        return _at_home(so_far) + self.values(record).numel()


def _at_home(number: Tensor) -> Tensor:
    return number.detach().to("cpu").to(torch.float64)
