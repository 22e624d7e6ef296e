"""Which seeds losses are compared on: those that every contestant has, where a sweep is not through or grids differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prefopt.report.settings import Setting

SETTLED = ("finished", "failed", "stopped")
"""States in which a run stays; any other may still finish."""


def on_equal_seeds(settings: Sequence[Setting]) -> tuple[list[Setting], list[str]]:
    """Return the settings with the runs that are compared, and what there is to say about it.

    A sweep that is not through is judged by its whole seeds: a loss whose settings have not all been tried with a seed
    would have fewer to choose from. Losses that were never meant to have the same seeds are compared on those that all
    of them have; where there are none, each stands with its own.
    """
    kept, said = list(settings), []
    begun = [setting for setting in settings if setting.finished]
    if any(run.state not in SETTLED for setting in settings for run in setting.runs):
        able = [setting for setting in begun if not _broken(setting)]
        whole = set.intersection(*(_seeds(setting) for setting in able)) if able else set()
        if whole:
            kept = [_restricted(setting, whole) for setting in settings]
            said.append(f"not every run has finished: compared are {_words(whole)}, with which every setting has")
    return _common(kept, said)


def _common(settings: list[Setting], said: list[str]) -> tuple[list[Setting], list[str]]:
    """Go down to the seeds that all contestants have, where some have fewer than others by design.

    One seed says nothing of seeds: where several contestants have more, those with one take none away from them.
    """
    own: dict[str, set[int]] = {}
    for setting in settings:
        if all(run.finished for run in setting.runs):
            own[setting.contestant] = own.get(setting.contestant, set()) | _seeds(setting)
    several = {who: seeds for who, seeds in own.items() if len(seeds) > 1}
    own = several if len(several) > 1 else own
    if len({frozenset(seeds) for seeds in own.values()}) < 2:
        return settings, said
    shared = set.intersection(*own.values())
    if shared and (len(shared) > 1 or not several):
        said.append(f"not all were trained with the same seeds: compared are {_words(shared)}, which all have")
        return [_restricted(setting, shared) for setting in settings], said
    said.append("not all share their seeds: those that do not are compared as samples of seeds, not seed by seed")
    return [replace(setting, wanted=len(own.get(setting.contestant, setting.runs))) for setting in settings], said


def _seeds(setting: Setting) -> set[int]:
    return {run.seed for run in setting.finished}


def _broken(setting: Setting) -> bool:
    return any(run.state in ("failed", "stopped") for run in setting.runs)


def _restricted(setting: Setting, seeds: set[int]) -> Setting:
    """Return a setting with these seeds alone; one that failed with any of its seeds stays incomplete."""
    if _broken(setting):
        return replace(setting, wanted=max(len(setting.runs), len(seeds)))
    return replace(setting, runs=tuple(run for run in setting.runs if run.seed in seeds), wanted=len(seeds))


def _words(seeds: set[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"
