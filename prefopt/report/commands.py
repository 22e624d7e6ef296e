"""`prefopt report`: read runs, find the answer, write it as Markdown, one HTML file, figures and tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from prefopt import __version__
from prefopt.errors import Problem, RecipeError
from prefopt.report.charts import charts_of
from prefopt.report.colors import colors_of
from prefopt.report.export import write_table
from prefopt.report.figures import draw_figures
from prefopt.report.findings import Findings, findings_of
from prefopt.report.markdown import failed_rows, markdown_report
from prefopt.report.page import html_page
from prefopt.report.records import SWEEP, RunRecord, read_runs, refuse_mixture
from prefopt.report.settings import Setting, settings_of
from prefopt.report.tables import (
    comparison_rows,
    convention_rows,
    cost_rows,
    look_rows,
    run_rows,
    setting_rows,
    standing_rows,
    versus_rows,
)
from prefopt.report.terms import unequal_terms
from prefopt.run_folder import write_text

MOST_SAMPLES = 24
"""Prompts shown side by side; more make a page that nobody scrolls through."""


@dataclass(frozen=True)
class Written:
    """What a report came to."""

    html: Path
    markdown: Path
    answer: tuple[str, ...]
    warnings: tuple[str, ...]
    files: tuple[Path, ...]
    """Everything that was written."""


def write_report(paths: Sequence[Path], folder: Path, *, figures: bool = True) -> Written:
    """Write the report of runs and sweeps into a folder.

    Args:
        paths: folders of runs or sweeps.
        folder: where to; made if it is not there.
        figures: whether to draw PNG and SVG as well.

    Raises:
        RecipeError: a folder is neither, no run has finished, or runs cannot be compared.
    """
    records = read_runs(paths)
    if not any(record.finished for record in records):
        given = f"none of {len(records)} in {', '.join(map(str, paths))}"
        fix = "prefopt sweep or prefopt train goes on with them"
        raise RecipeError(Problem("RUN", "at least one finished run", given, fix))
    refuse_mixture(records)
    settings = settings_of(records)
    findings = findings_of(settings)
    charts = charts_of(findings, settings)
    losses = [setting.runs[0].loss.name for setting in settings]
    colors = colors_of([*(setting.contestant for setting in settings), *losses])
    title, parts = _title(paths), _parts(paths, records, settings, findings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        html, markdown = folder / "report.html", folder / "report.md"
        write_text(html, html_page(title, parts, charts, colors))
        write_text(markdown, markdown_report(title, parts))
        files = [html, markdown, *_tables(folder, records, settings, findings)]
        files += draw_figures(charts, colors, folder / "figures") if figures else []
    except OSError as error:
        given = f"{folder}: {error.strerror or error}"
        raise RecipeError(Problem("--output", "a folder that can be written", given, "--output FOLDER")) from error
    return Written(html, markdown, findings.sentences, findings.warnings, tuple(files))


def _tables(folder: Path, records: Sequence[RunRecord], settings: Sequence[Setting], findings: Findings) -> list[Path]:
    tables = {
        "runs": run_rows(records),
        "settings": setting_rows(settings, findings),
        "standings": standing_rows(findings),
        "looks": look_rows(records),
        "comparisons": comparison_rows(findings),
    }
    return [file for name, rows in tables.items() for file in write_table(folder, name, rows)]


def _title(paths: Sequence[Path]) -> str:
    return " and ".join(path.resolve().name for path in paths[:3]) + (" and more" if len(paths) > 3 else "")


def _parts(
    paths: Sequence[Path], records: Sequence[RunRecord], settings: Sequence[Setting], findings: Findings
) -> dict[str, Any]:
    runs = run_rows(records)
    finished = sum(record.finished for record in records)
    contestants = len({setting.contestant for setting in settings})
    several = len({record.loss.name for record in records}) > 1
    kinds = f"{contestants} losses" if several else f"{len(settings)} settings"
    return {
        "lead": f"{finished} of {len(records)} runs finished; {kinds if len(settings) > 1 else 'one setting'}",
        "sentences": findings.sentences,
        "warnings": findings.warnings,
        "standings": standing_rows(findings),
        "versus": versus_rows(findings),
        "settings": setting_rows(settings, findings),
        "runs": runs,
        "failed": failed_rows(runs),
        "conventions": convention_rows(records),
        "cost": cost_rows(settings),
        "notes": [*_notes(paths), *unequal_terms([record.recipe for record in records])],
        "commands": _commands(paths),
        "samples": _samples(findings, settings),
        "made": f"Made on {date.today().isoformat()} with prefopt {__version__}",
    }


def _sweeps(paths: Sequence[Path]) -> list[dict[str, Any]]:
    files = [path / SWEEP for path in paths if (path / SWEEP).is_file()]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _notes(paths: Sequence[Path]) -> list[str]:
    return list(dict.fromkeys(note for sweep in _sweeps(paths) for note in sweep.get("notes", [])))


def _commands(paths: Sequence[Path]) -> list[str]:
    sweeps = [command for sweep in _sweeps(paths) for command in sweep.get("commands", []) if command]
    single = [f"prefopt train {shlex.quote(str(path / 'recipe.yaml'))}" for path in paths
              if not (path / SWEEP).is_file()]  # fmt: skip
    return [*sweeps, *single, f"prefopt report {' '.join(shlex.quote(str(path)) for path in paths)}"]


def _samples(findings: Findings, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return prompts with what the reference and each contestant's first seed wrote."""
    best = [standing.setting for standing in findings.standings]
    best = best or [setting for setting in settings if setting.finished]
    written = {one.contestant: {row["prompt"]: row for row in one.finished[0].samples} for one in best}
    written = {who: rows for who, rows in written.items() if rows}
    if not written:
        return []
    first = next(iter(written.values()))
    prompts = [prompt for prompt in first if all(prompt in rows for rows in written.values())][:MOST_SAMPLES]
    return [
        {
            "prompt": prompt,
            "answers": [_answer("reference", first[prompt], "reference")]
            + [_answer(who, rows[prompt], "policy") for who, rows in written.items()],
        }
        for prompt in prompts
    ]


def _answer(who: str, row: dict[str, Any], side: str) -> dict[str, Any]:
    gold = row.get("gold_reward") or {}
    return {"who": who, "text": row[side], "gold": gold.get(side), "finished": (row.get("finished") or {}).get(side)}
