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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from prefopt.batching import Step, StepPlanner, make_batch
from prefopt.checkpoint import TrainState, latest_state, load_checkpoint, save_checkpoint
from prefopt.errors import Interrupted, ModelError, Problem
from prefopt.evaluate import (
    Evaluator,
    evaluate_comparisons,
    evaluate_samples,
    make_evaluator,
    mean_gold_reward,
    reference_samples,
    write_samples,
)
from prefopt.forward import Scorer, autocast
from prefopt.invariant import check_step_zero, step_zero
from prefopt.layout import probe_group
from prefopt.objective import MetricSums, add_comparison_metrics, comparison_losses
from prefopt.optimizers import make_optimizer
from prefopt.policy import Policy, load_policy
from prefopt.prepare import Prepared, prepare, resolve_token_budget
from prefopt.recipe import Recipe
from prefopt.reference.running import RunReference, open_reference
from prefopt.result import Finish, finish_run
from prefopt.run_folder import RunFolder, claim_folder, environment, write_json
from prefopt.sampling import Sample
from prefopt.schedule import is_due, learning_rate_at
from prefopt.screen import Screen
from prefopt.tracking import Tracker
from prefopt_losses import LossError

STEP_ZERO, REFERENCE_SAMPLES = "step_zero.json", "reference_samples.jsonl"


@dataclass
class Run:
    """Everything one run holds while it trains; the loop's only state."""

    recipe: Recipe
    folder: Path
    prepared: Prepared
    accelerator: Accelerator
    policy: Policy
    module: torch.nn.Module
    """The scorer as accelerate wrapped it."""
    optimizer: torch.optim.Optimizer
    planner: StepPlanner
    reference: RunReference
    evaluator: Evaluator | None
    tracker: Tracker | None
    screen: Screen
    total: int
    """Optimizer steps of the whole run."""
    resolved: dict[str, Any]
    """What `auto` came to."""
    state: TrainState = field(default_factory=lambda: TrainState(0))
    stopping: bool = False
    """Set by Ctrl-C: the current step is the last."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluated_at: int = -1
    samples: list[Sample] = field(default_factory=list)
    reference_samples: list[Sample] = field(default_factory=list)
    last_loss: float = math.nan
    comparisons: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def scorer(self) -> Scorer:
        """The policy itself, unwrapped."""
        return self.policy.scorer


def run_training(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Train as the recipe says, from the start or from where an earlier run of it stopped.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: something a person can mend.
        Interrupted: Ctrl-C; the state is saved.
    """
    accelerator = Accelerator(mixed_precision="no")  # the scorer's own autocast, equal for policy and reference
    screen = Screen(console if accelerator.is_main_process else Console(quiet=True))
    with accelerator.main_process_first():
        folder = claim_folder(recipe)
    screen.opening(recipe, folder)
    if folder.result is not None:
        screen.already_finished(folder)
        return folder.result
    with accelerator.main_process_first():  # the others find data and log-probs in the caches
        prepared = prepare(recipe, quiet=not screen.console.is_terminal)
        reference = open_reference(prepared, screen.console)
    screen.data(prepared)
    screen.reference(reference)
    run = _set_up(recipe, folder, prepared, reference, accelerator, screen)
    with _stop_on_interrupt(run):
        zero = _look_before(run)
        _loop(run)
    return finish_run(
        Finish(
            writes=accelerator.is_main_process,
            recipe=recipe,
            folder=run.folder,
            prepared=prepared,
            policy=run.policy,
            reference=reference,
            steps=run.state.step,
            resolved=run.resolved,
            step_zero=zero,
            evaluation=run.evaluation,
            samples=run.samples,
            reference_samples=run.reference_samples,
            final_loss=run.last_loss,
            comparisons=run.comparisons,
            tokens=run.tokens,
            seconds=run.seconds,
            peak_memory=peak_memory(),
        ),
        screen,
    )


