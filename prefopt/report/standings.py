"""Each contestant at its best setting: chosen on one half of the prompts, held against others on the other half."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefopt.report.measured import Halves, Metric, table_of
from prefopt.report.settings import Setting
from prefopt.report.statistics import (
    LEVEL,
    Comparison,
    Spread,
    compare,
    compare_apart,
    holm,
    mean_interval,
    spread_between_seeds,
)


@dataclass(frozen=True)
class Standing:
    """One contestant at its best setting."""

    setting: Setting
    chosen_by: float
    """Mean on the half by which the setting was chosen."""
    mean: float
    low: float
    high: float
    """Mean and 95 % interval on the other half."""
    tried: int
    """Settings among which it was chosen."""


@dataclass(frozen=True)
class Versus:
    """The best contestant against another."""

    one: Standing
    other: Standing
    comparison: Comparison
    corrected: float
    """p, corrected for the number of comparisons (Holm)."""
    comparisons: int
    """How many there were."""

    @property
    def different(self) -> bool:
        """Whether a difference was shown at the 5 % level, all comparisons together."""
        return self.corrected < LEVEL

    @property
    def detectable(self) -> float:
        """The true difference that would have been found with a chance of 80 %, at the level of a first comparison."""
        return self.comparison.detectable(LEVEL / self.comparisons)


def standings_of(metric: Metric, settings: Sequence[Setting], prompts: Halves) -> tuple[Standing, ...]:
    """Return each contestant at the setting that is best on one half of the prompts, measured on the other."""
    best: dict[str, tuple[float, Setting]] = {}
    tried: dict[str, int] = {}
    for setting in settings:
        values, weights = table_of(metric, setting.finished, prompts.choosing)
        mean = float(np.average(values.mean(0), weights=weights))
        tried[setting.contestant] = tried.get(setting.contestant, 0) + 1
        if setting.contestant not in best or mean > best[setting.contestant][0]:
            best[setting.contestant] = (mean, setting)
    standings = []
    for chosen_by, setting in best.values():
        values, weights = table_of(metric, setting.finished, prompts.reporting)
        standings.append(Standing(setting, chosen_by, *mean_interval(values, weights), tried[setting.contestant]))
    return tuple(sorted(standings, key=lambda one: -one.chosen_by))


def versus_of(metric: Metric, standings: Sequence[Standing], prompts: Halves) -> tuple[Versus, ...]:
    """Return the first against each other contestant."""
    if len(standings) < 2:
        return ()
    best, *others = standings
    spread = _spread(metric, standings, prompts.reporting)
    made = [compare_standings(metric, best, other, prompts.reporting, spread) for other in others]
    corrected = holm([each.p for each in made])
    return tuple(Versus(best, other, each, p, len(others)) for other, each, p in zip(others, made, corrected))


def _spread(metric: Metric, standings: Sequence[Standing], prompts: Sequence[str]) -> Spread | None:
    """Return how much losses vary from seed to seed, where all were trained with the same seeds."""
    seeds = {tuple(run.seed for run in standing.setting.finished) for standing in standings}
    if len(seeds) != 1:
        return None
    means = []
    for standing in standings:
        values, weights = table_of(metric, standing.setting.finished, prompts)
        means.append(np.average(values, axis=1, weights=weights))
    return spread_between_seeds(np.array(means))


def every_pair(metric: Metric, standings: Sequence[Standing], prompts: Halves) -> list[Versus]:
    """Return every contestant against every other, corrected for the number of all pairs."""
    pairs = list(itertools.combinations(standings, 2))
    spread = _spread(metric, standings, prompts.reporting)
    made = [compare_standings(metric, one, other, prompts.reporting, spread) for one, other in pairs]
    corrected = holm([each.p for each in made])
    return [Versus(one, other, each, p, len(pairs)) for (one, other), each, p in zip(pairs, made, corrected)]


def compare_standings(
    metric: Metric, one: Standing, other: Standing, prompts: Sequence[str], spread: Spread | None
) -> Comparison:
    """Compare two contestants: by seed where they have several in common, else as two samples of seeds.

    With one seed on a side nothing is known of seeds: the comparison is then of these trained models.
    """
    seeds = [{run.seed for run in each.setting.finished} for each in (one, other)]
    shared = seeds[0] & seeds[1]
    paired = seeds[0] == seeds[1] or len(shared) > 1
    tables = []
    for standing in (one, other):
        runs = [run for run in standing.setting.finished if run.seed in shared or not paired]
        values, weights = table_of(metric, runs, prompts)
        tables.append(values)
    if paired:
        return compare(tables[0], tables[1], weights, spread=spread)
    if min(map(len, tables)) > 1:
        return compare_apart(tables[0], tables[1], weights)
    means = [table.mean(0, keepdims=True) for table in tables]
    return replace(compare(means[0], means[1], weights), paired=False)
