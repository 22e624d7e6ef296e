"""The tables of a report: settings, runs, looks during training, comparisons, conventions, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from prefopt.report.findings import Findings
from prefopt.report.records import RunRecord
from prefopt.report.settings import Setting, short_keys
from prefopt.report.standings import every_pair
from prefopt.report.strength import strength_of

Row: TypeAlias = dict[str, Any]


def setting_rows(settings: Sequence[Setting], findings: Findings) -> list[Row]:
    """One row per setting: means over its seeds, best first."""
    best = {standing.setting.name for standing in findings.standings}
    chosen = len(best) < len(settings)
    rows = [_setting_row(setting, chosen and setting.name in best) for setting in settings]
    key = "gold reward" if findings.metric is not None and findings.metric.name == "gold_reward" else "accuracy"
    return sorted(rows, key=lambda row: float("inf") if row[key] is None else -float(row[key]))


COLUMNS = ("loss", "beta", "unit", "seeds", "accuracy", "KL", "displacement", "length", "finished")
"""Columns with which the last part of a key could be confused."""


def _setting_row(setting: Setting, best: bool) -> Row:
    runs, first = setting.finished, setting.runs[0]
    strength = first.strength
    apart = ("loss", "loss.beta")
    short = short_keys([*setting.varied, *COLUMNS])
    varied = {short[key]: value for key, value in setting.varied.items() if key not in apart}

    def mean(read: Any) -> float | None:
        values = [value for run in runs if (value := read(run)) is not None]
        return float(np.mean(values)) if values else None

    return {
        "loss": first.loss.name,
        "beta": strength.beta,
        "unit": strength.unit,
        "kappa * beta": strength.kappa_beta,
        **varied,
        "chosen for its loss": "yes" if best else "",
        "seeds": f"{len(runs)} of {setting.wanted}",
        "gold reward": mean(lambda run: (run.measures.get("gold_reward") or {}).get("policy")),
        "accuracy": mean(lambda run: run.measures.get("accuracy")),
        "KL": mean(lambda run: run.measures.get("kl")),
        "chosen drift": mean(lambda run: run.measures.get("chosen_drift_per_token")),
        "rejected drift": mean(lambda run: run.measures.get("rejected_drift_per_token")),
        "displacement": mean(lambda run: run.measures.get("displacement")),
        "length": mean(lambda run: run.measures.get("length")),
        "finished": mean(lambda run: run.measures.get("finished")),
        "clipped steps": mean(lambda run: run.clipped),
    }


def run_rows(records: Sequence[RunRecord]) -> list[Row]:
    """One row per run: what it is, how it ended, every number of its result."""
    return [_run_row(record) for record in records]


def _run_row(record: RunRecord) -> Row:
    train, measures = record.result.get("train") or {}, record.measures
    gold = measures.get("gold_reward") or {}
    reference = record.result.get("reference") or {}
    return {
        "run": record.label,
        "state": record.state,
        "reason": record.reason,
        "loss": record.loss.name,
        "hyper-parameters": ", ".join(f"{k} {v}" for k, v in record.loss.hyperparameters.items()),
        "beta": record.strength.beta,
        "gpo beta": record.strength.gpo_beta,
        "kappa * beta": record.strength.kappa_beta,
        "learning rate": record.recipe.train.learning_rate,
        "seed": record.seed,
        "steps": record.result.get("steps"),
        "comparisons": train.get("comparisons"),
        "gold reward before": gold.get("reference"),
        "gold reward": gold.get("policy"),
        **{name: measures.get(key) for name, key in MEASURES.items()},
        "clipped steps": record.clipped,
        "training loss": train.get("loss"),
        **cost_of(record),
        "reference tokens scored": reference.get("tokens_scored"),
    }


MEASURES = {
    "eval loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "KL": "kl",
    "KL standard error": "kl_standard_error",
    "chosen drift": "chosen_drift_per_token",
    "rejected drift": "rejected_drift_per_token",
    "displacement": "displacement",
    "length": "length",
    "finished": "finished",
}
"""What a table calls a measure, and what `result.json` calls it."""


def cost_of(record: RunRecord) -> Row:
    """Return time, tokens and memory of a run."""
    train = record.result.get("train") or {}
    seconds, rate = train.get("seconds"), train.get("computed_tokens_per_second")
    return {
        "training seconds": seconds,
        "process seconds": record.seconds,
        "computed tokens": None if seconds is None or rate is None else round(seconds * rate),
        "peak memory GiB": None if (peak := train.get("peak_memory_bytes")) is None else peak / 2**30,
    }


def cost_rows(settings: Sequence[Setting]) -> list[Row]:
    """One row per contestant: what its runs cost together, those without a result too, and the largest peak."""
    rows: dict[str, Row] = {}
    for setting in settings:
        row = rows.setdefault(setting.contestant, {"of": setting.contestant, "runs": 0, "without a result": 0})
        for run in (*setting.runs, *setting.repeated):
            row["runs"] += 1
            row["without a result"] += not run.finished
            for name, value in cost_of(run).items():
                if value is not None:
                    row[name] = max(row.get(name) or 0.0, value) if "peak" in name else (row.get(name) or 0.0) + value
    return list(rows.values())


def look_rows(records: Sequence[RunRecord]) -> list[Row]:
    """One row per look at held-out data of every run."""
    return [{"run": record.label, "seed": record.seed, **look} for record in records for look in record.looks]


def standing_rows(findings: Findings) -> list[Row]:
    """One row per contestant at its best setting: what it was chosen by, and what it is on the other prompts."""
    return [
        {
            "of": each.setting.contestant,
            "at": each.setting.name,
            "mean": each.mean,
            "low": each.low,
            "high": each.high,
            "seeds": len(each.setting.finished),
            "prompts": len(findings.halves.reporting),
            "chosen by": each.chosen_by,
            "chosen among": each.tried,
            "measure": findings.metric.title if findings.metric else "",
        }
        for each in findings.standings
    ]


def comparison_rows(findings: Findings) -> list[Row]:
    """One row per pair of contestants at their best settings."""
    if findings.metric is None:
        return []
    return [
        {
            "one": each.one.setting.name,
            "other": each.other.setting.name,
            "difference": each.comparison.difference,
            "low": each.comparison.low,
            "high": each.comparison.high,
            "p": each.comparison.p,
            "p corrected for all pairs": each.corrected,
            "standard error": each.comparison.standard_error,
            "degrees of freedom": each.comparison.degrees,
            "found with 80 %": each.detectable,
            "seeds": each.comparison.seeds,
            "same seeds": each.comparison.paired,
            "prompts": each.comparison.prompts,
        }
        for each in every_pair(findings.metric, findings.standings, findings.halves)
    ]


def versus_rows(findings: Findings) -> list[Row]:
    """One row per contestant: the best against it."""
    return [
        {
            "against": each.other.setting.name,
            "difference": each.comparison.difference,
            "low": each.comparison.low,
            "high": each.comparison.high,
            "p corrected": each.corrected,
            "found with 80 %": each.detectable,
            "verdict": _verdict(each.different, each.comparison.difference),
        }
        for each in findings.versus
    ]


def _verdict(different: bool, difference: float) -> str:
    return "no difference shown" if not different else "better" if difference > 0 else "worse"


def convention_rows(records: Sequence[RunRecord]) -> list[Mapping[str, str]]:
    """One row per loss, or per part of a sum: how its numbers are to be read; more where hyper-parameters decide it."""
    rows = {tuple(row.items()): row for record in records for row in _convention_rows(record)}
    order = list(dict.fromkeys(row["loss"] for row in rows.values()))
    return sorted(rows.values(), key=lambda row: order.index(row["loss"]))


def _convention_rows(record: RunRecord) -> Iterator[Mapping[str, str]]:
    parts = [(f"{record.loss.name}: {part.name}", part) for _, part in record.loss.parts]
    for name, part in parts or [(record.loss.name, record.loss)]:
        strength = strength_of(part, record.completion_tokens)
        spelled = part.conventions
        yield {
            "loss": name,
            "function": spelled["function"],
            "scores": spelled["aggregate"],
            "reference": spelled["reference"],
            "unit": f"beta {strength.unit}" if strength.unit else "no beta",
            "strength": strength.note or "matched near the reference",
        }