def _set_up(
    recipe: Recipe,
    folder: RunFolder,
    prepared: Prepared,
    reference: RunReference,
    accelerator: Accelerator,
    screen: Screen,
) -> Run:
    """Load the policy, its optimizer and the last checkpoint, if there is one."""
    newest = latest_state(folder.path)
    resolved = newest[2] if newest else _resolve(prepared.recipe, accelerator.device)
    policy = load_policy(prepared.recipe, probe_group(prepared.data.train), token_budget=resolved["token_budget"])
    optimizer = make_optimizer(policy.scorer, recipe.train)
    if newest:
        load_checkpoint(newest[0], policy.scorer, optimizer)
    reference.use_policy(policy.scorer)
    planner = StepPlanner(
        prepared.data.train,
        batch_size=recipe.train.batch_size,
        token_budget=resolved["token_budget"],
        seed=recipe.seed,
        rejected=prepared.loss.needs.rejected or not prepared.data.train.paired,
    )
    total = planner.total_steps(epochs=recipe.train.epochs, max_steps=recipe.train.max_steps)
    state = newest[1] if newest else TrainState(0)
    module, optimizer = accelerator.prepare(policy.scorer, optimizer)
    resolved["gradient_checkpointing"] = policy.checkpointing
    resolved["layout"] = policy.layout.layout
    tracker = None
    if accelerator.is_main_process:
        tracker = Tracker(folder.path, recipe, resumed_at=state.step if newest else -1, resolved=resolved)
        write_json(folder.path / "environment.json", environment() | {"processes": accelerator.num_processes})
    run = Run(
        recipe, folder.path, prepared, accelerator, policy, module, optimizer, planner, reference,
        evaluator=make_evaluator(prepared, reference, token_budget=resolved["token_budget"]),
        tracker=tracker,
        screen=screen, total=total, resolved=resolved, state=state,
    )  # fmt: skip
    screen.plan(policy, resolved, total, state.step)
    return run


