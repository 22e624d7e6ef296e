"""What a sweep says: a line for each run that ends, and where a terminal shows it, how far the others are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from prefopt.run_folder import read_json
from prefopt.screen import Screen
from prefopt.sweep.folder import SweepFolder, read_result
from prefopt.sweep.outcome import Outcome
from prefopt.sweep.plan import PlannedRun, SweepPlan
from prefopt.tracking import read_metrics

COLORS = {"finished": "green", "failed": "red", "killed": "red", "interrupted": "yellow", "stopped": "yellow"}


LINES = 16_384
"""Bytes of a run's log in which its last step is looked for, several times a second."""


def duration(seconds: float) -> str:
    """Return a time as a person says it: 48 s, 12 min, 3 h 20 min, 4 days 2 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days:,} days {hours} h" if hours and days < 100 else f"{days:,} days"


class SweepScreen:
    """The console of a sweep."""

    def __init__(self, console: Console, folder: SweepFolder, total: int, processes: int) -> None:
        self.console, self.folder, self.total, self.processes = console, folder, total, processes
        self.ended = 0
        self._seconds: list[float] = []
        self._bar: Progress | None = None
        self._all: TaskID | None = None
        self._running: dict[str, TaskID] = {}

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show one bar for all runs and a line for each that runs, on a terminal."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            self._bar = bar
            self._all = bar.add_task("all runs", total=self.total, completed=self.ended, said="")
            yield
            self._bar = None

    def started(self, label: str) -> None:
        """Show a run that begins."""
        if self._bar is not None:
            self._running[label] = self._bar.add_task(f"  {label}", total=1.0, said="starting")

    def look(self, shares: Mapping[str, tuple[float | None, str]]) -> None:
        """Move the bars on: for each running run the share that is done, where known, and a word."""
        if self._bar is None or self._all is None:
            return
        for label, (share, said) in shares.items():
            if label in self._running:
                self._bar.update(self._running[label], completed=share or 0.0, said=said)
        done = self.ended + sum(share or 0.0 for share, _ in shares.values())
        self._bar.update(self._all, completed=done, said=f"{self.ended} of {self.total}{self._left(done)}")

    def finished(self, label: str, outcome: Outcome) -> None:
        """Say how a run ended."""
        self.ended += 1
        if outcome.state == "finished":
            self._seconds.append(outcome.seconds)
        task = self._running.pop(label, None)
        if self._bar is not None and task is not None:
            self._bar.remove_task(task)
        measured = _measured(self.folder.run(label)) if outcome.state == "finished" else outcome.reason
        width = len(str(self.total))
        line = Text(f"{self.ended:>{width}}/{self.total}  ")
        line.append(label, style="bold")
        line.append(f"  {outcome.state}", style=COLORS[outcome.state])
        left = "" if self.console.is_terminal else self._left(self.ended)
        line.append(f" in {duration(outcome.seconds)}{': ' if measured else ''}{measured}{left}")
        self.console.print(line)

    def _left(self, done: float) -> str:
        if not self._seconds or done >= self.total:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        return f"; about {duration((self.total - done) * mean / self.processes)} left"


def _measured(folder: Path) -> str:
    measures = read_result(folder).get("eval") or {}
    said = []
    if "gold_reward" in measures:
        said.append(f"gold {measures['gold_reward']['policy']:.3f}")
    if "accuracy" in measures:
        said.append(f"accuracy {measures['accuracy']:.3f}")
    if measures.get("kl") is not None:
        said.append(f"KL {measures['kl']:.2f}")
    return ", ".join(said)


def how_far(folder: Path) -> tuple[float | None, str]:
    """Return the share of its steps that a run has done, None before the first, and its last step in words."""
    total = read_json(folder / "environment.json").get("steps")
    lines = [line for line in read_metrics(folder / "metrics.jsonl", last=LINES) if "learning_rate" in line]
    if not lines:
        return None, "starting"
    step, loss = lines[-1]["step"], lines[-1].get("loss")
    of = f" of {total}" if total else ""
    shown = f", loss {loss:.4f}" if isinstance(loss, float) else ""
    return (min(1.0, step / total) if total else None), f"step {step}{of}{shown}"


def show_plan(console: Console, plan: SweepPlan, done: Mapping[str, Outcome | None]) -> None:
    """Print every run of a sweep with what its beta amounts to, and the notes."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "loss", "beta", "unit", "DPO's beta", "state"):
        table.add_column(name, style="" if name in ("run", "loss") else "dim", overflow="fold")
    shown = plan.runs[:200]
    for run in shown:
        loss = run.recipe.build_loss()
        beta = loss.hyperparameters.get("beta")
        outcome = done.get(run.label)
        table.add_row(
            Text(run.label), Text(loss.name), "" if beta is None else f"{beta:g}",
            Text(loss.conventions["beta"].partition(" per ")[2]),
            _written(run.changes.get("loss.beta")) if run.matched else "",
            outcome.state if outcome else "",
        )  # fmt: skip
    console.print(table)
    if len(plan.runs) > len(shown):
        console.print(f"... and {len(plan.runs) - len(shown):,} more")
    show_notes(console, [*plan.notes, *plan.terms])


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def show_notes(console: Console, notes: Sequence[str]) -> None:
    """Print what a person should know of the comparison."""
    for note in notes:
        Screen(console).named("note", note)


def opening(
    console: Console, plan: SweepPlan, folder: SweepFolder, todo: Sequence[PlannedRun], *, where: str, threads: int
) -> None:
    """Say what runs, where, and how."""
    console.print()
    console.print(Text(f"{plan.name}: {len(plan.runs):,} runs over {', '.join(plan.axes.varied())}", style="bold"))
    Screen(console).named("sweep", str(folder.path))
    waiting = {run.label for run in todo}
    states = [one.state for run in plan.runs if run.label not in waiting and (one := folder.outcome(run.label))]
    settled = "".join(f", {states.count(state):,} {state}" for state in dict.fromkeys(states))
    each = f"each with {threads} thread{'s' if threads > 1 else ''}"
    Screen(console).named("runs", f"{len(todo):,} to do{settled}; {where}, {each}")
    show_notes(console, [*plan.notes, *plan.terms])
