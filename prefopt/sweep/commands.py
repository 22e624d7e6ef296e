"""`prefopt sweep`: plan, build the reference cache once, do every run, and write the report."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from prefopt.errors import Interrupted, Problem, RecipeError, UserError
from prefopt.screen import Screen
from prefopt.sweep.asha import run_under_asha
from prefopt.sweep.caches import cache_builders
from prefopt.sweep.child import start
from prefopt.sweep.estimate import ASK_ABOVE, seconds_per_run
from prefopt.sweep.folder import SweepFolder, cores, unfinished
from prefopt.sweep.local import Slots, run_locally, visible_gpus
from prefopt.sweep.on_ray import cluster, require_ray, run_on_ray
from prefopt.sweep.outcome import MENDABLE, Outcome, outcome_of
from prefopt.sweep.plan import PlannedRun, SweepPlan, load_sweep
from prefopt.sweep.screen import SweepScreen, duration, opening, show_plan


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run; nothing of it changes a result but the threads, which a sweep keeps."""

    processes: int | None = None
    threads: int | None = None
    ray: str | None = None
    """`local`, or the address of a cluster."""
    retry: bool = False
    yes: bool = False


def sweep(recipe: str, overrides: Sequence[str], options: SweepOptions, console: Console) -> bool:
    """Do what is left of a sweep, and report.

    Returns:
        whether every run has ended as it should, and the report is written.

    Raises:
        RecipeError: the sweep cannot be run as it is written.
        Interrupted: Ctrl-C; what runs has saved its state.
    """
    plan, folder = _planned(recipe, overrides, console)
    _refuse_early_stopping_here(plan, options)
    if options.ray is not None:
        require_ray()
    with folder.held(), _sigterm_is_ctrl_c():
        plan = folder.adopt(plan)
        slots = _slots(folder, options)
        todo = unfinished(folder, plan.runs, retry=options.retry)
        opening(console, plan, folder, todo, where=_where(slots, options), threads=slots.threads)
        if len(todo) > ASK_ABOVE and not options.yes:
            _confirm(folder, plan, todo, slots, console)
        with console.status("writing the recipes"):
            folder.write(plan, threads=slots.threads, command=_typed(recipe, overrides, slots.threads, options))
        if todo:
            _do(plan, folder, todo, slots, options, console)
        outcomes = {run.label: folder.outcome(run.label) or Outcome("interrupted") for run in plan.runs}
        reported = _conclude(plan, folder, outcomes, console)
    return reported and all(outcome.state in ("finished", "stopped") for outcome in outcomes.values())


def show_commands(recipe: str, overrides: Sequence[str], options: SweepOptions, console: Console) -> None:
    """Print a sweep as shell commands, for Slurm or any other scheduler; recipes are written, nothing runs."""
    plan, folder = _planned(recipe, overrides, console)
    _refuse_early_stopping_here(plan, SweepOptions())
    with folder.held():
        plan = folder.adopt(plan)
        threads = _slots(folder, options).threads
        folder.write(plan, threads=threads, command=_typed(recipe, overrides, threads, options))
        todo = unfinished(folder, plan.runs, retry=True)
    print("# first, once: the reference is scored for all runs")
    for run in cache_builders(todo):
        print(f"prefopt cache build {shlex.quote(str(folder.recipe(run.label)))}")
    print("# then each of these, in any order, as many at a time as you like; running one again resumes it")
    for run in todo:
        group = "" if run.recipe.tracking.wandb == "off" else f"WANDB_RUN_GROUP={shlex.quote(plan.name)} "
        print(f"{group}OMP_NUM_THREADS={threads} prefopt train {shlex.quote(str(folder.recipe(run.label)))}")
    print("# at the end")
    print(f"prefopt report {shlex.quote(str(folder.path))}")


def preview(recipe: str, overrides: Sequence[str], console: Console) -> None:
    """Print every run of a sweep and what its beta amounts to; nothing is written."""
    plan, folder = _planned(recipe, overrides, console)
    plan = folder.adopt(plan)
    show_plan(console, plan, {run.label: folder.outcome(run.label) for run in plan.runs})


def _planned(recipe: str, overrides: Sequence[str], console: Console) -> tuple[SweepPlan, SweepFolder]:
    with console.status("planning"):
        plan = load_sweep(recipe, overrides)
    return plan, SweepFolder(plan.folder)


def _typed(recipe: str, overrides: Sequence[str], threads: int, options: SweepOptions) -> str:
    """Return the command that repeats a sweep, for the report: with the threads, for results depend on them."""
    words = ["prefopt", "sweep", recipe, *overrides, "--threads", str(threads)]
    words += [] if options.processes is None else ["--processes", str(options.processes)]
    words += [] if options.ray is None else ["--ray", options.ray]
    return shlex.join(words)


def _refuse_early_stopping_here(plan: SweepPlan, options: SweepOptions) -> None:
    if plan.axes.early_stopping is not None and options.ray is None:
        fix = "--ray local, or take early_stopping out: without it every run gets the same budget"
        given = "early_stopping without --ray"
        raise RecipeError(Problem("sweep.early_stopping", "Ray Tune, which compares runs as they go", given, fix))


