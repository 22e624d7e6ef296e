"""Pure functions of the step: learning rate, and when to look, save and log."""

from __future__ import annotations

import math


def steps_of(share_or_steps: float, total: int) -> int:
    """Return a number of steps: a share of the run if below 1, else the number itself."""
    return math.ceil(share_or_steps * total - 1e-9) if share_or_steps < 1 else int(share_or_steps)


def is_due(step: int, every: float | None, total: int) -> bool:
    """Whether something that happens `every` so often happens after ``step`` steps; never for 0 and None."""
    interval = steps_of(every, total) if every else 0
    return interval > 0 and step % interval == 0


def learning_rate_at(step: int, *, total: int, peak: float, warmup: float, schedule: str) -> float:
    """Learning rate of step ``step`` (from 0).

    It rises linearly over the warmup, reaching the peak at its end (the first step already moves), then falls to
    zero: ``cosine`` half a wave, ``linear`` a line, ``constant`` not at all.
    """
    rising = steps_of(warmup, total)
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, total - rising)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak
