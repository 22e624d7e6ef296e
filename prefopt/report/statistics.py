"""Paired comparisons of runs on the same held-out prompts and the same seeds.

The unit is a table of values, one row per seed and one column per prompt. Two sources of chance stand behind a
difference of two losses: the seeds with which they were trained, and the prompts on which they are measured. Both are
crossed (every seed meets every prompt), so the variance of the mean difference has two parts,

    V_seeds = MS_seeds / (seeds * prompts)        V_prompts = (MS_prompts - MS_rest) / (seeds * prompts)

(crossed random effects: Clark 1973; Baayen, Davidson and Bates 2008). The first is known from few seeds, the second
from many prompts; the critical value is that of Student's t for each, weighted by its part (Cochran and Cox 1950).
Where three losses or more were trained with the same seeds, V_seeds comes from all of them: how much runs of one loss
differ from seed to seed, beyond what a seed does to all losses alike.

What was tried before it, on simulated results of one loss under two names at the 5 % level: Satterthwaite's degrees of
freedom and V_seeds = (MS_seeds - MS_rest) / (seeds * prompts) called up to 15 % different with 2 seeds and 9 % with 3;
this rule at most 6.3 % and 5.8 %. A bootstrap over three seeds would be too narrow, and a permutation of three seeds
can never reach p < 0.25. With one seed the signs of the prompts are permuted. Where two losses were trained with other
seeds, V_seeds is that of two samples (Welch 1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special, stats

DRAWS = 4_000
"""Random sign flips, and bootstrap samples."""
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """The mean difference of two sets of runs, and how sure it is."""

    difference: float
    low: float
    high: float
    """95 % interval."""
    p: float
    """Two-sided, of this comparison alone."""
    standard_error: float
    degrees: float
    seeds: int
    prompts: int
    paired: bool = True
    """Whether the seeds were the same on both sides."""

    def power(self, difference: float, level: float = LEVEL) -> float:
        """Return the chance that a true difference of this size is found at a level."""
        return power(difference, self.standard_error, self.degrees, level)

    def detectable(self, level: float = LEVEL, chance: float = 0.8) -> float:
        """Return the true difference that is found with a chance of 80 %."""
        return detectable(self.standard_error, self.degrees, level, chance)


@dataclass(frozen=True)
class Spread:
    """How much the difference of two losses varies from seed to seed."""

    variance: float
    degrees: float


def spread_between_seeds(means: np.ndarray) -> Spread | None:
    """Return the spread that losses trained with the same seeds show together; None where there are too few.

    Args:
        means: of each loss and seed, shape (losses, seeds).
    """
    losses, seeds = means.shape
    if losses < 3 or seeds < 2:
        return None
    rest = means - means.mean(1, keepdims=True) - means.mean(0, keepdims=True) + means.mean()
    degrees = (losses - 1) * (seeds - 1)
    return Spread(2 * float((rest**2).sum()) / degrees, float(degrees))


def compare(
    one: np.ndarray, other: np.ndarray, weights: np.ndarray | None = None, *, spread: Spread | None = None
) -> Comparison:
    """Compare two sets of runs that share seeds and prompts.

    Args:
        one: values, shape (seeds, prompts).
        other: the same of the others.
        weights: of the prompts, shape (prompts,): how many comparisons each has. Equal where absent.
        spread: between seeds, as many losses show it; that of these two where absent.

    Raises:
        ValueError: the shapes differ or are empty.
    """
    if one.shape != other.shape or one.ndim != 2 or not one.size:
        raise ValueError(f"expected two tables of one shape (seeds, prompts), given {one.shape} and {other.shape}")
    table = _around_weighted_mean(one.astype(float) - other.astype(float), weights)
    error, degrees = _standard_error(table, spread)
    p = _sign_flips(table[0]) if len(table) == 1 else None
    return _comparison(float(table.mean()), error, degrees, *table.shape, p=p)


def compare_apart(one: np.ndarray, other: np.ndarray, weights: np.ndarray | None = None) -> Comparison:
    """Compare two sets of runs that share prompts and no seeds: seeds are two samples (Welch 1947), prompts are paired.

    Args:
        one: values, shape (seeds, prompts).
        other: the same of the others; its seeds are others, of which there may be more or fewer.
        weights: of the prompts, shape (prompts,). Equal where absent.

    Raises:
        ValueError: there are other prompts, or fewer than two seeds on a side.
    """
    if one.shape[1:] != other.shape[1:] or min(len(one), len(other)) < 2:
        raise ValueError(f"expected two tables (seeds, prompts) of two seeds or more, given {one.shape}, {other.shape}")
    tables = [_around_weighted_mean(each.astype(float), weights) for each in (one, other)]
    prompts = one.shape[1]
    parts = [float(table.mean(1).var(ddof=1)) / len(table) for table in tables]
    rest = [_rest(table) / len(table) for table in tables] if prompts > 1 else [0.0, 0.0]
    of_prompts = tables[0].mean(0) - tables[1].mean(0)
    by_prompts = max(0.0, float(of_prompts.var(ddof=1)) - sum(rest)) / prompts if prompts > 1 else 0.0
    of_each = sum(part**2 / (len(table) - 1) for part, table in zip(parts, tables))
    welch = sum(parts) ** 2 / of_each if of_each else float(len(one) + len(other) - 2)
    error, degrees = _combined(sum(parts), welch, by_prompts, max(1.0, prompts - 1.0), least=sum(rest) / prompts)
    return _comparison(float(of_prompts.mean()), error, degrees, min(len(one), len(other)), prompts, paired=False)


def _comparison(
    difference: float, error: float, degrees: float, seeds: int, prompts: int, *, p: float | None = None,
    paired: bool = True,
) -> Comparison:  # fmt: skip
    if p is None and error == 0.0:
        p = 1.0 if difference == 0.0 else 2.0 ** (1 - prompts)
    elif p is None:
        p = float(2 * stats.t.sf(abs(difference) / error, degrees))
    reach = float(stats.t.ppf(1 - LEVEL / 2, degrees)) * error if error else 0.0
    return Comparison(
        difference, difference - reach, difference + reach, p, error, degrees, seeds, prompts, paired
    )  # fmt: skip


def _around_weighted_mean(table: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return a table with the weighted mean as its plain mean and the variance that this mean has."""
    if weights is None:
        return table
    shares = weights.astype(float) / weights.mean()
    mean = float((table * shares).mean())
    return mean + shares * (table - mean)


def _standard_error(table: np.ndarray, spread: Spread | None) -> tuple[float, float]:
    """Return the standard error of the mean of a crossed table, and the degrees of freedom of its t."""
    seeds, prompts = table.shape
    of_seeds, of_prompts = table.mean(1), table.mean(0)
    if seeds == 1:
        return (float(of_prompts.std(ddof=1)) / math.sqrt(prompts) if prompts > 1 else 0.0), max(1.0, prompts - 1.0)
    spread = spread or Spread(float(of_seeds.var(ddof=1)), seeds - 1.0)
    rest = _rest(table) if prompts > 1 else 0.0
    by_prompts = max(0.0, float(of_prompts.var(ddof=1)) - rest / seeds) / prompts if prompts > 1 else 0.0
    many = max(1.0, prompts - 1.0)
    return _combined(spread.variance / seeds, spread.degrees, by_prompts, many, least=rest / (seeds * prompts))


def _rest(table: np.ndarray) -> float:
    """Return the mean square of what seeds and prompts together leave of a table."""
    seeds, prompts = table.shape
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    return float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))


def _combined(by_seeds: float, few: float, by_prompts: float, many: float, *, least: float) -> tuple[float, float]:
    """Return the root of two variances, and the degrees of the t whose critical value is weighted by them.

    Outcomes of 0 and 1 tie: two seeds with the same mean say that seeds make no difference. What is `least` is the part
    of the variance that is neither of seeds nor of prompts; as far as it is missing it counts as the seeds'.
    """
    by_seeds = max(by_seeds, least - by_prompts)
    total = by_seeds + by_prompts
    if total == 0.0:
        return 0.0, many
    of_each = (special.stdtrit(degrees, 1 - LEVEL / 2) for degrees in (few, many))
    critical = sum(part * float(edge) for part, edge in zip((by_seeds, by_prompts), of_each)) / total
    return math.sqrt(total), _degrees(critical, min(few, many), max(few, many))


