"""Runs of a sweep on a Ray cluster, or on one that is started here: the same processes in the same folders.

The folders must lie where every machine of the cluster sees them, under the same path. A task starts the run as a
process of its own and waits for it, so that a crash, a kill or a full memory costs this run and no worker.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

from prefopt.errors import Interrupted, Problem, RecipeError
from prefopt.sweep.axes import EarlyStopping
from prefopt.sweep.child import Child, start
from prefopt.sweep.folder import SweepFolder, cores
from prefopt.sweep.local import LOOK_EVERY, PATIENCE, end_gently, run_variables, settle
from prefopt.sweep.outcome import Outcome
from prefopt.sweep.plan import PlannedRun, SweepPlan
from prefopt.sweep.screen import SweepScreen, how_far
from prefopt.tracking import read_metrics

STEP = "step"


def run_on_ray(
    plan: SweepPlan, folder: SweepFolder, runs: Sequence[PlannedRun], screen: SweepScreen, *, address: str, threads: int
) -> None:
    """Do the runs as tasks of Ray, as many at a time as the cluster has room for.

    Args:
        plan: of the sweep; with early stopping the runs are trials of Ray Tune under ASHA.
        folder: of the sweep.
        runs: to do.
        screen: says how each ended.
        address: `local` starts Ray on this machine; else that of a running cluster, or `auto`.
        threads: of each run, and the CPUs that it takes.

    Raises:
        RecipeError: Ray is not installed, or there is no cluster.
        Interrupted: Ctrl-C; every run has saved its state.
    """
    at = SweepFolder(folder.path.resolve())
    with _cluster(address) as ray:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if threads > largest:
            raise RecipeError(Problem("--threads", f"at most the {largest:g} CPUs of the largest machine",
                                      str(threads), f"--threads {max(1, int(largest))}"))  # fmt: skip
        try:
            if plan.axes.early_stopping is None:
                _as_tasks(ray, plan, at, runs, screen, threads=threads, gpus=gpus)
            else:
                _as_trials(plan, at, runs, screen, plan.axes.early_stopping, threads=threads, gpus=gpus)
        except KeyboardInterrupt:
            raise Interrupted("sweep stopped; the same command goes on from what runs have saved") from None


def require_ray() -> None:
    """Raise RecipeError where Ray is not installed."""
    if find_spec("ray") is None:
        fix = 'pip install "prefopt[ray]", or leave --ray out'
        raise RecipeError(Problem("--ray", "Ray to be installed", "it is not", fix))


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    before = signal.getsignal(signal.SIGTERM)
    where: dict[str, Any] = {"address": "local", "num_cpus": cores()} if address == "local" else {"address": address}
    try:
        ray.init(**where, include_dashboard=False if address == "local" else None, log_to_driver=False,
                 logging_level=logging.ERROR, configure_logging=False)  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        fix = "--ray local starts one here; ray start --head starts a cluster"
        raise RecipeError(Problem("--ray", "a cluster that answers", f"{address}: {error}", fix)) from error
    signal.signal(signal.SIGTERM, before)  # Ray puts its own there, which would save nothing
    try:
        yield ray
    finally:
        ray.shutdown()


def _as_tasks(
    ray: Any, plan: SweepPlan, folder: SweepFolder, runs: Sequence[PlannedRun], screen: SweepScreen, *,
    threads: int, gpus: int,
) -> None:  # fmt: skip
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_run_to_its_end)
    here = os.getcwd()
    waiting = {task.remote(str(folder.path), run.label, plan.name, threads, here): run.label for run in runs}
    with screen.progress():
        for label in waiting.values():
            screen.started(label)
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=1.0)
                for one in done:
                    label = waiting.pop(one)
                    screen.finished(label, _result(ray, one, folder, label))
                screen.look({label: how_far(folder.run(label)) for label in list(waiting.values())[:50]})
        except KeyboardInterrupt:
            for one in waiting:
                ray.cancel(one, force=False)  # raises KeyboardInterrupt in the worker
            ray.wait(list(waiting), num_returns=len(waiting), timeout=PATIENCE)
            raise


def _result(ray: Any, task: Any, folder: SweepFolder, label: str) -> Outcome:
    """Return how a task ended; a worker or a machine that was lost is the run's outcome too."""
    try:
        return Outcome(**ray.get(task))
    except Exception as error:  # Ray wraps what it likes, and one lost worker must not stop the others
        outcome = Outcome("killed", f"lost with its worker: {str(error).strip().splitlines()[0][:300]}")
        folder.record(label, outcome)
        return outcome


def _run_to_its_end(path: str, label: str, sweep: str, threads: int, directory: str) -> dict[str, Any]:
    """Do one run in a process of its own; the body of a task."""
    folder = SweepFolder(Path(path))
    child = _started(folder, label, sweep, threads, directory)
    try:
        while child.code() is None:
            time.sleep(LOOK_EVERY)
    except BaseException:
        end_gently([child])
        settle(folder, label, child)
        raise
    return settle(folder, label, child).as_dict()


