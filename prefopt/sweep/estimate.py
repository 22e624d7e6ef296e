"""How long a sweep will take, from runs of it that have ended or from the first steps of one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prefopt.sweep.child import Child, start
from prefopt.sweep.folder import SweepFolder
from prefopt.sweep.local import end_gently, run_variables, settle
from prefopt.sweep.plan import PlannedRun
from prefopt.sweep.screen import how_far

ASK_ABOVE = 500
"""Runs that are not begun without asking."""
SHARE, LONGEST = 0.2, 180.0
"""The first run is watched until this share of its steps is done, or for so many seconds."""


def seconds_per_run(
    folder: SweepFolder, runs: Sequence[PlannedRun], first: PlannedRun, *, sweep: str, threads: int
) -> float | None:
    """Return the seconds that one run takes; None where it could not be found out.

    Where none of the sweep has ended, the first one to do begins, is watched for a while and stopped with its state
    saved: the time is not lost. What it reads of the reference is scored before, for later runs do not do it again.
    """
    known = [one.spent for run in runs if (one := folder.outcome(run.label)) and one.state == "finished"]
    known = [seconds for seconds in known if seconds]
    if known:
        return sum(known) / len(known)
    if first.recipe.reference.cache != "off":
        scoring = start(["cache", "build", str(folder.recipe(first.label))], folder.cache_log(), threads=threads)
        with _ended_in_any_case(scoring):
            scoring.process.wait()
    return _watch(folder, first, sweep, threads)


@contextmanager
def _ended_in_any_case(child: Child) -> Iterator[None]:
    try:
        yield
    finally:
        child.kill()
        child.process.wait()


def _watch(folder: SweepFolder, run: PlannedRun, sweep: str, threads: int) -> float | None:
    began, before = time.time(), how_far(folder.run(run.label))[0] or 0.0
    command = ["train", str(folder.recipe(run.label))]
    child = start(command, folder.log(run.label), threads=threads, environment=run_variables(sweep))
    try:
        while child.code() is None and child.seconds() < LONGEST:
            time.sleep(0.2)
            share, _ = how_far(folder.run(run.label))
            if share is not None and share >= min(1.0, before + SHARE):
                break
        spent, ended = child.seconds(), child.code()
        share, _ = how_far(folder.run(run.label))
    finally:
        end_gently([child])
        settle(folder, run.label, child)
    if ended is not None:
        return spent if ended == 0 else None
    set_up = folder.run(run.label) / "environment.json"
    if not share or share <= before or not set_up.exists():
        return None
    start_up = min(max(0.0, set_up.stat().st_mtime - began), spent)
    return start_up + (spent - start_up) / (share - before)
