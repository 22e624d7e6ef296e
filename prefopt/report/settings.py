"""Which runs are the same setting under another seed, and which settings stand for one loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from prefopt.report.records import CONTENT, RunRecord


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed."""

    name: str
    """What tells it from the others: `ipo, beta 0.85, learning_rate 0.0001`."""
    loss: str
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


MOST_CHARACTERS = 40
"""Of a list or mapping in a name."""
MOST_PARTS = 4
"""A single run that differs in more keys is called by its folder."""


def settings_of(records: Sequence[RunRecord]) -> list[Setting]:
    """Return the settings, in the order in which they first appear; runs of one agree in every key that varies."""
    varied = varied_keys(records)
    losses = {record.loss.name for record in records}
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        groups.setdefault(tuple(repr(record.keys.get(key)) for key in ("loss", *varied)), []).append(record)
    wanted = max(len({run.seed for run in runs}) for runs in groups.values())
    names = _names(list(groups.values()), varied)
    return [_setting(name, runs, varied, wanted, several=len(losses) > 1) for name, runs in zip(names, groups.values())]


def _names(groups: Sequence[Sequence[RunRecord]], varied: Sequence[str]) -> list[str]:
    """Return a different name for each group: rounded where that tells them apart, else with every digit."""
    short = [_name(runs, varied, shown) for runs in groups]
    return [name if short.count(name) == 1 else _name(runs, varied, str) for name, runs in zip(short, groups)]


def _setting(name: str, runs: Sequence[RunRecord], varied: Sequence[str], wanted: int, *, several: bool) -> Setting:
    """Return one setting; of runs with the same seed the first finished one counts."""
    chosen: dict[int, RunRecord] = {}
    for run in runs:
        if run.seed not in chosen or (run.finished and not chosen[run.seed].finished):
            chosen[run.seed] = run
    first = runs[0]
    return Setting(
        name, first.loss.name, first.loss.name if several else name,
        {key: first.keys[key] for key in varied if key in first.keys},
        tuple(chosen[seed] for seed in sorted(chosen)), wanted,
        tuple(run for run in runs if run is not chosen[run.seed]),
    )  # fmt: skip


def varied_keys(records: Sequence[RunRecord]) -> list[str]:
    """Return the keys that differ between runs; a hyper-parameter only where it differs within one loss."""
    every = list(dict.fromkeys(key for record in records for key in record.keys))
    return [key for key in every if _varies(key, records)]


def _varies(key: str, records: Sequence[RunRecord]) -> bool:
    if key.startswith(CONTENT):  # the same path, another content
        return len({record.keys[key] for record in records if key in record.keys}) > 1
    if not key.startswith("loss."):
        return len({repr(record.keys.get(key)) for record in records}) > 1
    seen: dict[str, set[str]] = {}
    for record in records:
        seen.setdefault(record.loss.name, set()).add(repr(record.keys.get(key)))
    return any(len(values) > 1 for values in seen.values())


def _name(runs: Sequence[RunRecord], varied: Sequence[str], spell: Callable[[Any], str]) -> str:
    keys = runs[0].keys
    parts = [runs[0].loss.name] if "loss" in varied or not varied else []
    short = short_keys(varied)
    parts += [f"{short[key]} {spell(keys[key])}" for key in varied if key != "loss" and key in keys]
    return ", ".join(parts) if len(parts) <= MOST_PARTS or len(runs) > 1 else runs[0].label


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return what each key is called: its last part, or all of it where two would be called the same."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {key: key if key.startswith(CONTENT) or lasts.count(last) > 1 else last for key, last in zip(keys, lasts)}


def shown(value: Any) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple | dict):
        return shorten(str(value), MOST_CHARACTERS, placeholder="…")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
