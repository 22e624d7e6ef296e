"""What a sample says of an error: its size, how large it gets, and how sure that is.

Comparisons of one prompt share answers and difficulty, so what is drawn anew in the bootstrap is prompts, with
everything that belongs to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

REPLICATES = 1000
LEVEL = 0.95
SEED = 0
_ELEMENTS = 4_000_000
"""Numbers held at a time while quantiles are drawn again: 32 MB."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class ErrorStatistics:
    """A signed error; intervals are 95 %, by bootstrap over prompts, and None where there is one prompt only."""

    count: int
    mean: float
    mean_abs: float
    rms: float
    p95_abs: float
    """Size that 95 % of the errors do not exceed."""
    max_abs: float
    """Largest of the sample; another sample has another, and a larger one a larger one: it has no interval."""
    mean_interval: Interval | None
    mean_abs_interval: Interval | None
    rms_interval: Interval | None
    p95_abs_interval: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Share:
    """A share of cases, with its 95 % interval; None where there is one prompt only."""

    share: float
    interval: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """Return the share as plain data."""
        return asdict(self)


def error_statistics(errors: np.ndarray, prompts: np.ndarray) -> ErrorStatistics | None:
    """Describe errors.

    Args:
        errors: (n,) signed.
        prompts: (n,) number of the prompt that each belongs to.

    Returns:
        The statistics; None of no error at all.
    """
    if not len(errors):
        return None
    errors = np.asarray(errors, dtype=np.float64)
    members, weights = _drawn_again(prompts)
    size = np.abs(errors)
    mean = _means(errors, members, weights)
    mean_abs = _means(size, members, weights)
    squares = _means(errors**2, members, weights)
    return ErrorStatistics(
        count=len(errors),
        mean=float(errors.mean()),
        mean_abs=float(size.mean()),
        rms=float(np.sqrt((errors**2).mean())),
        p95_abs=float(np.quantile(size, LEVEL, method="inverted_cdf")),
        max_abs=float(size.max()),
        mean_interval=_interval(mean),
        mean_abs_interval=_interval(mean_abs),
        rms_interval=_interval(None if squares is None else np.sqrt(np.maximum(squares, 0))),
        p95_abs_interval=_interval(_quantiles(size, members, weights)),
    )


def share_of(cases: np.ndarray, prompts: np.ndarray) -> Share | None:
    """Describe a share.

    Args:
        cases: (n,) bool.
        prompts: (n,) number of the prompt that each belongs to.

    Returns:
        The share; None of no case at all. Where none or all of the cases are it, every sample drawn again says the
        same, and the open end is what n prompts exclude: 1 - 0.025^(1/n).
    """
    if not len(cases):
        return None
    share = float(np.mean(cases))
    members, weights = _drawn_again(prompts)
    if weights is None:
        return Share(share, None)
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / weights.shape[1])
    if share in (0.0, 1.0):
        return Share(share, (0.0, unseen) if share == 0.0 else (1 - unseen, 1.0))
    return Share(share, _interval(_means(np.asarray(cases, dtype=np.float64), members, weights)))


def _drawn_again(prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Number of each case's prompt from 0, and (replicates, prompts) how often each is drawn; None of one prompt."""
    _, members = np.unique(prompts, return_inverse=True)
    count = int(members.max()) + 1
    if count < 2:
        return members, None
    generator = np.random.default_rng(SEED)
    return members, generator.multinomial(count, np.full(count, 1 / count), size=REPLICATES).astype(np.float64)


def _means(values: np.ndarray, members: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
    """(replicates,) the mean of every sample drawn again."""
    if weights is None:
        return None
    return (weights @ np.bincount(members, values)) / (weights @ np.bincount(members))


def _quantiles(size: np.ndarray, members: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
    """(replicates,) the 95 % quantile of every sample drawn again."""
    if weights is None:
        return None
    order = np.argsort(size, kind="stable")
    sizes, members = size[order], members[order]
    at_once = max(1, _ELEMENTS // len(sizes))
    places = []
    for begin in range(0, len(weights), at_once):
        reached = np.cumsum(weights[begin : begin + at_once, members], axis=1)
        places.append((reached < LEVEL * reached[:, -1:] - 1e-9).sum(axis=1))
    return sizes[np.concatenate(places)]


def _interval(replicates: np.ndarray | None) -> Interval | None:
    if replicates is None:
        return None
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def plain(named: Mapping[str, ErrorStatistics | Share | None]) -> dict[str, Any]:
    """Return several of them as plain data; what is not there is left out."""
    return {name: value.as_dict() for name, value in named.items() if value is not None}
