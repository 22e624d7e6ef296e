"""One reference cache for all runs of a sweep, built before the first of them starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from prefopt.recipe import Recipe, Source
from prefopt.sweep.plan import PlannedRun
from prefopt_losses import Loss


def cache_builders(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the fewest runs whose caches together hold what all runs read of a reference."""
    groups: dict[str, list[tuple[frozenset[str], PlannedRun]]] = {}
    for run in runs:
        if run.recipe.reference.cache != "off":
            groups.setdefault(_reads_the_same(run.recipe), []).append((_wants(run.recipe.build_loss()), run))
    chosen: list[PlannedRun] = []
    for members in groups.values():
        kept: list[frozenset[str]] = []
        for wants, run in sorted(members, key=lambda member: -len(member[0])):
            if not any(wants <= other for other in kept):
                kept.append(wants)
                chosen.append(run)
    return chosen


def _reads_the_same(recipe: Recipe) -> str:
    """Return what decides which completions a reference scores, and which reference it is."""
    mapping = recipe.to_mapping()
    parts: dict[str, Any] = {key: mapping[key] for key in ("model", "adapter", "data", "reference")}
    parts["precision"] = mapping["train"]["precision"]
    parts["seed"] = recipe.seed if _draws_rows(recipe) else None
    return json.dumps(parts, sort_keys=True, default=str)


def _draws_rows(recipe: Recipe) -> bool:
    sources = recipe.data.train
    return isinstance(sources, list) and any(isinstance(one, Source) and one.weight != 1 for one in sources)


def _wants(loss: Loss) -> frozenset[str]:
    """Return what decides which completions a loss has scored, by the names of its needs."""
    return frozenset(name for name in ("reference", "rejected", "mismatched", "gold") if getattr(loss.needs, name))
