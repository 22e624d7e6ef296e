"""How long a sweep will take, from runs of it that have ended or from the first steps of one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prefopt.sweep.child import start
from prefopt.sweep.folder import SweepFolder
from prefopt.sweep.local import settle
from prefopt.sweep.plan import PlannedRun
from prefopt.sweep.screen import how_far
from prefopt.tracking import read_metrics

ASK_ABOVE = 500
"""Runs that are not begun without asking."""
SHARE, LONGEST = 0.2, 180.0
"""The first run is watched until this share of its steps is done, or for so many seconds."""


def seconds_per_run(folder: SweepFolder, runs: Sequence[PlannedRun], *, threads: int) -> float | None:
    """Return the seconds that one run takes; None where it could not be found out.

    Where none of the sweep has ended, the first one begins, is watched for a while and stopped with its state saved:
    the time is not lost.
    """
    known = [one.seconds for run in runs if (one := folder.outcome(run.label)) and one.state == "finished"]
    known = [seconds for seconds in known if seconds]
    if known:
        return sum(known) / len(known)
    return _watch(folder, runs[0], threads)


def _watch(folder: SweepFolder, run: PlannedRun, threads: int) -> float | None:
    total = run.recipe.train.max_steps
    child = start(["train", str(folder.recipe(run.label))], folder.log(run.label), threads=threads)
    try:
        while child.code() is None and child.seconds() < LONGEST:
            time.sleep(0.2)
            share, _ = how_far(folder.run(run.label), total)
            if share is not None and share >= SHARE:
                break
    finally:
        spent, ended = child.seconds(), child.code()
        first = _first_step_at(folder, run)
        child.ask_to_stop()
        try:
            child.process.wait(timeout=120)
        finally:
            child.kill()
        settle(folder, run.label, child)
    if ended is not None:
        return spent if ended == 0 else None
    share, _ = how_far(folder.run(run.label), total)
    if not share:
        return None
    start_up = min(first, spent) if first is not None else 0.0
    return start_up + (spent - start_up) / share


def _first_step_at(folder: SweepFolder, run: PlannedRun) -> float | None:
    """Return the seconds from the start of the process to the first logged line, by the files' times."""
    metrics, log = folder.run(run.label) / "metrics.jsonl", folder.run(run.label) / "environment.json"
    if not read_metrics(metrics) or not log.exists():
        return None
    return max(0.0, log.stat().st_mtime - folder.recipe(run.label).stat().st_mtime)
