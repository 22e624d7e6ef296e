"""Which runs are the same setting under another seed, and which settings stand for one loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.report.records import RunRecord


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed."""

    name: str
    """What tells it from the others: `ipo, beta 0.85, learning_rate 0.0001`."""
    contestant: str
    """The loss, where losses are compared; else the setting itself."""
    varied: Mapping[str, Any]
    """Its values of the keys that vary."""
    runs: tuple[RunRecord, ...]
    """By seed."""
    wanted: int
    """Seeds that it should have: as many as the setting with most."""
    repeated: tuple[RunRecord, ...] = ()
    """Runs that have the setting and seed of another."""

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """Its runs that have a result."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def complete(self) -> bool:
        """Whether every seed finished."""
        return len(self.finished) == self.wanted


MOST_PARTS = 4
"""Runs that differ in more keys are called by their folders."""


def settings_of(records: Sequence[RunRecord]) -> list[Setting]:
    """Return the settings, in the order in which they first appear."""
    varied = varied_keys(records)
    losses = {record.loss.name for record in records}
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(_name(record, varied), []).append(record)
    wanted = max(len({run.seed for run in runs}) for runs in groups.values())
    return [_setting(name, runs, varied, wanted, several=len(losses) > 1) for name, runs in groups.items()]


def _setting(name: str, runs: Sequence[RunRecord], varied: Sequence[str], wanted: int, *, several: bool) -> Setting:
    """Return one setting; of runs with the same seed the first finished one counts."""
    chosen: dict[int, RunRecord] = {}
    for run in runs:
        if run.seed not in chosen or (run.finished and not chosen[run.seed].finished):
            chosen[run.seed] = run
    first = runs[0]
    return Setting(
        name, first.loss.name if several else name,
        {key: first.keys[key] for key in varied if key in first.keys},
        tuple(chosen[seed] for seed in sorted(chosen)), wanted,
        tuple(run for run in runs if run is not chosen[run.seed]),
    )  # fmt: skip


def varied_keys(records: Sequence[RunRecord]) -> list[str]:
    """Return the keys that differ between runs; a hyper-parameter only where it differs within one loss."""
    every = list(dict.fromkeys(key for record in records for key in record.keys))
    return [key for key in every if _varies(key, records)]


def _varies(key: str, records: Sequence[RunRecord]) -> bool:
    if not key.startswith("loss."):
        return len({repr(record.keys.get(key)) for record in records}) > 1
    seen: dict[str, set[str]] = {}
    for record in records:
        seen.setdefault(record.loss.name, set()).add(repr(record.keys.get(key)))
    return any(len(values) > 1 for values in seen.values())


def _name(record: RunRecord, varied: Sequence[str]) -> str:
    parts = [record.loss.name] if "loss" in varied or not varied else []
    for key in varied:
        if key != "loss" and key in record.keys:
            parts.append(f"{key.rpartition('.')[2]} {shown(record.keys[key])}")
    return ", ".join(parts) if len(parts) <= MOST_PARTS else record.label


def shown(value: Any) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
