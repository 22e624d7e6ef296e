"""The folder of a sweep: what was planned, what came of it, and where each run lives.

sweep.json         axes, notes, and every run: label, what it changes, its folder
recipes/           a whole recipe for each run: prefopt train runs one of them alone
runs/              an ordinary run folder for each
logs/              what each process wrote
status/            how each run ended, and why
report/            the report and every number of it
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt.errors import Problem, RecipeError
from prefopt.recipe import load_recipe
from prefopt.report.records import SWEEP
from prefopt.report.terms import equally_long
from prefopt.run_folder import (
    INPUTS,
    RECIPE,
    RESULT,
    differing_keys,
    input_hashes,
    read_json,
    recipe_text,
    stored_digest,
    write_json,
    write_text,
)
from prefopt.sweep.labels import labels_of
from prefopt.sweep.outcome import Outcome, read_outcome
from prefopt.sweep.plan import PlannedRun, SweepPlan

LENGTH = ("train.max_steps", "train.epochs")
"""Two ways to say the length of a run."""


class SweepFolder:
    """Paths of a sweep, and what is stored in them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def recipe(self, label: str) -> Path:
        """Return the recipe file of a run."""
        return self.path / "recipes" / f"{label}.yaml"

    def run(self, label: str) -> Path:
        """Return the folder of a run."""
        return self.path / "runs" / label

    def log(self, label: str) -> Path:
        """Return the file that takes what a run's process writes."""
        return self.path / "logs" / f"{label}.log"

    def cache_log(self, number: int = 0) -> Path:
        """Return the file that takes what the scoring of the reference writes; several where runs differ in it."""
        return self.path / "logs" / f"cache{number or ''}.log"

    def status(self, label: str) -> Path:
        """Return the file that says how a run ended."""
        return self.path / "status" / f"{label}.json"

    def finished(self, label: str) -> bool:
        """Whether a run has its result."""
        return read_result(self.run(label)).get("status") == "finished"

    def outcome(self, label: str) -> Outcome | None:
        """Return how a run ended last; None where it never did."""
        stored = read_outcome(self.status(label))
        if self.finished(label):
            return stored if stored is not None and stored.state == "finished" else Outcome("finished")
        return None if stored is not None and stored.state == "finished" else stored

    def record(self, label: str, outcome: Outcome) -> None:
        """Store how a run ended."""
        write_json(self.status(label), outcome.as_dict())

    def stored(self) -> dict[str, Any]:
        """Return the content of `sweep.json`; empty where there is none."""
        return read_json(self.path / SWEEP)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other sweeps out of the folder; the system lets go when the process ends.

        Raises:
            RecipeError: it holds a single run, another process sweeps here, or it cannot be written.
        """
        if (self.path / RECIPE).exists():
            given = f"{self.path}, which holds a single run"
            raise RecipeError(Problem("output", "a folder for a sweep", given, "choose another output=FOLDER"))
        try:
            for name in ("recipes", "runs", "logs", "status"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            stream = (self.path / ".lock").open("w", encoding="utf-8")
        except OSError as error:
            given = f"{self.path}: {error.strerror or error}"
            raise RecipeError(Problem("output", "a folder that can be written", given, "output=FOLDER")) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                fix = "wait for it, or choose another output=FOLDER"
                given = f"{self.path}, where another sweep is at work"
                raise RecipeError(Problem("output", "a sweep folder of one process", given, fix)) from error
            except OSError:
                pass  # a file system without locks
            yield

    def adopt(self, plan: SweepPlan) -> SweepPlan:
        """Return the plan with the names that its runs have here already, and free ones for new runs.

        What a stored recipe computes stands in it; a name alone says nothing.

        Raises:
            RecipeError: the folder holds a sweep of another recipe, or runs on files that have changed.
        """
        known = {digest: label for label, digest in self._known().items() if digest is not None}
        taken = set(self._known())
        runs = []
        for run in plan.runs:
            label = known.get(run.digest, run.label)
            if label in taken and run.digest not in known and not self._same(run):
                label = labels_of([run.changes], taken)[0]
            taken.add(label)
            runs.append(run if label == run.label else run.called(label, self.path))
        adopted = replace(plan, runs=tuple(runs))
        refuse_other_sweep(self, adopted)
        return adopted

    def _known(self) -> dict[str, str | None]:
        """Return the digest of every run of which there is a recipe; its own, where it has begun."""
        files = [*(self.path / "recipes").glob("*.yaml"), *(self.path / "runs").glob(f"*/{RECIPE}")]
        return {file.parent.name if file.name == RECIPE else file.stem: stored_digest(file) for file in files}

    def _same(self, run: PlannedRun) -> bool:
        """Whether the stored recipe of this name, written by another version perhaps, computes the same."""
        begun = self.run(run.label) / RECIPE
        stored = load_recipe(str(begun if begun.exists() else self.recipe(run.label)), check_files=False)
        return not differing_keys(stored, run.recipe)

    def write_recipe(self, run: PlannedRun) -> None:
        """Write the whole recipe of a run."""
        write_text(self.recipe(run.label), recipe_text(run.recipe))

    def write(self, plan: SweepPlan, *, threads: int, command: str) -> None:
        """Write the recipes and `sweep.json`; runs of an earlier, larger or smaller grid stay in it."""
        earlier = self.stored()
        stayed = earlier.get("output") == str(plan.folder)
        for run in plan.runs:
            if not stayed or stored_digest(self.recipe(run.label)) != run.digest:  # 10 ms each for thousands of runs
                self.write_recipe(run)
        entries = {entry["label"]: {**entry, "planned": False} for entry in earlier.get("runs", [])}
        entries |= {run.label: _entry(run) for run in plan.runs}
        commands = dict.fromkeys([*earlier.get("commands", []), command])
        content = {
            "name": plan.name,
            "output": str(plan.folder),
            "commands": list(commands),
            "threads": threads,
            "axes": list(dict.fromkeys([*earlier.get("axes", []), *plan.axes.varied()])),
            "match": None if plan.axes.match is None else "kappa",
            "tokens": plan.tokens or earlier.get("tokens"),
            "notes": list(dict.fromkeys([*earlier.get("notes", []), *plan.notes])),
            "runs": list(entries.values()),
        }
        write_json(self.path / SWEEP, content)


def _entry(run: PlannedRun) -> dict[str, Any]:
    return {"label": run.label, "changes": run.changes, "folder": f"runs/{run.label}", "planned": True}


def refuse_other_sweep(folder: SweepFolder, plan: SweepPlan) -> None:
    """Raise RecipeError where a folder holds a sweep of another recipe, or runs on files that have changed."""
    content = [f"content of {path}" for path in _changed_inputs(folder, plan)]
    if other := [*_other_base(folder, plan), *dict.fromkeys(content)]:
        fix = f"choose another output=FOLDER, or remove {folder.path}"
        given = f"{folder.path} has runs with other {', '.join(other[:6])}"
        raise RecipeError(Problem("output", "a new folder, or one of the same sweep", given, fix))


def _other_base(folder: SweepFolder, plan: SweepPlan) -> list[str]:
    """Return the keys in which this sweep differs from the stored one though neither varies them."""
    stored = folder.stored()
    file = next((one for entry in stored.get("runs", []) if (one := folder.recipe(entry["label"])).exists()), None)
    if file is None:
        return []
    there, here = load_recipe(str(file), check_files=False), plan.runs[0].recipe
    varied = {*stored.get("axes", []), *plan.axes.varied()}
    if varied & {"loss", "loss.name"}:
        varied.add("loss")  # a method has hyper-parameters of its own
    if varied & set(LENGTH) or ("train.batch_size" in varied and equally_long([there, here])):
        varied.update(LENGTH)
    return [key for key in differing_keys(there, here) if not any(f"{key}.".startswith(f"{one}.") for one in varied)]


def _changed_inputs(folder: SweepFolder, plan: SweepPlan) -> Iterator[str]:
    """Yield the files that a run has read and that have another content now."""
    now: dict[str, str] = {}
    hashed = set()
    for run in plan.runs:
        before = read_json(folder.run(run.label) / INPUTS)
        reads = repr([run.recipe.data, run.recipe.model, run.recipe.reference, run.recipe.adapter])
        if before and reads not in hashed:
            hashed.add(reads)
            now |= input_hashes(run.recipe)
        yield from (path for path in before if path in now and before[path] != now[path])


def read_result(folder: Path) -> dict[str, Any]:
    """Return a run's `result.json`; empty where there is none that can be read."""
    return read_json(folder / RESULT)


def unfinished(folder: SweepFolder, runs: Sequence[PlannedRun], *, retry: bool) -> list[PlannedRun]:
    """Return the runs that a command has to do: all but those that finished, failed or were stopped for good."""
    settled = ("finished", "stopped") if retry else ("finished", "failed", "stopped")
    outcomes = {run.label: folder.outcome(run.label) for run in runs}
    return [run for run in runs if (one := outcomes[run.label]) is None or one.state not in settled]


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
