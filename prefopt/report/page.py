"""The report as one HTML file: it opens from disk, asks the network for nothing, and treats model text as text."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from prefopt.report.interactive import figure_of
from prefopt.report.markdown import columns_of, number
from prefopt.report.panels import Chart


def html_page(title: str, parts: Mapping[str, Any], charts: Sequence[Chart], colors: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        title: of the sweep or run.
        parts: what `markdown_report` takes, with `runs`, `samples`, `lead` and `made`.
        charts: to draw.
        colors: of the contestants.
    """
    environment = Environment(
        loader=PackageLoader("prefopt.report", "page"), autoescape=select_autoescape(default=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "numeric": _numeric, "columns": _shown_columns, "sortable": _sort_value}
    loader = environment.loader
    assert loader is not None
    scripts = [get_plotlyjs().replace("</script", "<\\/script"), loader.get_source(environment, "page.js")[0]]
    style = loader.get_source(environment, "page.css")[0]
    figures = _finite({chart.key: figure_of(chart, colors) for chart in charts})
    return environment.get_template("page.html").render(
        title=title, parts=parts, charts=charts, figures=figures,
        colors=colors, scripts=scripts, style=style, hashes=[_hash(each) for each in scripts],
    )  # fmt: skip


def _finite(value: Any) -> Any:
    """Return plain data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hash(script: str) -> str:
    """Return what names a script in a content security policy: only our own two may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _shown_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in columns_of(rows) if any(row.get(name) not in (None, "") for row in rows)]


def _numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a column holds numbers."""
    known = [row[name] for row in rows if row.get(name) is not None]
    return bool(known) and all(isinstance(each, int | float) for each in known)


def _sort_value(value: Any) -> str:
    """Return what a column is sorted by: numbers unrounded, words as they are."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
