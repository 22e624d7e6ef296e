"""What runs are compared by: values per prompt, so that two runs are compared prompt by prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from prefopt.report.records import RunRecord

ByPrompt: TypeAlias = Mapping[str, tuple[float, float]]
"""Prompt -> its mean value and its weight."""


@dataclass(frozen=True)
class Metric:
    """One number of a run that is a mean over prompts; larger is better."""

    name: str
    title: str
    unit: str
    by_prompt: Callable[[RunRecord], ByPrompt]
    look: str
    """Its name in the looks at held-out data during a run."""
    carried: Callable[[RunRecord], bool]
    """Whether a run was measured by it at all, be the values finite or not."""
    span: float = math.inf
    """The largest difference that there can be."""


def accuracy_by_prompt(run: RunRecord) -> ByPrompt:
    """Return the share of right comparisons of each held-out prompt, weighted by their number."""
    if run.held_out is None:
        return {}
    correct = run.held_out.columns["correct"]
    prompts, place = np.unique(run.held_out.prompt, return_inverse=True)
    counts = np.bincount(place)
    sums = np.bincount(place, weights=correct)
    if not np.isfinite(sums).all():
        return {}
    return {str(prompt): (float(sums[i] / counts[i]), float(counts[i])) for i, prompt in enumerate(prompts)}


def gold_by_prompt(run: RunRecord) -> ByPrompt:
    """Return the gold reward of what the policy wrote for each prompt."""
    rows = [row for row in run.samples if (row.get("gold_reward") or {}).get("policy") is not None]
    values = {_digest(row["prompt"]): float(row["gold_reward"]["policy"]) for row in rows}
    return {prompt: (value, 1.0) for prompt, value in values.items()} if np.isfinite([*values.values()]).all() else {}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


ACCURACY = Metric(
    "accuracy",
    "held-out accuracy",
    "share of comparisons",
    accuracy_by_prompt,
    "accuracy",
    lambda run: run.held_out is not None,
    1.0,
)
GOLD = Metric(
    "gold_reward",
    "gold reward",
    "of the policy's own samples",
    gold_by_prompt,
    "gold_reward/policy",
    lambda run: any((row.get("gold_reward") or {}).get("policy") is not None for row in run.samples),
)


def primary_metric(runs: Sequence[RunRecord]) -> Metric | None:
    """Return what the report answers by: what most runs have, the gold reward before held-out accuracy; else none."""
    counts = {metric.name: sum(metric.carried(run) for run in runs) for metric in (GOLD, ACCURACY)}
    best = max((GOLD, ACCURACY), key=lambda metric: counts[metric.name])
    return best if counts[best.name] else None


@dataclass(frozen=True)
class Halves:
    """The prompts on which settings are chosen, and those on which they are reported."""

    choosing: tuple[str, ...]
    reporting: tuple[str, ...]

    @property
    def split(self) -> bool:
        """Whether they are different prompts."""
        return self.choosing != self.reporting


FEWEST = 20
"""Prompts below which both halves would be too small, and all are used for both."""


def halves(prompts: Sequence[str]) -> Halves:
    """Split prompts by their digests, alternately: the same halves for every run and every report."""
    ordered = sorted(prompts)
    if len(ordered) < FEWEST:
        return Halves(tuple(ordered), tuple(ordered))
    return Halves(tuple(ordered[0::2]), tuple(ordered[1::2]))


def table_of(metric: Metric, runs: Sequence[RunRecord], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return values (seeds, prompts) and the weights of the prompts (prompts,)."""
    read = [metric.by_prompt(run) for run in runs]
    values = np.array([[one[prompt][0] for prompt in prompts] for one in read])
    return values, np.array([read[0][prompt][1] for prompt in prompts])
