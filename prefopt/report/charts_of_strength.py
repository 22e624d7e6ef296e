"""What the strength of regularisation does: every measure against kappa * beta and against beta."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from prefopt.report.findings import Findings
from prefopt.report.measured import Metric
from prefopt.report.panels import Chart, Panel, Series
from prefopt.report.records import RunRecord
from prefopt.report.settings import Setting

Read: TypeAlias = Callable[[RunRecord], float | None]

SCALES: Mapping[str, tuple[str, Read]] = {
    "kappa * beta": (
        "regularisation strength kappa * beta, per nat of a completion (log)", lambda run: run.strength.kappa_beta,
    ),
    "beta": ("beta, in each loss's own unit (log)", lambda run: run.strength.beta),
}  # fmt: skip
MEASURED: Mapping[str, tuple[str, str]] = {
    "KL": ("kl", "KL from the reference, nats per completion"),
    "chosen drift": ("chosen_drift_per_token", "drift of chosen, nats per token"),
    "rejected drift": ("rejected_drift_per_token", "drift of rejected, nats per token"),
    "displacement": ("displacement", "share of comparisons of which both fell"),
    "length": ("length", "tokens of a completion"),
}


def against_strength(findings: Findings, settings: Sequence[Setting]) -> Chart | None:
    """Return the chart; None where no loss was tried at two strengths."""
    if (metric := findings.metric) is None:
        return None
    measures: dict[str, tuple[str, Read]] = {metric.title: (metric.title, lambda run: _mean(metric, run))}
    measures |= {name: (title, _reader(key)) for name, (key, title) in MEASURED.items()}
    panels = []
    for scale, (x, at) in SCALES.items():
        best = _best_rates(metric, settings, at)
        if not any(len(own) > 1 for own in best.values()):
            continue
        for name, (y, read) in measures.items():
            if series := tuple(_series(best, read)):
                panels.append(Panel(name, x, y, series, log_x=True, scale=scale))
    says = (
        f"Mean over seeds for each beta, at the learning rate with the best {metric.title}; all held-out prompts; "
        "faint points are single runs. On the axis of kappa * beta losses stand where they hold the policy equally "
        "strongly (DPO's beta is twice that number); a loss without a local strength is placed at preferences of "
        "strength 0.75, one without either is absent."
    )
    title = "Against the strength of regularisation"
    return Chart("beta", "Against beta", title, says, tuple(panels)) if panels else None


def _reader(key: str) -> Read:
    return lambda run: run.measures.get(key)


def _best_rates(metric: Metric, settings: Sequence[Setting], at: Read) -> dict[str, dict[float, Setting]]:
    """Return for each loss and strength the setting with the best measure."""
    best: dict[str, dict[float, Setting]] = {}
    for setting in settings:
        place = at(setting.finished[0])
        if place is None or place <= 0 or not all(metric.by_prompt(run) for run in setting.finished):
            continue
        own, rounded = best.setdefault(setting.loss, {}), float(f"{place:.4g}")
        if rounded not in own or _over_seeds(setting, metric) > _over_seeds(own[rounded], metric):
            own[rounded] = setting
    return {loss: dict(sorted(own.items())) for loss, own in best.items()}


def _over_seeds(setting: Setting, metric: Metric) -> float:
    return float(np.mean([_mean(metric, run) for run in setting.finished]))


def _mean(metric: Metric, run: RunRecord) -> float:
    read = metric.by_prompt(run).values()
    return float(np.average([value for value, _ in read], weights=[weight for _, weight in read]))


def _series(best: Mapping[str, Mapping[float, Setting]], read: Read) -> Iterator[Series]:
    for loss, own in best.items():
        points = [
            (at, run, value)
            for at, setting in own.items() for run in setting.finished if (value := read(run)) is not None
        ]  # fmt: skip
        order = list(dict.fromkeys(at for at, _, _ in points))
        means = [float(np.mean([value for at, _, value in points if at == place])) for place in order]
        if order:
            yield Series(loss, loss, order, means, text=[own[at].name for at in order])
        if len(points) > len(order):
            yield Series(
                loss, loss, [at for at, _, _ in points], [value for _, _, value in points], "points",
                text=[run.label for _, run, _ in points], faint=True, listed=False,
            )  # fmt: skip