def _started(folder: SweepFolder, label: str, sweep: str, threads: int, directory: str) -> Child:
    os.chdir(directory)
    command = ["train", str(folder.recipe(label))]
    return start(command, folder.log(label), threads=threads, environment=run_variables(sweep))


def _as_trials(
    plan: SweepPlan, folder: SweepFolder, runs: Sequence[PlannedRun], screen: SweepScreen, stopping: EarlyStopping, *,
    threads: int, gpus: int,
) -> None:  # fmt: skip
    """Do the runs as trials of Ray Tune, where ASHA stops those that fall behind.

    A trial is never stopped for its length (`max_t` is out of reach): after its last look a run still saves its model.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other output ignores `verbose=0`
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    most = max(map(_looks, runs))
    scheduler = ASHAScheduler(
        time_attr="training_iteration", max_t=most + 2, reduction_factor=stopping.factor,
        grace_period=max(1, round(stopping.grace * most)),
    )  # fmt: skip
    mode = "min" if stopping.metric in ("eval.loss", "eval.kl", "eval.displacement") else "max"
    facts = {"path": str(folder.path), "sweep": plan.name, "threads": threads, "directory": os.getcwd(),
             "metric": stopping.metric}  # fmt: skip
    trainable = tune.with_resources(_trial_class(), {"cpu": threads, "gpu": gpus})
    tuner = tune.Tuner(
        trainable,
        param_space={**facts, "label": tune.grid_search([run.label for run in runs])},
        tune_config=tune.TuneConfig(metric=stopping.metric, mode=mode, scheduler=scheduler, reuse_actors=False),
        # runs keep checkpoints of their own
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder.path),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    for run in runs:
        folder.status(run.label).unlink(missing_ok=True)
    fitted = Event()
    with screen.progress():
        announcer = Thread(target=_announce, args=(folder, [run.label for run in runs], screen, fitted))
        announcer.start()
        try:
            tuner.fit()
        finally:
            fitted.set()
            announcer.join()


def _announce(folder: SweepFolder, labels: list[str], screen: SweepScreen, fitted: Event) -> None:
    """Say how each trial ended as its status appears; Tune may be done before the last ones have saved their state."""
    deadline = None
    while labels:
        for label in [label for label in labels if folder.status(label).exists()]:
            labels.remove(label)
            screen.finished(label, folder.outcome(label) or Outcome("killed", "its result is gone"))
        if fitted.is_set():
            deadline = deadline or time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                break
        time.sleep(LOOK_EVERY)
    for label in labels:
        outcome = Outcome("killed", "lost with its worker")
        folder.record(label, outcome)
        screen.finished(label, outcome)


def _looks(run: PlannedRun) -> int:
    """Return how often a run looks at held-out data, at most; what rungs are counted in."""
    every = run.recipe.eval.every
    if every is None:
        return 1
    if every < 1:
        return max(1, round(1 / every)) if every else 1
    steps = run.recipe.train.max_steps
    return max(1, -(-steps // int(every))) if steps else 1000


def _trial_class() -> type:
    """Return Tune's form of a run; made here, for Ray is an extra."""
    from ray.tune import Trainable

    class Trial(Trainable):
        """One run: an iteration is a look at the held-out data."""

        def setup(self, config: dict[str, Any]) -> None:
            self.folder, self.label, self.metric = SweepFolder(Path(config["path"])), config["label"], config["metric"]
            self.child = _started(self.folder, self.label, config["sweep"], config["threads"], config["directory"])
            self.seen, self.settled = 0, False

        def step(self) -> dict[str, Any]:
            file = self.folder.run(self.label) / "metrics.jsonl"
            key = self.metric.replace("eval.", "eval/").replace(".", "/")
            while True:
                code = self.child.code()
                looks = [line for line in read_metrics(file) if key in line and line[STEP] > 0]
                if len(looks) > self.seen:
                    self.seen += 1
                    ended = code is not None and self.seen == len(looks)
                    return {self.metric: looks[self.seen - 1][key], "done": ended}
                if code is not None:
                    self._settle()
                    return {self.metric: looks[-1][key] if looks else float("nan"), "done": True}
                time.sleep(LOOK_EVERY)

        def cleanup(self) -> None:
            if self.child.code() is None:
                end_gently([self.child])
            self._settle()

        def _settle(self) -> None:
            if self.settled:
                return
            self.settled = True
            outcome = settle(self.folder, self.label, self.child)
            if outcome.state == "interrupted":
                said = f"stopped early after {self.seen} looks at {self.metric}: it had fallen behind (ASHA)"
                self.folder.record(self.label, replace(outcome, state="stopped", reason=said))

    return Trial