def _slots(folder: SweepFolder, options: SweepOptions) -> Slots:
    """Divide the machine: GPUs in turn, cores evenly; a sweep that has begun keeps its threads, for results do."""
    gpus = visible_gpus()
    count = options.processes or max(1, len(gpus))
    stored = folder.stored().get("threads")
    if options.threads is not None and stored is not None and options.threads != stored:
        fix = f"--threads {stored}, or another output=FOLDER: on a CPU results depend on threads"
        raise RecipeError(Problem("--threads", f"{stored}, with which this sweep began",
                                  str(options.threads), fix))  # fmt: skip
    return Slots(count, options.threads or stored or max(1, cores() // count), gpus)


def _where(slots: Slots, options: SweepOptions) -> str:
    if options.ray is not None:
        return f"on Ray ({options.ray})"
    gpus = f" on {len(slots.gpus)} GPUs" if slots.gpus else f" on {cores()} cores"
    return (f"{slots.count} at a time" if slots.count > 1 else "one after the other") + gpus


def _confirm(folder: SweepFolder, plan: SweepPlan, todo: Sequence[PlannedRun], slots: Slots, console: Console) -> None:
    """Ask before many runs, with the time that they will take.

    Raises:
        RecipeError: nobody is there to ask.
        Interrupted: the answer was no.
    """
    Screen(console).named("", f"{len(todo):,} runs: watching the first one to say how long they will take")
    folder.write_recipe(todo[0])
    each = seconds_per_run(folder, plan.runs, todo[0], sweep=plan.name, threads=slots.threads)
    if each is None:
        last = folder.outcome(plan.runs[0].label)
        said = f"how long they take could not be found out ({last.reason if last else 'the first one did not begin'})"
    else:
        total = duration(each * len(todo) / slots.count)
        said = f"about {duration(each)} for one, {total} for all with {slots.count} at a time"
    if not sys.stdin.isatty():
        raise RecipeError(Problem("sweep", f"at most {ASK_ABOVE} runs, or --yes", f"{len(todo):,} runs: {said}",
                                  "--yes to go on, or fewer values; --plan lists the runs"))  # fmt: skip
    console.print(Text(f"{len(todo):,} runs: {said}. Go on? [y/N] ", style="bold"), end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Interrupted("nothing more was run; what the first run did is kept")


def build_caches(folder: SweepFolder, runs: Sequence[PlannedRun], threads: int, console: Console) -> None:
    """Score the reference once for all runs, in a process of its own; a failure is said, and runs go on.

    Raises:
        RecipeError: no run could begin, for the same reason.
    """
    builders = cache_builders(runs)
    problems = []
    for number, run in enumerate(builders):
        log = folder.cache_log(number)
        child = start(["cache", "build", str(folder.recipe(run.label))], log, threads=threads)
        try:
            with console.status("scoring the reference, once for all runs"):
                code = child.process.wait()
        except KeyboardInterrupt:
            child.kill()
            child.process.wait()
            raise Interrupted("sweep stopped while the reference was scored; what is scored is kept") from None
        said = child.written()
        if code:
            reason = outcome_of(code, False, said, 0.0).reason
            Screen(console).line(f"the reference cache could not be built: {reason} ({log})", style="red")
            problems += [Problem(str(folder.recipe(run.label)), "a recipe whose reference can be scored", reason,
                                 "correct it; nothing was trained")] if code == MENDABLE else []  # fmt: skip
        else:
            lines = [line for line in said.splitlines() if "completions needed" in line]
            Screen(console).named("reference", lines[-1] if lines else "nothing to score")
    if builders and len(problems) == len(builders):
        raise RecipeError(problems)


def _do(
    plan: SweepPlan, folder: SweepFolder, todo: Sequence[PlannedRun], slots: Slots, options: SweepOptions,
    console: Console,
) -> None:  # fmt: skip
    """Score the reference, then do the runs: here, or on a cluster that has answered before anything is scored."""
    if options.ray is None:
        build_caches(folder, todo, slots.threads, console)
        run_locally(folder, todo, slots, SweepScreen(console, folder, len(todo), slots.count), sweep=plan.name)
        return
    with cluster(options.ray, threads=slots.threads) as at:
        screen = SweepScreen(console, folder, len(todo), at.at_a_time())
        build_caches(folder, todo, slots.threads, console)
        if plan.axes.early_stopping is None:
            run_on_ray(at, folder, todo, screen, sweep=plan.name)
        else:
            run_under_asha(at, folder, todo, screen, plan.axes.early_stopping, sweep=plan.name)


def _conclude(plan: SweepPlan, folder: SweepFolder, outcomes: dict[str, Outcome], console: Console) -> bool:
    """Say what did not finish and why, and write the report of what did; returns whether there is nothing to mend."""
    screen = Screen(console)
    finished = [label for label, outcome in outcomes.items() if outcome.state == "finished"]
    console.print()
    screen.line(f"{len(finished):,} of {len(plan.runs):,} runs finished", style="bold")
    for label, outcome in list(outcomes.items())[:10_000]:
        if outcome.state != "finished":
            screen.named(outcome.state, f"{label}: {outcome.reason} ({folder.log(label)})")
    if any(outcome.state == "failed" for outcome in outcomes.values()):
        screen.line("--retry does failed runs again", style="dim")
    if not finished:
        return True
    from prefopt.report.commands import write_report

    try:
        written = write_report([folder.path], folder.path / "report")
    except UserError as error:
        screen.line(f"the runs are kept, but there is no report of them: {error}", style="red")
        return False
    for line in written.answer:
        screen.named("" if line is not written.answer[0] else "answer", line)
    screen.named("report", str(written.html))
    return True


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """Let a scheduler's SIGTERM save the state of every run, as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
