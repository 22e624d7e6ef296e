"""The answer in sentences: which loss, at which setting, how sure, and what was not shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from prefopt.report.measured import Halves, Metric
from prefopt.report.standings import Standing, Versus


def answer_of(
    metric: Metric, standings: Sequence[Standing], versus: Sequence[Versus], prompts: Halves
) -> Iterator[str]:
    """Yield the answer, the most important first."""
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
        yield "With one seed on a side this is about these trained models, not about the losses."
    if apart := [one for one in versus if not one.comparison.paired and one.comparison.seeds > 1]:
        yield f"{_names(apart)} had other seeds: compared as two samples, which shows less than the same seeds would."


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
        f"({one.comparison.low:+.3f} to {one.comparison.high:+.3f}, {_p(one.corrected)})"
        for one in versus
    )


def _p(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