def _resolve(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    return {
        "token_budget": resolve_token_budget(recipe.train.token_budget, device),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _look_before(run: Run) -> dict[str, Any] | None:
    """Hold the untouched policy against the reference and let the reference write; returns the step-0 figures."""
    logps = run.reference.train or run.reference.eval
    dataset = run.prepared.data.train if run.reference.train else run.prepared.data.eval
    file = run.folder / STEP_ZERO
    if run.state.step == 0 and logps is not None and dataset is not None:
        zero = step_zero(run.scorer, dataset, logps, precision=run.recipe.train.precision)
        run.screen.named("step 0", check_step_zero(run.recipe, zero))
        if run.accelerator.is_main_process:
            write_json(file, zero.as_dict())
    if run.evaluator is not None:
        with run.accelerator.main_process_first():
            run.reference_samples = reference_samples(run.evaluator, run.folder / REFERENCE_SAMPLES)
        run.screen.reference_samples(run.reference_samples, run.recipe.eval.show)
        if run.state.step in (0, run.total):
            _evaluate(run)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _loop(run: Run) -> None:
    """Take every remaining step; look, save and log when they are due."""
    recipe, total = run.recipe, run.total
    last_comparison = None
    if recipe.train.max_steps is None:
        last_comparison = round((recipe.train.epochs or 0) * run.planner.comparisons)
    sums = MetricSums(run.accelerator.device)
    with run.screen.progress(total, run.state.step) as advance:
        for number in range(run.state.step, total):
            began = time.perf_counter()
            rate = learning_rate_at(
                number, total=total, peak=recipe.train.learning_rate, warmup=recipe.train.warmup,
                schedule=recipe.train.schedule,
            )  # fmt: skip
            plan = run.planner.step(number, last_comparison=last_comparison)
            norm = _optimizer_step(run, plan, rate, sums)
            step = number + 1
            run.state = TrainState(step, run.state.best)
            run.comparisons += plan.comparisons
            run.tokens += plan.computed_tokens
            if step % recipe.tracking.every == 0 or step == total or run.stopping:
                _log(run, sums, rate, norm)
                sums = MetricSums(run.accelerator.device)
            run.seconds += time.perf_counter() - began
            advance(run.last_loss)
            if is_due(step, recipe.eval.every, total) or step == total:
                _evaluate(run)
            if is_due(step, recipe.checkpoint.every, total) or step == total or run.stopping:
                _save(run)
            if run.stopping and step < total:
                raise Interrupted(f"stopped after step {step} of {total}; the same command goes on from there")


def _optimizer_step(run: Run, plan: Step, rate: float, sums: MetricSums) -> torch.Tensor:
    """Micro-batches of one step, normalised by its global number of comparisons; then clip and move.

    Returns:
        The gradient's norm before clipping, on the device.
    """
    accelerator, recipe, loss = run.accelerator, run.recipe, run.prepared.loss
    world = accelerator.num_processes
    # Every process runs the same number of micro-batches (collectives match); a spare one counts nothing.
    rounds = math.ceil(len(plan.micro_batches) / world)
    for number in range(rounds):
        place = number * world + accelerator.process_index
        spare = place >= len(plan.micro_batches)
        micro = plan.micro_batches[0 if spare else place]
        groups = [run.prepared.data.train[part.group] for part in micro]
        batch = make_batch(groups, micro, rejected=run.planner.rejected).to(accelerator.device)
        with nullcontext() if number == rounds - 1 else accelerator.no_sync(run.module):
            with autocast(accelerator.device, recipe.train.precision):
                policy = run.module(batch)
            reference = run.reference.train(batch) if run.reference.train else None
            try:
                losses = comparison_losses(
                    loss, batch, policy, reference,
                    tokens_per_example=plan.chosen_tokens / plan.comparisons,
                    check=accelerator.device.type == "cpu",
                )  # fmt: skip
            except LossError as error:
                raise _not_finite(run, str(error)) from error
            share = 0.0 if spare else world / plan.comparisons  # data-parallel wrappers average over processes
            accelerator.backward(losses.sum() * share)
        if not spare:
            add_comparison_metrics(sums, loss, batch, policy, reference, losses)
    norm = _clip(run)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def _clip(run: Run) -> torch.Tensor:
    limit = run.recipe.train.max_grad_norm
    parameters = [parameter for parameter in run.module.parameters() if parameter.requires_grad]
    norm = run.accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    return torch.as_tensor(norm)


def _log(run: Run, sums: MetricSums, rate: float, norm: torch.Tensor) -> None:
    """Read the metrics off the device, write them, and stop a run whose loss is no number."""
    accelerator = run.accelerator
    metrics = sums.means(accelerator.reduce if accelerator.num_processes > 1 else None)
    metrics |= {"learning_rate": rate, "grad_norm": float(norm)}
    run.last_loss = metrics["loss"]
    if run.tracker is not None:
        run.tracker.log(run.state.step, metrics)
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise _not_finite(run, f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")


def _not_finite(run: Run, given: str) -> ModelError:
    return ModelError(
        Problem(
            f"step {run.state.step}",
            "a finite loss and gradient",
            given,
            "lower train.learning_rate, or look at the rows of this step; the last checkpoint is kept in "
            f"{run.folder / 'checkpoints'}",
        )
    )


def _evaluate(run: Run) -> None:
    """Measure the policy on held-out data, log it and show it."""
    evaluator = run.evaluator
    if evaluator is None:
        return
    measures = evaluate_comparisons(evaluator, run.scorer)
    if evaluator.prompts:
        run.samples = write_samples(evaluator, run.scorer)
        measures |= evaluate_samples(evaluator, run.scorer, run.samples)
        if "gold_reward" in measures:
            gold = {"reference": mean_gold_reward(run.reference_samples), "policy": measures["gold_reward"]}
            measures["gold_reward"] = gold
    run.evaluation, run.evaluated_at = measures, run.state.step
    if run.tracker is not None:
        run.tracker.log(run.state.step, _flat_numbers(measures))
    run.screen.evaluation(run.state.step, measures)


def _flat_numbers(measures: dict[str, Any], prefix: str = "eval/") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in measures.items():
        if isinstance(value, dict):
            flat |= _flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def _save(run: Run) -> None:
    """Write a checkpoint; remember whether it is the best so far."""
    metric = run.recipe.checkpoint.best
    if metric is not None and run.evaluated_at == run.state.step:
        run.state = TrainState(run.state.step, _better(run, metric))
    if run.accelerator.is_main_process:
        save_checkpoint(run.folder, run.scorer, run.optimizer, run.state, run.resolved, keep=run.recipe.checkpoint.keep)
    run.accelerator.wait_for_everyone()


def _better(run: Run, metric: str) -> tuple[float, int] | None:
    value: Any = run.evaluation
    for name in metric.removeprefix("eval.").split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, int | float):
        raise ModelError(
            Problem("checkpoint.best", f"one of {', '.join(f'eval.{name}' for name in run.evaluation)}", metric)
        )
    better = value if metric.split(".")[-1] in ("loss", "kl") else -value
    if run.state.best is None:
        return better, run.state.step
    return min(run.state.best, (better, run.state.step))


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
        if run.tracker is not None:
            run.tracker.close()


def peak_memory() -> int:
    """Peak bytes: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
