"""Early stopping: runs as trials of Ray Tune, where ASHA ends those that fall behind (Li et al. 2018, 1810.05934).

Rungs are counted in percent of a run, so that runs of other lengths are compared at the same share of them. The last
look is not judged: its budget is spent, and after it a run still saves its model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

from prefopt.recipe.measures import BETTER
from prefopt.run_folder import read_json
from prefopt.sweep.axes import EarlyStopping
from prefopt.sweep.folder import SweepFolder
from prefopt.sweep.local import LOOK_EVERY, PATIENCE, end_gently, settle
from prefopt.sweep.on_ray import Cluster, Place, lost, place_of, started, stopped
from prefopt.sweep.outcome import Outcome, read_outcome
from prefopt.sweep.plan import PlannedRun
from prefopt.sweep.screen import SweepScreen
from prefopt.tracking import read_metrics

PERCENT = "percent"
UNDER_WAY = ".running"
"""Ending of a file beside the status of a run: a trial has its process."""


def run_under_asha(
    at: Cluster, folder: SweepFolder, runs: Sequence[PlannedRun], screen: SweepScreen, stopping: EarlyStopping, *,
    sweep: str,
) -> None:  # fmt: skip
    """Do the runs as trials, and stop those that fall behind.

    Raises:
        Interrupted: Ctrl-C; every run has saved its state.
    """
    tuner = _tuner(at, folder, runs, stopping, sweep)
    _stop_file(folder).unlink(missing_ok=True)
    for left in (folder.path / "status").glob(f"*{UNDER_WAY}"):
        left.unlink()
    with screen.progress(), _announced(folder, [run.label for run in runs], screen):
        try:
            tuner.fit()
        except KeyboardInterrupt:
            _stop_file(folder).touch()  # trials look at it, for Tune ends them without a word
            _wait_for_trials(folder)
            raise stopped() from None


def _tuner(at: Cluster, folder: SweepFolder, runs: Sequence[PlannedRun], stopping: EarlyStopping, sweep: str) -> Any:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other output ignores `verbose=0`
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # its handler takes Ctrl-C for a finished sweep
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    mode = "min" if BETTER[stopping.metric] is min else "max"
    scheduler = ASHAScheduler(
        time_attr=PERCENT, max_t=101, grace_period=max(1, round(100 * stopping.grace)), reduction_factor=stopping.factor
    )
    # not in the parameter space, which Tune writes into files: the environment may hold keys
    trainable = tune.with_parameters(_trial_class(), place=place_of(folder, sweep, at.threads), metric=stopping.metric)
    labels = tune.grid_search([run.label for run in runs])
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": at.threads, "gpu": at.gpus}),
        param_space={"label": labels},
        tune_config=tune.TuneConfig(metric=stopping.metric, mode=mode, scheduler=scheduler, reuse_actors=False),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(folder.path.resolve()), verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs keep checkpoints of their own
        ),
    )  # fmt: skip


def _stop_file(folder: SweepFolder) -> Path:
    return folder.path / "status" / ".stop"


def _under_way(folder: SweepFolder, label: str) -> Path:
    return folder.path / "status" / f"{label}{UNDER_WAY}"


def _wait_for_trials(folder: SweepFolder) -> None:
    """Wait until trials that have a process have saved its state; a second Ctrl-C does not."""
    deadline = time.monotonic() + PATIENCE
    try:
        while any((folder.path / "status").glob(f"*{UNDER_WAY}")) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
    except KeyboardInterrupt:
        pass


@contextmanager
def _announced(folder: SweepFolder, labels: list[str], screen: SweepScreen) -> Iterator[None]:
    """Say how each trial ended as its status appears; in the end, also of those that were lost."""
    over, before = Event(), {label: read_outcome(folder.status(label)) for label in labels}
    announcer = Thread(target=_announce, args=(folder, before, screen, over), daemon=True)
    announcer.start()
    patience = 0.0  # after Ctrl-C trials were waited for
    try:
        yield
        patience = PATIENCE
    finally:
        over.set()
        announcer.join(patience + 1.0)
    for label in list(before) if patience else ():
        screen.finished(label, lost(folder, label))


def _announce(folder: SweepFolder, before: dict[str, Outcome | None], screen: SweepScreen, over: Event) -> None:
    """Take a trial out of `before` once its outcome is another; Tune may be done before the last ones have saved."""
    while before:
        for label in [label for label, known in before.items() if read_outcome(folder.status(label)) != known]:
            del before[label]
            screen.finished(label, folder.outcome(label) or Outcome("killed", "its result is gone"))
        if over.is_set() and not any((folder.path / "status").glob(f"*{UNDER_WAY}")):
            break
        time.sleep(LOOK_EVERY)


def _trial_class() -> type:
    """Return Tune's form of a run; made here, for Ray is an extra."""
    from ray.tune import Trainable

    class Trial(Trainable):
        """One run: an iteration is a look at the held-out data."""

        def setup(self, config: dict[str, Any], **given: Any) -> None:
            self.trial = _Trial(given["place"], config["label"], given["metric"])

        def step(self) -> dict[str, Any]:
            return self.trial.next_look()

        def cleanup(self) -> None:
            self.trial.end()

    return Trial


class _Trial:
    """The process of one run, and how many of its looks were reported."""

    def __init__(self, place: Place, label: str, metric: str) -> None:
        self.folder, self.label, self.metric = SweepFolder(Path(place.folder)), label, metric
        self.child = started(place, label)
        self.seen, self.settled = 0, False
        _under_way(self.folder, self.label).touch()

    def next_look(self) -> dict[str, Any]:
        """Return the next look once there is one; the last of a run that has ended says that it is done."""
        while True:
            code, looks = self.child.code(), self._looks()
            if len(looks) > self.seen:
                self.seen += 1
                return {**looks[self.seen - 1], "done": code is not None and self.seen == len(looks)}
            if code is not None or _stop_file(self.folder).exists():
                self.end()
                return {**(looks[-1] if looks else {self.metric: float("nan"), PERCENT: 0.0}), "done": True}
            time.sleep(LOOK_EVERY)

    def end(self) -> None:
        """End the process where it still goes on, and record how."""
        if self.child.code() is None:
            end_gently([self.child])
        if self.settled:
            return
        self.settled = True
        outcome = settle(self.folder, self.label, self.child)
        if outcome.state == "interrupted" and not _stop_file(self.folder).exists():
            said = f"stopped early after {self.seen} looks at {self.metric}: it had fallen behind (ASHA)"
            self.folder.record(self.label, replace(outcome, state="stopped", reason=said))
        _under_way(self.folder, self.label).unlink(missing_ok=True)

    def _looks(self) -> list[dict[str, float]]:
        run = self.folder.run(self.label)
        key, total = self.metric.replace("eval.", "eval/").replace(".", "/"), read_json(run / "environment.json")
        steps = total.get("steps") or 1
        lines = [line for line in read_metrics(run / "metrics.jsonl") if key in line and line["step"] > 0]
        # at 0 % no rung is reached: so the last look is not judged
        return [{self.metric: line[key], PERCENT: 100 * line["step"] / steps % 100} for line in lines]
