"""`prefopt check`: what a person would want to have seen before a long run."""

from __future__ import annotations

from rich.console import Console

from prefopt.evaluate import load_gold_reward
from prefopt.invariant import check_step_zero, step_zero
from prefopt.memory import free_memory
from prefopt.models import default_device
from prefopt.policy import load_policy
from prefopt.prepare import prepare, reference_source
from prefopt.probe import probe_group
from prefopt.recipe import Recipe
from prefopt.reference.opening import reference_in_memory
from prefopt.reference.source import OnlineLogps
from prefopt.run import make_planner, plan_run, refuse_misfits
from prefopt.run_folder import conventions
from prefopt.screen import Screen

CHECKED_GROUPS = 8
"""Groups whose step-0 log-ratios are computed."""


def check_recipe(recipe: Recipe, console: Console) -> None:
    """Show the data's edges and counts, the plan, and the step-0 log-ratios; trains and writes nothing.

    Raises:
        UserError: what would have stopped the run.
    """
    screen = Screen(console)
    prepared = prepare(recipe, quiet=not console.is_terminal)
    recipe = prepared.recipe
    screen.line(f"{recipe.name}: {prepared.loss.name}", style="bold")
    for name, text in conventions(prepared.loss).items():
        screen.named(name, text)
    screen.data(prepared)
    dataset = prepared.data.train
    load_gold_reward(recipe.eval.gold_reward)
    refuse_misfits(recipe, prepared)
    policy, device = load_policy(recipe, probe_group(dataset)), default_device()
    plan = plan_run(prepared, policy, device, free=free_memory(device))
    policy.settle(recomputed=plan.gradient_checkpointing, compiled=recipe.train.compile)
    planner = make_planner(prepared, token_budget=plan.token_budget)
    total = planner.total_steps(epochs=recipe.train.epochs, max_steps=recipe.train.max_steps)
    first = planner.step(0)
    lists = f"{first.units} lists of " if prepared.loss.needs.lists else ""
    screen.named(
        "step",
        f"{lists}{first.comparisons} comparisons, {first.computed_tokens:,} computed tokens, micro-batches: "
        f"{len(first.micro_batches)}",
    )
    few = dataset.select(range(min(CHECKED_GROUPS, len(dataset))))
    resolved = {"token_budget": plan.token_budget, "gradient_checkpointing": plan.gradient_checkpointing,
                "memory": plan.reason, "fits": plan.fits, "device": str(device)}  # fmt: skip
    screen.plan(policy, resolved, total, 0, recipe.train.precision)
    with reference_in_memory(reference_source(recipe), recipe, probe_group(dataset)) as reference:
        online = OnlineLogps(reference, precision=recipe.train.precision)
        zero = step_zero(policy.scorer, few, online, precision=recipe.train.precision)
    screen.named("step 0", check_step_zero(recipe, zero))
    screen.line("nothing stands in the way of this run", style="green")
