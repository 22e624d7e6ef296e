"""How long a sweep will take, from runs of it that have ended or from the first steps of one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prefopt.sweep.child import start
from prefopt.sweep.folder import SweepFolder
from prefopt.sweep.local import end_gently, settle
from prefopt.sweep.plan import PlannedRun
from prefopt.sweep.screen import how_far

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
    began = time.time()
    child = start(["train", str(folder.recipe(run.label))], folder.log(run.label), threads=threads)
    try:
        while child.code() is None and child.seconds() < LONGEST:
            time.sleep(0.2)
            share, _ = how_far(folder.run(run.label))
            if share is not None and share >= SHARE:
                break
        spent, ended = child.seconds(), child.code()
        share, _ = how_far(folder.run(run.label))
    finally:
        end_gently([child])
        settle(folder, run.label, child)
    if ended is not None:
        return spent if ended == 0 else None
    set_up = folder.run(run.label) / "environment.json"
    if not share or not set_up.exists():
        return None
    start_up = min(max(0.0, set_up.stat().st_mtime - began), spent)
    return start_up + (spent - start_up) / share
