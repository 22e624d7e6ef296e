"""The one training loop.

    recipe -> groups -> batch -> log-probs -> loss -> step -> files

`run_training` sets the stage, `_loop` is the loop, `_optimizer_step` is one step of it.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console

from prefopt.acceleration import gave_up, saying_what_cannot_be_compiled
from prefopt.checkpoint import checkpoint_steps, save_checkpoint
from prefopt.errors import Interrupted
from prefopt.evaluate import measure, reference_samples
from prefopt.gradients import accumulate_gradients, looks_at_once, not_finite
from prefopt.invariant import check_step_zero, step_zero
from prefopt.memory import Trimmer, return_memory
from prefopt.objective import MetricSums
from prefopt.planning import Step
from prefopt.prepare import prepare
from prefopt.process import settle_process
from prefopt.recipe import Recipe
from prefopt.recipe.measures import BETTER
from prefopt.reference.running import open_reference
from prefopt.result import finish_run
from prefopt.run import Run, claim_together, make_accelerator, refuse_misfits, set_up
from prefopt.run_folder import REFERENCE_SAMPLES, STEP_ZERO, RunFolder, write_json
from prefopt.schedule import is_due, learning_rate_at
from prefopt.screen import Screen
from prefopt_losses import LossError


def run_training(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Train as the recipe says, from the start or from where an earlier run of it stopped.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: something a person can mend.
        Interrupted: Ctrl-C; the state is saved.
    """
    settle_process()
    accelerator = make_accelerator()
    screen = Screen(console if accelerator.is_main_process else Console(quiet=True))
    folder = claim_together(recipe, accelerator)
    try:
        screen.opening(recipe, folder)
        if folder.result is not None:
            screen.already_finished(folder)
            return folder.result
        with accelerator.main_process_first():  # the others find the data in the cache
            prepared = prepare(recipe, quiet=not screen.console.is_terminal)
            screen.data(prepared)
            refuse_misfits(recipe, prepared)
        reference = open_reference(prepared, screen.console)  # all of them score what the cache lacks
        screen.reference(reference)
        if reference.remark:
            screen.named("", reference.remark)
        run = set_up(recipe, folder, prepared, reference, accelerator, screen)
        _put_moving_reference_back(run)
        return _run(run, folder)
    finally:
        folder.release()


def _run(run: Run, folder: RunFolder) -> dict[str, Any]:
    """Look, train, and write what outlives the process."""
    try:
        with _stop_on_interrupt(run), saying_what_cannot_be_compiled() if run.recipe.train.compile else nullcontext():
            zero = _look_before(run)
            _loop(run)
    finally:
        if run.tracker is not None:
            run.tracker.close()
    if run.recipe.train.compile and (said := gave_up()):
        run.screen.line(said, style="yellow")
    run.reference.release()
    return finish_run(run, step_zero=zero, peak_memory=peak_memory())


def _put_moving_reference_back(run: Run) -> None:
    """Give a resumed run the reference of its checkpoint, and remove what a kill left beyond it."""
    moving = run.reference.moving
    if moving is None:
        return
    moving.load(run.folder, run.state.step)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        moving.forget(run.folder, checkpoint_steps(run.folder))


def _look_before(run: Run) -> dict[str, Any] | None:
    """Hold the untouched policy against the reference and let the reference write; returns the step-0 figures."""
    file = run.folder / STEP_ZERO
    read = run.reference.first_read()
    if run.state.step == 0 and read is not None:
        zero = step_zero(run.scorer, *read, precision=run.recipe.train.precision)
        run.screen.named("step 0", check_step_zero(run.recipe, zero, run.reference.certificate))
        if run.accelerator.is_main_process:
            write_json(file, zero.as_dict())
    if run.evaluator is not None:
        with run.accelerator.main_process_first():
            run.reference_samples = reference_samples(run.evaluator, run.folder / REFERENCE_SAMPLES)
        if run.state.step == 0:
            run.screen.reference_samples(run.reference_samples, run.recipe.eval.show)
        if run.state.step in (0, run.total):
            _evaluate(run)
    return_memory()
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _loop(run: Run) -> None:
    """Take every remaining step; look, save and log when they are due."""
    recipe, total = run.recipe, run.total
    sums, trimmer = MetricSums(run.accelerator.device), Trimmer(run.accelerator.device)
    with run.screen.progress(total, run.state.step) as advance:
        for number in range(run.state.step, total):
            began = time.perf_counter()
            plan = run.planner.step(number, last_comparison=run.last_comparison)
            rate = learning_rate_at(
                number, total=total, peak=recipe.train.learning_rate, warmup=recipe.train.warmup,
                schedule=recipe.train.schedule,
            )  # fmt: skip
            norm = _optimizer_step(run, plan, rate, sums)
            step, stopping = number + 1, _anyone_stops(run)
            if run.reference.moving is not None:
                run.reference.moving.after_step(step)
            if step % recipe.tracking.every == 0 or step == total or stopping:
                _log(run, step, sums, rate, norm)
                sums = MetricSums(run.accelerator.device)
            run.advance(
                step=step,
                comparisons=run.state.comparisons + plan.comparisons,
                tokens=run.state.tokens + plan.computed_tokens,
                seconds=run.state.seconds + time.perf_counter() - began,
            )
            trimmer.after_step()
            advance(run.state.loss or math.nan)
            improved = False
            if is_due(step, recipe.eval.every, total) or step == total:
                improved = _evaluate(run)
            if improved or is_due(step, recipe.checkpoint.every, total) or step == total or stopping:
                _save(run)
            if stopping and step < total:
                raise Interrupted(f"stopped after step {step} of {total}; the same command goes on from there")


