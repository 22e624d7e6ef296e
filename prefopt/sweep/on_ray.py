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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefopt.errors import Interrupted, Problem, RecipeError
from prefopt.sweep.child import Child, start
from prefopt.sweep.folder import SweepFolder, cores
from prefopt.sweep.local import LOOK_EVERY, PATIENCE, end_gently, run_variables, settle
from prefopt.sweep.outcome import Outcome
from prefopt.sweep.plan import PlannedRun
from prefopt.sweep.screen import SweepScreen, how_far

PASSED_ON = ("PREFOPT_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "WANDB_API_KEY",
             "WANDB_BASE_URL", "WANDB_ENTITY")  # fmt: skip
"""Variables of the shell that started the sweep, without which a worker elsewhere would look in other places."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that answers, and what one run takes of it."""

    ray: Any
    threads: int
    gpus: int

    def at_a_time(self) -> int:
        """Return how many runs there is room for now."""
        room = self.ray.cluster_resources()
        places = [room.get("CPU", 0) / self.threads, *([room["GPU"] / self.gpus] if self.gpus else [])]
        return max(1, int(min(places)))


@contextmanager
def cluster(address: str, *, threads: int) -> Iterator[Cluster]:
    """Connect to a cluster, or start one here, and let go of it in the end.

    Args:
        address: `local` starts Ray on this machine; else that of a running cluster, or `auto`.
        threads: of each run, and the CPUs that it takes.

    Raises:
        RecipeError: there is no cluster, or no machine of it is large enough.
    """
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
        largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if threads > largest:
            raise RecipeError(Problem("--threads", f"at most the {largest:g} CPUs of the largest machine",
                                      str(threads), f"--threads {max(1, int(largest))}"))  # fmt: skip
        yield Cluster(ray, threads, 1 if ray.cluster_resources().get("GPU") else 0)
    finally:
        ray.shutdown()


def require_ray() -> None:
    """Raise RecipeError where Ray is not installed."""
    if find_spec("ray") is None:
        fix = 'pip install "prefopt[ray]", or leave --ray out'
        raise RecipeError(Problem("--ray", "Ray to be installed", "it is not", fix))


def run_on_ray(
    at: Cluster, folder: SweepFolder, runs: Sequence[PlannedRun], screen: SweepScreen, *, sweep: str
) -> None:
    """Do the runs as tasks of Ray, as many at a time as the cluster has room for.

    Raises:
        Interrupted: Ctrl-C; every run has saved its state.
    """
    ray = at.ray
    task = ray.remote(num_cpus=at.threads, num_gpus=at.gpus, max_retries=0)(_run_to_its_end)
    place = place_of(folder, sweep, at.threads)
    waiting = {task.remote(place, run.label): run.label for run in runs}
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
            raise stopped() from None


def stopped() -> Interrupted:
    """Return what a sweep on Ray says at Ctrl-C."""
    return Interrupted("sweep stopped; the same command goes on from what runs have saved")


@dataclass(frozen=True)
class Place:
    """Where and how a worker does a run."""

    folder: str
    sweep: str
    threads: int
    directory: str
    """In which the sweep was started: relative paths of recipes begin there."""
    environment: dict[str, str]


def place_of(folder: SweepFolder, sweep: str, threads: int) -> Place:
    """Return what workers have to know of this process."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return Place(str(folder.path.resolve()), sweep, threads, os.getcwd(), {**passed, **run_variables(sweep)})


def started(place: Place, label: str) -> Child:
    """Start a run on the machine of a worker."""
    folder = SweepFolder(Path(place.folder))
    os.chdir(place.directory)
    command = ["train", str(folder.recipe(label))]
    return start(command, folder.log(label), threads=place.threads, environment=place.environment)


def _run_to_its_end(place: Place, label: str) -> dict[str, Any]:
    """Do one run in a process of its own; the body of a task."""
    folder, child = SweepFolder(Path(place.folder)), started(place, label)
    try:
        while child.code() is None:
            time.sleep(LOOK_EVERY)
    except BaseException:
        end_gently([child])
        settle(folder, label, child)
        raise
    return settle(folder, label, child).as_dict()


def _result(ray: Any, task: Any, folder: SweepFolder, label: str) -> Outcome:
    """Return how a task ended; a worker or a machine that was lost is the run's outcome too."""
    try:
        return Outcome(**ray.get(task))
    except Exception as error:  # Ray wraps what it likes, and one lost worker must not stop the others
        return lost(folder, label, str(error))


def lost(folder: SweepFolder, label: str, why: str = "") -> Outcome:
    """Record a run of which nobody said how it ended: finished where its result is there, else lost."""
    reason = f"lost with its worker{': ' if why else ''}{why.strip().partition(chr(10))[0][:300]}"
    outcome = Outcome("finished") if folder.finished(label) else Outcome("killed", reason)
    folder.record(label, outcome)
    return outcome
