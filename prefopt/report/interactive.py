"""Charts as Plotly figures, for the page; colours of text and grid come from the page's theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from prefopt.report.panels import Chart, Panel, Series


def figure_of(chart: Chart, colors: Mapping[str, str]) -> dict[str, Any]:
    """Return a chart as Plotly's JSON: data, layout, and for each panel which traces it shows."""
    figure = go.Figure()
    owners: list[int] = []
    for number, panel in enumerate(chart.panels):
        for series in panel.series:
            figure.add_trace(_trace(series, colors, visible=number == 0))
            owners.append(number)
    first = chart.panels[0]
    figure.update_layout(
        **_axes(first), height=_height(chart), margin={"l": 64, "r": 16, "t": 12, "b": 48}, barmode="group",
        legend={"orientation": "h", "y": -0.22, "yanchor": "top"}, hovermode="closest", violingap=0.1,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    panels = [
        {"choice": panel.choice, "visible": [owner == number for owner in owners], "layout": _axes(panel)}
        for number, panel in enumerate(chart.panels)
    ]
    plain = figure.to_plotly_json()
    plain["layout"].pop("template", None)
    return {"data": plain["data"], "layout": plain["layout"], "panels": panels}


def _height(chart: Chart) -> int:
    rows = len(chart.panels[0].series) if chart.panels[0].series[0].kind == "interval" else 0
    return max(230, 96 + 34 * rows) if rows else 420


def _axes(panel: Panel) -> dict[str, Any]:
    interval = bool(panel.series) and panel.series[0].kind == "interval"
    left = {"title": {"text": panel.y.replace("\n", "<br>")}, "automargin": True, "zeroline": False}
    return {
        "xaxis": {"title": {"text": panel.x}, "type": "log" if panel.log_x else "-", "automargin": True,
                  "zeroline": False},
        "yaxis": left | ({"type": "category"} if interval else {}),
    }  # fmt: skip


def _trace(series: Series, colors: Mapping[str, str], *, visible: bool) -> Any:
    color = colors[series.group]
    common = {"name": series.name, "legendgroup": series.group, "showlegend": series.listed, "visible": visible}
    x, y, text = list(series.x), list(series.y), list(series.text) or None
    if series.kind == "bar":
        return go.Bar(x=x, y=y, marker_color=color, **common)
    if series.kind == "violin":
        return go.Violin(x=x, y=y, line_color=color, points=False, box_visible=True, meanline_visible=True, **common)
    if series.kind == "interval":
        reach = {"type": "data", "symmetric": False, "thickness": 2, "width": 6, "color": color,
                 "array": _gaps(series.high, x), "arrayminus": _gaps(x, series.low)}  # fmt: skip
        return go.Scatter(x=x, y=y, mode="markers", error_x=reach, marker={"size": 11, "color": color}, text=text,
                          hovertemplate="%{text}<br>%{x:.4f}<extra></extra>", **common)  # fmt: skip
    mode = "markers" if series.kind == "points" else "lines+markers"
    line = {"color": color, "width": 1 if series.faint else 2.5, "dash": "dot" if series.dashed else "solid"}
    said = "%{text}<br>" if text else ""
    return go.Scatter(
        x=x, y=y, mode="lines" if series.faint and mode != "markers" else mode, line=line, text=text,
        opacity=0.35 if series.faint else 1.0, marker={"size": 5 if series.faint else 6, "color": color},
        hovertemplate=f"{said}%{{x:.4g}}, %{{y:.4g}}<extra>{'' if said else '%{fullData.name}'}</extra>", **common,
    )  # fmt: skip


def _gaps(high: Sequence[float], low: Sequence[float]) -> list[float]:
    return [above - below for above, below in zip(high, low)]
