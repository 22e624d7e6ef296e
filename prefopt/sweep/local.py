"""Runs of a sweep on this machine: as many processes at a time as asked for, each watched until it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from prefopt.errors import Interrupted
from prefopt.sweep.child import Child, start
from prefopt.sweep.folder import SweepFolder
from prefopt.sweep.outcome import Outcome, outcome_of, read_outcome
from prefopt.sweep.plan import PlannedRun
from prefopt.sweep.screen import SweepScreen, how_far

LOOK_EVERY = 0.2
"""Seconds between two looks at the processes."""
PATIENCE = 120.0
"""Seconds that runs get to save their state after Ctrl-C."""


@dataclass
class Slots:
    """The places in which runs go on at the same time, each with its share of the machine."""

    count: int
    threads: int
    gpus: tuple[str, ...] = ()
    """Names of the visible GPUs; a slot has one of them, in turn."""
    taken: dict[int, str] = field(default_factory=dict)

    def take(self, label: str) -> dict[str, str]:
        """Give a run the first free slot; returns the variables of its process."""
        number = next(slot for slot in range(self.count) if slot not in self.taken)
        self.taken[number] = label
        return {"CUDA_VISIBLE_DEVICES": self.gpus[number % len(self.gpus)]} if self.gpus else {}

    def free(self, label: str) -> None:
        """Give the slot of a run back."""
        self.taken = {slot: other for slot, other in self.taken.items() if other != label}


def visible_gpus() -> tuple[str, ...]:
    """Return the names by which this machine's GPUs are made visible."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(each.strip() for each in named.split(",") if each.strip())
    import torch

    return tuple(str(number) for number in range(torch.cuda.device_count()))


def run_variables(sweep: str) -> dict[str, str]:
    """Return the variables that every run of a sweep gets: W&B puts them in one group."""
    return {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", sweep)}


def run_locally(
    folder: SweepFolder, runs: Sequence[PlannedRun], slots: Slots, screen: SweepScreen, *, sweep: str
) -> None:
    """Do the runs, and record how each ended.

    Raises:
        Interrupted: Ctrl-C; every run has saved its state.
    """
    waiting, running = list(runs), dict[str, tuple[PlannedRun, Child]]()
    with screen.progress(), _stopped_on_interrupt(folder, running):
        while waiting or running:
            while waiting and len(running) < slots.count:
                run = waiting.pop(0)
                variables = {**run_variables(sweep), **slots.take(run.label)}
                command = ["train", str(folder.recipe(run.label))]
                child = start(command, folder.log(run.label), threads=slots.threads, environment=variables)
                running[run.label] = (run, child)
                screen.started(run.label)
            time.sleep(LOOK_EVERY)
            for label in [label for label, (_, child) in running.items() if child.code() is not None]:
                outcome = settle(folder, label, running.pop(label)[1])
                slots.free(label)
                screen.finished(label, outcome)
            if screen.console.is_terminal:
                screen.look({label: how_far(folder.run(label)) for label in running})


def settle(folder: SweepFolder, label: str, child: Child) -> Outcome:
    """Record how a process that has ended left its run."""
    before = read_outcome(folder.status(label))
    outcome = outcome_of(child.code() or 0, folder.finished(label), child.written(), child.seconds())
    outcome = replace(outcome, spent=outcome.seconds + (before.spent if before else 0.0))
    folder.record(label, outcome)
    return outcome


@contextmanager
def _stopped_on_interrupt(folder: SweepFolder, running: dict[str, tuple[PlannedRun, Child]]) -> Iterator[None]:
    """Pass Ctrl-C on to the runs and wait for them to save; a second one ends them at once."""
    try:
        yield
    except KeyboardInterrupt:
        children = [child for _, child in running.values()]
        end_gently(children)
        for label, (_, child) in running.items():
            settle(folder, label, child)
        raise Interrupted(
            f"sweep stopped with {len(running)} runs under way; the same command goes on from what they have saved"
        ) from None


def end_gently(children: Sequence[Child]) -> None:
    """Let runs save their state, and end those that do not, or all of them at a second Ctrl-C."""
    for child in children:
        child.ask_to_stop()
    deadline = time.monotonic() + PATIENCE
    try:
        while any(child.code() is None for child in children) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
    except KeyboardInterrupt:
        pass
    for child in children:
        child.kill()
        child.process.wait()