def _degrees(critical: float, low: float, high: float) -> float:
    """Return the degrees of freedom at which Student's t has this critical value."""
    for _ in range(40):
        middle = math.sqrt(low * high)
        above = float(special.stdtrit(middle, 1 - LEVEL / 2)) > critical
        low, high = (middle, high) if above else (low, middle)
    return high


def _sign_flips(values: np.ndarray) -> float:
    """Return the two-sided p of a mean of zero if the sign of each value were a coin's."""
    seen = abs(values.sum()) * (1 - 1e-12)
    moved = values[values != 0]
    if not len(moved):
        return 1.0
    if len(moved) <= 13:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float((np.abs(signs @ moved) >= seen).mean())
    return float((1 + (np.abs(_signs(len(moved)) @ moved) >= seen).sum()) / (1 + DRAWS))


@lru_cache(maxsize=2)
def _signs(count: int) -> np.ndarray:
    """Return random signs, shape (draws, count): the same for every comparison of a report."""
    return 1.0 - 2.0 * np.random.default_rng(0).integers(0, 2, size=(DRAWS, count), dtype=np.int8)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda place: p[place])
    corrected, reached = [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        reached = max(reached, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = reached
    return corrected


def power(difference: float, standard_error: float, degrees: float, level: float = LEVEL) -> float:
    """Return the chance that a two-sided t-test finds a true difference.

    The standard error is itself an estimate, and from few seeds a poor one: the chance is the mean over what the true
    one may be (it times the root of degrees over chi-squared).
    """
    if standard_error == 0.0:
        return 1.0 if difference else level
    edge = float(stats.t.ppf(1 - level / 2, degrees))
    errors = standard_error * np.sqrt(degrees / stats.chi2.ppf((np.arange(64) + 0.5) / 64, degrees))
    shifts = abs(difference) / errors
    chances = stats.nct.sf(edge, degrees, shifts) + stats.nct.cdf(-edge, degrees, shifts)
    return float(np.where(np.isfinite(chances), chances, 1.0).mean())  # scipy gives NaN far above the edge


def detectable(standard_error: float, degrees: float, level: float = LEVEL, chance: float = 0.8) -> float:
    """Return the true difference that a two-sided t-test finds with the given chance."""
    if standard_error == 0.0:  # nothing is known of the noise
        return math.inf
    low, high = 0.0, 1.0
    while power(high * standard_error, standard_error, degrees, level) < chance and high < 1e6:
        high *= 2
    for _ in range(20):
        middle = (low + high) / 2
        reached = power(middle * standard_error, standard_error, degrees, level) >= chance
        low, high = (low, middle) if reached else (middle, high)
    return high * standard_error


def mean_interval(
    table: np.ndarray, weights: np.ndarray | None = None, *, draws: int = DRAWS // 2
) -> tuple[float, float, float]:
    """Return the mean of a table and its 95 % bootstrap interval; seeds and prompts are drawn, both with replacement.

    Args:
        table: values, shape (seeds, prompts).
        weights: of the prompts; equal where absent.
        draws: bootstrap samples.
    """
    values = _around_weighted_mean(table.astype(float), weights)
    seeds, prompts = values.shape
    generator = np.random.default_rng(0)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    by_prompt = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    means = ((by_seed @ values) * by_prompt).sum(1) / (seeds * prompts)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(values.mean()), float(low), float(high)
