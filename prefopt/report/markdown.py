"""The report as Markdown: the answer, the comparisons, the table, the conventions, how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefopt.report.tables import Row


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as a Markdown table; columns without any value are left out."""
    names = [name for name in (columns or columns_of(rows)) if any(row.get(name) not in (None, "") for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    return as_text(number(value)).replace("|", "\\|").replace("\n", " ")


def as_text(words: str) -> str:
    """Return words so that nothing of them is taken for HTML."""
    return words.replace("&", "&amp;").replace("<", "&lt;")


def number(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown_report(title: str, parts: Mapping[str, Any]) -> str:
    """Return the report.

    Args:
        title: of the sweep or run.
        parts: `sentences`, `warnings`, `notes`, `standings`, `versus`, `settings`, `failed`, `conventions`, `cost`,
            `commands`.
    """
    return "\n\n".join([f"# {as_text(title)}", *_parts(parts)]) + "\n"


def _parts(parts: Mapping[str, Any]) -> Iterator[str]:
    yield "\n".join(["## Answer", "", *map(as_text, parts["sentences"])])
    if parts["warnings"]:
        yield "\n".join(["## To know before acting on it", "", *(f"- {as_text(each)}" for each in parts["warnings"])])
    if len(parts["standings"]) > 1:
        yield f"## Each at its best\n\n{markdown_table(parts['standings'])}"
    if parts["versus"]:
        yield f"## The best against the others\n\n{markdown_table(parts['versus'])}"
    yield f"## Settings\n\n{markdown_table(parts['settings'])}"
    if parts["failed"]:
        yield f"## Runs without a result\n\n{markdown_table(parts['failed'])}"
    yield f"## Conventions\n\n{markdown_table(parts['conventions'])}"
    yield f"## Cost\n\n{markdown_table(parts['cost'])}"
    if parts["notes"]:
        yield "\n".join(["## On what terms", "", *(f"- {as_text(each)}" for each in parts["notes"])])
    yield "\n".join(["## Repeat it", "", *(f"    {each}" for each in parts["commands"])])


def failed_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the runs without a result, and why."""
    return [{name: row[name] for name in ("run", "state", "reason")} for row in rows if row["state"] != "finished"]
