"""The answer: which loss, at which setting, how sure; chosen on one half of the prompts, reported on the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.report.measured import Halves, Metric, halves, primary_metric, table_of
from prefopt.report.settings import Setting, shown
from prefopt.report.statistics import (
    LEVEL,
    Comparison,
    Spread,
    compare,
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


@dataclass(frozen=True)
class Findings:
    """What a report says first."""

    metric: Metric | None
    halves: Halves
    standings: tuple[Standing, ...]
    """Best first, by the half by which they were chosen."""
    versus: tuple[Versus, ...]
    """The best against each other contestant."""
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]


def findings_of(settings: Sequence[Setting]) -> Findings:
    """Return the answer that the settings' runs give."""
    finished = [run for setting in settings for run in setting.finished]
    metric = primary_metric(finished)
    warnings = list(_left_out(settings))
    if metric is None:
        said = "no run has finished" if not finished else "no common measure: nothing paired is held out in all runs"
        return Findings(None, Halves((), ()), (), (), (f"There is no answer yet: {said}.",), tuple(warnings))
    blind = {run.label for run in finished if not metric.by_prompt(run)}
    warnings += [f"{label} is left out: it has no finite {metric.title} for every prompt" for label in sorted(blind)]
    complete = [each for each in settings if each.complete and not any(run.label in blind for run in each.finished)]
    if not complete:
        said = "no setting has finished with all its seeds"
        return Findings(metric, Halves((), ()), (), (), (f"There is no answer yet: {said}.",), tuple(warnings))
    prompts = halves(_common(metric, complete))
    standings = _standings(metric, complete, prompts)
    versus = _versus(metric, standings, prompts)
    warnings += _warnings(standings, settings)
    return Findings(metric, prompts, standings, versus, tuple(_answer(metric, standings, versus, prompts)),
                    tuple(warnings))  # fmt: skip


def _common(metric: Metric, settings: Sequence[Setting]) -> list[str]:
    read = [set(metric.by_prompt(run)) for setting in settings for run in setting.finished]
    return list(set.intersection(*read))


def _standings(metric: Metric, settings: Sequence[Setting], prompts: Halves) -> tuple[Standing, ...]:
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


def _versus(metric: Metric, standings: Sequence[Standing], prompts: Halves) -> tuple[Versus, ...]:
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


def compare_standings(
    metric: Metric, one: Standing, other: Standing, prompts: Sequence[str], spread: Spread | None
) -> Comparison:
    """Compare two contestants on the seeds and prompts that both have."""
    seeds = [run.seed for run in one.setting.finished]
    shared = [seed for seed in seeds if seed in {run.seed for run in other.setting.finished}]
    tables = []
    for standing in (one, other):
        runs = [run for run in standing.setting.finished if run.seed in shared] if shared else standing.setting.finished
        values, weights = table_of(metric, runs, prompts)
        tables.append(values if shared else values.mean(0, keepdims=True))
    return compare(tables[0], tables[1], weights, spread=spread)


def every_pair(findings: Findings) -> list[Versus]:
    """Return every contestant against every other, corrected for the number of all pairs."""
    if findings.metric is None:
        return []
    pairs = list(itertools.combinations(findings.standings, 2))
    spread = _spread(findings.metric, findings.standings, findings.halves.reporting)
    made = [compare_standings(findings.metric, one, other, findings.halves.reporting, spread) for one, other in pairs]
    corrected = holm([each.p for each in made])
    return [Versus(one, other, each, p, len(pairs)) for (one, other), each, p in zip(pairs, made, corrected)]


def _answer(metric: Metric, standings: Sequence[Standing], versus: Sequence[Versus], prompts: Halves) -> Iterator[str]:
    best = standings[0]
    better = [one for one in versus if one.different and one.comparison.difference > 0]
    worse = [one for one in versus if one.different and one.comparison.difference < 0]
    open_ones = [one for one in versus if not one.different]
    if versus and not better and not worse:
        first = best.setting.contestant
        yield f"No difference shown: {first} comes first, and is not shown to be better than any other."
    yield _standing_words(metric, best, prompts)
    if better:
        yield f"Better than {_list(better)}."
    if worse:
        yield (
            f"Worse than {_list(worse)} on the prompts that did not choose: the choice does not carry over, so take "
            "that one."
        )
    if open_ones:
        yield from _open_words(metric, open_ones)
    if any(one.comparison.seeds == 1 for one in versus):
        yield "With at most one seed in common this says that these trained models differ, not that the losses do."


