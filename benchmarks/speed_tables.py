"""Figures of many runs -> Markdown: medians, paired ratios with an exact bound, predictions beside them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from cost_model import efficiency, paired_ratios, seconds_a_step

Figures = dict[str, Any]
HEADER = (
    "| tool | s/step: median (range) | pairs/s | prefopt is faster by: median | at least (95 %) | range "
    "| at equal rate | predicted | eff | eff (hard) | matmul GF/s (fastest) | peak GiB | floor GiB | first step s "
    "| of it reference s |"
)


def table(name: str, precision: str, runs: Sequence[Figures]) -> list[str]:
    """One workload and precision; the first tool is ours."""
    tools = list(dict.fromkeys(run["tool"] for run in runs))
    lines = [f"\n## {name}, {precision}\n", HEADER, "|---" * HEADER.count(" | ") + "|---|"]
    operations = {run["tool"]: run["operations"] for run in runs}
    for tool in tools:
        own = [run for run in runs if run["tool"] == tool]
        times = [seconds_a_step(run) for run in own]
        ratios = paired_ratios(runs, tool, tools[0])
        low, high = min(ratios), max(ratios)
        equal = statistics.median(paired_ratios(runs, tool, tools[0], at_equal_rate=True))
        faster = f"{statistics.median(ratios):.2f} | {lower_bound(ratios)[0]:.2f} | {low:.2f} to {high:.2f}"
        rates = [rate / 1e9 for run in own for rate in run["matmul_rate"]]
        fastest = max(rate / 1e9 for run in own for rate in run["fastest_matmul"])
        eff, hard = (statistics.median(efficiency(run, hard=each) for run in own) for each in (False, True))
        lines.append(
            f"| {tool} | {statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f}) "
            f"| {own[0]['batch'] / statistics.median(times):.2f} | {'1 | | ' if tool == tools[0] else faster} "
            f"| {equal:.2f} | {operations[tool] / operations[tools[0]]:.2f} "
            f"| {eff:.2f} | {hard:.2f} "
            f"| {min(rates):.0f} to {max(rates):.0f} ({fastest:.0f}) "
            f"| {max(run['peak_bytes'] for run in own) / 2**30:.2f} "
            f"| {max(run['floor_bytes'] for run in own) / 2**30:.2f} "
            f"| {statistics.median(run['first_step_s'] for run in own):.1f} "
            f"| {statistics.median(run['reference_s'] for run in own):.1f} |"
        )
    count = len([run for run in runs if run["tool"] == tools[0]])
    lines.append(
        f"\nLargest difference of two tools' losses in a step: {largest_difference(runs):.1e}; the same completion "
        f"tokens and token ids in every counted step. The bound of the median of {count} paired ratios holds with "
        f"{lower_bound([1.0] * count)[1]:.1%}. Load average {min(run['load'] for run in runs):.1f} to "
        f"{max(run['load'] for run in runs):.1f}."
    )
    lines += [f"\nprefopt chose {said}." for said in dict.fromkeys(map(said_of, runs)) if said]
    return [*lines, *used_once(runs, tools)]


def said_of(run: Figures) -> str:
    """What prefopt decided by itself in a run, in words; nothing for another tool."""
    chosen = run.get("chosen")
    if not chosen or run["tool"] != "prefopt":
        return ""
    again = "computed again" if chosen["gradient_checkpointing"] else "kept"
    return (
        f"{chosen['layout']} prompts, attention by {chosen['attention']}, micro-batches of {chosen['token_budget']:,} "
        f"tokens and activations that are {again}"
    )


def used_once(runs: Sequence[Figures], tools: Sequence[str]) -> list[str]:
    """The ratio to an online reference if ours is scored for one epoch of one run only: its pass is in our steps.

    The pass is charged whole, with loading the reference, to as few steps as a benchmark runs: a lower figure than
    that of a run of usual length.
    """
    online = next((tool for tool in tools if tool in ("trl", "trl-adapter-off")), None)
    if online is None:
        return []
    charged = [
        {**run, "steps_s": [step + run["reference_s"] / run["steps"] for step in run["steps_s"]]}
        if run["tool"] == tools[0]
        else run
        for run in runs
    ]
    ratios = paired_ratios(charged, online, tools[0])
    return [
        f"\nA step's time leaves out our pass over the reference, which a cache pays once for all epochs and runs. "
        f"With it charged to these {runs[0]['steps']} steps alone: {statistics.median(ratios):.2f}x over {online} "
        f"({min(ratios):.2f} to {max(ratios):.2f})."
    ]


def sharing(runs: Sequence[Figures]) -> str:
    """What sharing alone gave beside what the operations promise."""
    ratios = paired_ratios(runs, "prefopt-unshared")
    equal = statistics.median(paired_ratios(runs, "prefopt-unshared", at_equal_rate=True))
    operations = {run["tool"]: run["operations"] for run in runs}
    promised = operations["prefopt-unshared"] / operations["prefopt"]
    return (
        f"\nSharing alone (the same ragged rows, every prompt twice): {statistics.median(ratios):.2f}x "
        f"({min(ratios):.2f} to {max(ratios):.2f}; at equal rate {equal:.2f}x), by operations {promised:.2f}x: "
        f"{statistics.median(ratios) / promised:.0%} of it."
    )


def growth(run: Figures) -> list[str]:
    """Resident memory over a long run."""
    resident = [size / 2**20 for size in run["resident_bytes"]]
    quarter = len(resident) // 4
    second, last = max(resident[quarter : 2 * quarter]), max(resident[-quarter:])
    lines = [
        f"\n## growth: {run['workload']}, {run['precision']}, {len(resident)} steps\n",
        "| step | MiB |",
        "|---|---|",
    ]
    lines += [f"| {step} | {resident[step - 1]:,.0f} |" for step in range(10, len(resident) + 1, 10)]
    verdict = "does not grow" if last <= 1.05 * second else "GROWS"
    return [*lines, f"\nMost in the second quarter {second:,.0f}, in the last {last:,.0f} MiB: {verdict}."]


def lower_bound(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return a lower bound of the median of what the values are drawn from, and its confidence.

    By order statistics: the median is below the k-th smallest of n only if fewer than k draws fell below it.
    It is the k-th for the largest k that keeps the level; with fewer than five values the smallest, at less.
    """
    ordered, count = sorted(values), len(values)
    tails = list(itertools.accumulate(math.comb(count, below) / 2**count for below in range(count)))
    rank = max((number for number, tail in enumerate(tails) if tail <= 1 - level), default=0)
    return ordered[rank], 1 - tails[rank]


def largest_difference(runs: Sequence[Figures]) -> float:
    """Largest difference of two runs' losses in the same step."""
    steps = zip(*(run["losses"] for run in runs), strict=True)
    return max(max(losses) - min(losses) for losses in steps)
