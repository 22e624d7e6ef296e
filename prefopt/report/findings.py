"""What a report says first: the standings, the comparisons, the answer and its cautions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.report.answer import answer_of
from prefopt.report.cautions import cautions_of, left_out
from prefopt.report.measured import Halves, Metric, halves, primary_metric
from prefopt.report.seeds import on_equal_seeds
from prefopt.report.settings import Setting
from prefopt.report.standings import Standing, Versus, standings_of, versus_of


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
    compared, warnings = on_equal_seeds(settings)
    warnings += left_out(compared)
    if metric is None:
        said = "no run has finished" if not finished else "no common measure: nothing paired is held out in all runs"
        return _no_answer(None, said, warnings)
    blind = {run.label for run in finished if not metric.by_prompt(run)}
    warnings += [f"{label} is left out: it has no finite {metric.title} for every prompt" for label in sorted(blind)]
    complete = [each for each in compared if each.complete and not any(run.label in blind for run in each.finished)]
    if not complete:
        return _no_answer(metric, "no setting has finished with all its seeds", warnings)
    prompts = halves(_common(metric, complete))
    standings = standings_of(metric, complete, prompts)
    versus = versus_of(metric, standings, prompts)
    warnings += cautions_of(standings, settings)
    sentences = tuple(answer_of(metric, standings, versus, prompts))
    return Findings(metric, prompts, standings, versus, sentences, tuple(warnings))


def _no_answer(metric: Metric | None, said: str, warnings: Sequence[str]) -> Findings:
    return Findings(metric, Halves((), ()), (), (), (f"There is no answer yet: {said}.",), tuple(warnings))


def _common(metric: Metric, settings: Sequence[Setting]) -> list[str]:
    read = [set(metric.by_prompt(run)) for setting in settings for run in setting.finished]
    return list(set.intersection(*read))
