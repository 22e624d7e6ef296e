"""The charts of a report, each with what is to be seen in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prefopt.report.charts_of_strength import against_strength
from prefopt.report.findings import Findings
from prefopt.report.measured import ACCURACY, GOLD
from prefopt.report.panels import Chart, Panel, Series
from prefopt.report.settings import Setting
from prefopt.report.writing import drift_of_writing


def charts_of(findings: Findings, settings: Sequence[Setting]) -> list[Chart]:
    """Return every chart for which the runs have data."""
    shown = [setting for setting in settings if setting.finished]
    best = [standing.setting for standing in findings.standings] or shown
    made = [
        _standings(findings),
        _against_kl(shown),
        against_strength(findings, shown),
        _over_steps(best),
        _margins(best),
        _drift(best),
        _writing(best),
        _gradients(best),
    ]
    return [chart for chart in made if chart is not None and any(panel.series for panel in chart.panels)]


def _standings(findings: Findings) -> Chart | None:
    if findings.metric is None or not findings.standings:
        return None
    ordered = sorted(findings.standings, key=lambda one: one.mean)
    series = tuple(
        Series(
            one.setting.contestant, one.setting.contestant, [one.mean], [one.setting.contestant], "interval",
            [one.low], [one.high], [one.setting.name], listed=False,
        )
        for one in ordered
    )  # fmt: skip
    where = "prompts that did not choose the setting" if findings.halves.split else "all held-out prompts"
    says = (
        f"Each at the best of its settings, on {where}; 95 % bootstrap intervals over seeds and prompts. Overlapping "
        "intervals say little: the paired comparisons under the answer are the ones to read."
    )
    title = f"{findings.metric.title[:1].upper()}{findings.metric.title[1:]} of each"
    panel = Panel("all", findings.metric.title, "", series)
    return Chart("standings", "Standings", title, says, (panel,))


def _against_kl(settings: Sequence[Setting]) -> Chart | None:
    panels = []
    for metric in (GOLD, ACCURACY):
        series = [
            Series(
                setting.contestant, setting.contestant, *_columns(run.looks, "kl", metric.look),
                text=[f"{setting.name}, seed {run.seed}, step {look['step']}" for look in run.looks
                      if "kl" in look and metric.look in look],
                listed=_first(setting, settings) and run is setting.finished[0],
            )
            for setting in settings for run in setting.finished
            if any("kl" in look and metric.look in look for look in run.looks)
        ]  # fmt: skip
        if series:
            panels.append(Panel(metric.title, "KL from the reference, nats per completion", metric.title,
                                tuple(series)))  # fmt: skip
    says = (
        "Every look at held-out data of every run, joined in the order of training. Up and to the left is better: more "
        "for less distance from the reference. A curve that turns down while KL grows is over-optimised."
    )
    return Chart("frontier", "Against KL", "Reward and accuracy against KL", says, tuple(panels)) if panels else None


def _first(setting: Setting, settings: Sequence[Setting]) -> bool:
    return next(each for each in settings if each.contestant == setting.contestant) is setting


def _columns(looks: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    both = [look for look in looks if x in look and y in look]
    return [look[x] for look in both], [look[y] for look in both]


CURVES = (
    ("accuracy", "held-out accuracy", "share of comparisons"),
    ("loss", "held-out loss", "in each loss's own unit: shapes compare, heights do not"),
    ("gold_reward/policy", "gold reward", "of the policy's own samples"),
    ("kl", "KL", "nats per completion"),
    ("chosen_drift_per_token", "drift of chosen", "nats per token"),
    ("rejected_drift_per_token", "drift of rejected", "nats per token"),
)


def _over_steps(settings: Sequence[Setting]) -> Chart:
    panels = []
    for key, name, unit in CURVES:
        series = tuple(each for setting in settings for each in _curves(setting, key))
        if series:
            panels.append(Panel(name, "optimizer step", f"{name}\n({unit})", series))
    says = "Each at its best setting: the mean over seeds, and every seed behind it."
    return Chart("curves", "Training", "During training", says, tuple(panels))


def _curves(setting: Setting, key: str) -> Iterator[Series]:
    runs = [run for run in setting.finished if any(key in look for look in run.looks)]
    if not runs:
        return
    curves = [dict(zip(*_columns(run.looks, "step", key))) for run in runs]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(runs) > 1:
        for curve in curves:
            yield Series(setting.contestant, setting.contestant, list(curve), list(curve.values()), faint=True,
                         listed=False)  # fmt: skip
    means = [float(np.mean([curve[step] for curve in curves])) for step in common]
    yield Series(setting.contestant, setting.contestant, common, means, text=[setting.name] * len(common))


def _margins(settings: Sequence[Setting]) -> Chart:
    series = []
    for setting in settings:
        tables = [run.held_out for run in setting.finished if run.held_out is not None]
        values = np.concatenate([table.margins() for table in tables]) if tables else np.zeros(0)
        values = values[np.isfinite(values)]
        if len(values):
            kept = np.quantile(values, np.linspace(0, 1, min(len(values), 500)))
            series.append(Series(setting.contestant, setting.contestant, [setting.contestant] * len(kept),
                                 [float(f"{value:.4g}") for value in kept], "violin", listed=False))  # fmt: skip
    says = (
        "How far the policy has moved apart the two completions of each held-out pair: log-ratio of chosen minus "
        "log-ratio of rejected, nats, not multiplied by beta, so that losses compare. Below zero the pair is ranked "
        "wrongly. A long upper tail is confidence that the data may not support."
    )
    panel = Panel("all", "", "margin, nats per pair of completions", tuple(series))
    return Chart("margins", "Margins", "Margins", says, (panel,))


def _drift(settings: Sequence[Setting]) -> Chart:
    series = []
    for side in ("chosen", "rejected"):
        rows = [(one.contestant, _mean_of(one, f"{side}_drift_per_token")) for one in settings]
        kept = [(name, value) for name, value in rows if value is not None]
        if kept:
            series.append(Series(side, side, [name for name, _ in kept], [value for _, value in kept], "bar"))
    says = (
        "Policy minus reference, nats per token. Where both bars point down, chosen answers became less likely too: "
        "likelihood displacement, probability that went to text which nobody compared."
    )
    return Chart(
        "drift", "Drift", "Where the probability went", says, (Panel("all", "", "nats per token", tuple(series)),)
    )


def _mean_of(setting: Setting, key: str) -> float | None:
    values = [run.measures[key] for run in setting.finished if run.measures.get(key) is not None]
    return float(np.mean(values)) if values else None


WRITING = (
    ("tokens", "length", "tokens of a completion"),
    ("finished", "ends by itself", "share of completions that end with end-of-sequence"),
    ("repetition", "repetition", "share of repeated runs of four words"),
)


def _writing(settings: Sequence[Setting]) -> Chart:
    panels = []
    drifts = {setting.contestant: drift_of_writing(setting.finished) for setting in settings}
    for key, name, unit in WRITING:
        rows = [(who, drift[key]) for who, drift in drifts.items() if key in drift]
        if rows:
            before = Series("reference", "reference", [who for who, _ in rows], [each[0] for _, each in rows], "bar")
            after = Series("policy", "policy", [who for who, _ in rows], [each[1] for _, each in rows], "bar")
            panels.append(Panel(name, "", unit, (before, after)))
    says = "What the policy writes for held-out prompts beside what the reference wrote for the same ones."
    return Chart("writing", "Writing", "Length, ending and repetition", says, tuple(panels))


def _gradients(settings: Sequence[Setting]) -> Chart:
    series = []
    for setting in settings:
        if setting.finished and setting.finished[0].steps:
            steps = [line for line in setting.finished[0].steps if "grad_norm" in line]
            if steps:
                at, norms = [line["step"] for line in steps], [line["grad_norm"] for line in steps]
                words = [setting.name] * len(steps)
                series.append(Series(setting.contestant, setting.contestant, at, norms, text=words))
    says = (
        "Before clipping, first seed. Scales differ between losses (IPO's coefficient is 1 / (4 tau^2)), which is why "
        "the learning rate is an axis; the share of clipped steps stands in the table."
    )
    return Chart(
        "gradients", "Gradients", "Gradient norms", says, (Panel("all", "optimizer step", "norm", tuple(series)),)
    )
