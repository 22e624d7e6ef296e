"""The same charts for papers: one PNG and one SVG for each panel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from prefopt.report.panels import Chart, Panel, Series

INCHES = (5.5, 3.6)
DPI = 200
LONGEST = 40
"""Characters of a name in a legend or at an axis."""


def draw_figures(charts: Sequence[Chart], colors: Mapping[str, str], folder: Path) -> list[Path]:
    """Draw every panel of every chart into a folder; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in charts:
        for panel in chart.panels:
            figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
            _draw(axes, panel, colors)
            stem = chart.key if len(chart.panels) == 1 else "-".join(map(_word, filter(None, panel.choice)))
            stem = stem if stem.startswith(chart.key) else f"{chart.key}-{stem}"
            for suffix in ("png", "svg"):
                file = folder / f"{stem}.{suffix}"
                figure.savefig(file, dpi=DPI, metadata={"Date": None} if suffix == "svg" else None)
                files.append(file)
            pyplot.close(figure)
    return files


def _word(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _draw(axes: Any, panel: Panel, colors: Mapping[str, str]) -> None:
    bars = [series for series in panel.series if series.kind == "bar"]
    violins = [series for series in panel.series if series.kind == "violin"]
    for series in panel.series:
        if series.kind not in ("bar", "violin"):
            _draw_points(axes, series, colors[series.group])
    groups = list(dict.fromkeys(name for series in bars for name in series.x))
    for number, series in enumerate(bars):
        _draw_bars(axes, series, colors[series.group], groups, number, len(bars))
    if bars:
        axes.set_xticks(range(len(groups)), [_shortened(name) for name in groups], rotation=20, ha="right")
    for place, series in enumerate(violins):
        _draw_violin(axes, series, colors[series.group], place)
    if violins:
        names = [_shortened(series.name) for series in violins]
        axes.set_xticks(range(len(violins)), names, rotation=20, ha="right")
    if panel.log_x:
        axes.set_xscale("log")
    axes.set_xlabel(_plain(panel.x))
    axes.set_ylabel(_plain(panel.y))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        unique = dict(zip(labels, handles))
        axes.legend(
            unique.values(), map(_shortened, unique), fontsize=8, frameon=False, ncols=2 if len(unique) > 6 else 1
        )


def _draw_points(axes: Any, series: Series, color: str) -> None:
    label = series.name if series.listed else None
    if series.kind == "interval":
        value = series.x[0]
        reach = [[value - series.low[0]], [series.high[0] - value]]
        axes.errorbar(
            [value], [_shortened(str(name)) for name in series.y], xerr=reach, fmt="o", color=color, capsize=3
        )
        return
    style = "none" if series.kind == "points" else ":" if series.dashed else "-"
    alpha, width = (0.35, 0.8) if series.faint else (1.0, 1.8)
    marker = "" if series.faint and series.kind == "line" else "o"
    axes.plot(list(series.x), list(series.y), linestyle=style, marker=marker, markersize=3, color=color, alpha=alpha,
              linewidth=width, label=label)  # fmt: skip


def _draw_bars(axes: Any, series: Series, color: str, groups: Sequence[str], number: int, count: int) -> None:
    """Draw the bars of one series, each beside those of the others in its group."""
    width = 0.8 / count
    places = [groups.index(name) + (number - (count - 1) / 2) * width for name in series.x]
    axes.bar(places, list(series.y), width, color=color, label=series.name)


def _shortened(name: str) -> str:
    return _plain(shorten(name, LONGEST, placeholder="…"))


def _plain(words: str) -> str:
    """Return words of which matplotlib takes nothing for mathematics."""
    return words.replace("$", r"\$")


def _draw_violin(axes: Any, series: Series, color: str, place: int) -> None:
    drawn = axes.violinplot([list(series.y)], positions=[place], showmedians=True, widths=0.8)
    for body in drawn["bodies"]:
        body.set_facecolor(color)
    for part in ("cbars", "cmins", "cmaxes", "cmedians"):
        drawn[part].set_color(color)