def _optimizer_step(run: Run, plan: Step, rate: float, sums: MetricSums) -> torch.Tensor:
    """The step's gradient from its micro-batches; then clip and move.

    Returns:
        The norm of the policy's gradient before clipping, on the device.
    """
    accelerator, recipe = run.accelerator, run.recipe
    accumulate_gradients(run, plan, sums)
    limit = recipe.train.max_grad_norm
    norm = torch.as_tensor(accelerator.clip_grad_norm_(_clipped(run), math.inf if limit is None else limit))
    run.finite &= torch.isfinite(norm)
    if looks_at_once(run):  # elsewhere metrics and saves look
        _require_finite(run)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("faster", 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.scorer.kept is not None:
        run.scorer.kept.reset()
    return norm


def _clipped(run: Run) -> list[torch.nn.Parameter]:
    """Return the policy's trained parameters: a value head's gradient must not shrink theirs."""
    head = run.scorer.value_head
    apart = set() if head is None else set(map(id, head.parameters()))
    return [each for each in run.module.parameters() if each.requires_grad and id(each) not in apart]


def _log(run: Run, step: int, sums: MetricSums, rate: float, norm: torch.Tensor) -> None:
    """Read the metrics off the device and write them."""
    accelerator = run.accelerator
    metrics = sums.means(accelerator.reduce if accelerator.num_processes > 1 else None)
    metrics |= {"learning_rate": rate, "grad_norm": float(norm)}
    run.advance(loss=metrics["loss"])
    if run.tracker is not None:
        run.tracker.log(step, metrics)
    _require_finite(run)


def _require_finite(run: Run) -> None:
    if not bool(run.finite):
        raise not_finite(run, "a gradient that is not finite")


def _evaluate(run: Run) -> bool:
    """Measure the policy on held-out data, log it and show it; returns whether it is the best so far."""
    if run.evaluator is None:
        return False
    carried = run.loss_state if run.state.step else None  # before the first step nothing has been seen of the data
    try:
        run.evaluation, run.samples = measure(
            run.evaluator, run.scorer, run.reference_samples, carried, rows=run.held_out
        )
    except LossError as error:
        raise not_finite(run, f"{error} (on held-out data)") from error
    if run.tracker is not None:
        run.tracker.log(run.state.step, _flat_numbers(run.evaluation))
    reference = run.prepared.loss.ranking_term.score.reference
    run.screen.evaluation(run.state.step, run.evaluation, reference=reference)
    metric = run.recipe.checkpoint.best
    if metric is None or run.state.step == 0:  # the untouched policy has no displacement and no KL to beat
        return False
    value: Any = run.evaluation
    for name in metric.split(".")[1:]:
        value = value[name]
    best = run.state.best
    if best is not None and BETTER[metric](best[0], value) == best[0]:
        return False
    run.advance(best=(float(value), run.state.step))
    return True


def _flat_numbers(measures: dict[str, Any], prefix: str = "eval/") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in measures.items():
        if isinstance(value, dict):
            flat |= _flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def _save(run: Run) -> None:
    """Write a checkpoint of weights that are known to be finite."""
    _require_finite(run)
    run.settle()
    if run.accelerator.is_main_process:
        keep, moving = run.recipe.checkpoint.keep, run.reference.moving
        if moving is not None:  # before the checkpoint that needs it
            moving.save(run.folder, run.state.step)
        save_checkpoint(run.folder, run.scorer, run.optimizer, run.state, run.resolved, keep=keep)
        if moving is not None:
            moving.forget(run.folder, checkpoint_steps(run.folder))
    run.accelerator.wait_for_everyone()


def _anyone_stops(run: Run) -> bool:
    """Whether Ctrl-C reached any process: they must all stop after the same step."""
    if run.accelerator.num_processes == 1:
        return run.stopping
    flag = torch.tensor(float(run.stopping), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag) > 0)


@contextmanager
def _stop_on_interrupt(run: Run) -> Iterator[None]:
    """Turn the first Ctrl-C into a request to stop after the step; the second one stops at once."""

    def ask(*_: Any) -> None:
        run.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.screen.line("stopping after this step; its state is saved (Ctrl-C again stops at once)")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def peak_memory() -> int:
    """Peak bytes: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