def _standing_words(metric: Metric, standing: Standing, prompts: Halves) -> str:
    seeds, count = len(standing.setting.finished), len(prompts.reporting)
    return (
        f"{standing.setting.name}: {metric.title} {standing.mean:.3f} (95 % interval {standing.low:.3f} to "
        f"{standing.high:.3f}), over {seeds} seed{'s' if seeds > 1 else ''} and {count:,} held-out prompts"
        + (", none of which chose it." if prompts.split else "; too few to choose on others than these.")
    )


def _open_words(metric: Metric, versus: Sequence[Versus]) -> Iterator[str]:
    """Say that no difference was shown, and how large one would have had to be."""
    equal = [one for one in versus if one.comparison.standard_error == 0.0 == one.comparison.difference]
    if equal:
        yield f"Exactly the same results on every prompt as {_names(equal)}."
    unequal = [one for one in versus if one not in equal]
    if not unequal:
        return
    least = max(one.detectable for one in unequal)
    each = "each of these comparisons" if len(unequal) > 1 else "this comparison"
    found = (
        f"A difference of {least:.3f} or more would have been found in {each} with a chance of 80 %; a smaller one may "
        "exist."
    )
    if least > metric.span or math.isinf(least):
        found = "So few seeds and prompts could not have shown any: more of them are needed."
    yield f"No difference shown from {_names(unequal)}. {found}"


def _names(versus: Sequence[Versus]) -> str:
    return ", ".join(one.other.setting.contestant for one in versus)


def _list(versus: Sequence[Versus]) -> str:
    return "; ".join(
        f"{one.other.setting.contestant} by {one.comparison.difference:+.3f} "
        f"({one.comparison.low:+.3f} to {one.comparison.high:+.3f}, p = {_p(one.corrected)})"
        for one in versus
    )


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _left_out(settings: Sequence[Setting]) -> Iterator[str]:
    """Say which settings are not in the running, and why."""
    for setting in settings:
        for run in setting.repeated:
            yield f"{run.label} repeats a setting with the same seed and is left out"
        if not setting.complete:
            lost = [run for run in setting.runs if not run.finished]
            why = f": {lost[0].state}{', ' + lost[0].reason if lost[0].reason else ''}" if lost else ""
            yield f"{setting.name} is left out: {len(setting.finished)} of {setting.wanted} seeds finished{why}"


EDGE_KEYS = ("loss.beta", "train.learning_rate")


def _warnings(standings: Sequence[Standing], settings: Sequence[Setting]) -> Iterator[str]:
    """Say what a person should know before acting on the answer."""
    best = standings[0].setting
    for key in EDGE_KEYS:
        values = sorted(
            {float(each.varied[key]) for each in settings if each.contestant == best.contestant and key in each.varied}
        )
        if len(values) > 1 and float(best.varied[key]) in (values[0], values[-1]):
            end = "smallest" if float(best.varied[key]) == values[0] else "largest"
            yield (
                f"the best {key.rpartition('.')[2]} of {best.contestant}, {shown(best.varied[key])}, is the {end} that "
                "was tried: the optimum may lie beyond"
            )
    for standing in standings:
        yield from _of_policy(standing)
    yield from _clipped(standings)


FAR_KL, FALLEN = 50.0, -0.1
CLIPPED = 0.5


def _of_policy(standing: Standing) -> Iterator[str]:
    """Name likelihood displacement, a policy that left its reference far behind, and clipped gradients."""
    measures = [run.measures for run in standing.setting.finished]
    name = standing.setting.contestant

    def mean(key: str) -> float | None:
        values = [one[key] for one in measures if one.get(key) is not None]
        return float(np.mean(values)) if values else None

    chosen, displaced, kl = mean("chosen_drift_per_token"), mean("displacement"), mean("kl")
    if chosen is not None and chosen < FALLEN and (displaced or 0.0) > 0.5:
        yield (
            f"likelihood displacement in {name}: chosen completions became less likely too ({chosen:+.2f} nats per "
            f"token; in {displaced:.0%} of the comparisons both fell while the margin grew)"
        )
    if kl is not None and kl > FAR_KL:
        yield (
            f"{name} is {kl:.0f} nats per completion from the reference: read its samples before trusting its accuracy"
        )


def _clipped(standings: Sequence[Standing]) -> Iterator[str]:
    """Say of which contestants most steps were clipped."""
    shares = {}
    for standing in standings:
        known = [run.clipped for run in standing.setting.finished if run.clipped is not None]
        if known and float(np.mean(known)) > CLIPPED:
            shares[standing.setting.contestant] = float(np.mean(known))
    if shares:
        said = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        yield f"most steps were clipped ({said}): there the learning rate says little about the size of a step"
