"""One run while it trains: everything it holds, and how it comes to hold it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from prefopt.checkpoint import TrainState, latest_state, load_checkpoint
from prefopt.errors import Problem, RecipeError
from prefopt.evaluate import Evaluator, make_evaluator
from prefopt.feed import Feed
from prefopt.forward import Scorer
from prefopt.held_out import HeldOut
from prefopt.kept_gradients import keeps_gradients
from prefopt.memory import free_memory
from prefopt.memory_plan import MemoryPlan, demand_of, plan_memory, rows_of, weights_bytes
from prefopt.optimizers import make_optimizer
from prefopt.planning import StepPlanner
from prefopt.policy import Policy, load_policy
from prefopt.prepare import Prepared, reference_source
from prefopt.probe import probe_group
from prefopt.recipe import Recipe
from prefopt.recipe.measures import BETTER
from prefopt.reference.running import RunReference
from prefopt.run_folder import RunFolder, claim_folder, environment, write_json
from prefopt.sampling import Sample
from prefopt.schedule import steps_of
from prefopt.screen import Screen
from prefopt.tracking import Tracker


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
    feed: Feed
    """The training data on their way into the loss."""
    reference: RunReference
    evaluator: Evaluator | None
    tracker: Tracker | None
    """None in every process but the first."""
    screen: Screen
    total: int
    """Optimizer steps of the whole run."""
    resolved: dict[str, Any]
    """What `auto` came to."""
    state: TrainState
    stopping: bool = False
    """Set by Ctrl-C in this process: the current step is the last."""
    finite: torch.Tensor = field(default_factory=lambda: torch.tensor(True))
    """Whether every gradient so far was finite; on the device."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    held_out: list[HeldOut] = field(default_factory=list)
    """Each held-out comparison, as last measured."""
    samples: list[Sample] = field(default_factory=list)
    reference_samples: list[Sample] = field(default_factory=list)
    _carried: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scorer(self) -> Scorer:
        """The policy itself, unwrapped."""
        return self.policy.scorer

    @property
    def last_comparison(self) -> int | None:
        """Where the stream of comparisons ends; None where a number of steps ends the run."""
        if self.recipe.train.max_steps is not None:
            return None
        return self.planner.comparisons_in(self.recipe.train.epochs or 0)

    @property
    def loss_state(self) -> dict[str, torch.Tensor]:
        """Numbers that the loss carries from step to step; on the device, for to read them would be to wait for it."""
        if not self._carried:
            start = self.state.loss_state
            self._carried = {name: torch.tensor(value, dtype=torch.float64) for name, value in start.items()}
        return self._carried

    @loss_state.setter
    def loss_state(self, state: dict[str, torch.Tensor]) -> None:
        self._carried = {name: value.double() for name, value in state.items()}

    def settle(self) -> None:
        """Read what the loss carries off the device into the state, which a checkpoint stores."""
        self.advance(loss_state={name: float(value) for name, value in self.loss_state.items()})

    def advance(self, **changes: Any) -> None:
        """Move the state on."""
        self.state = replace(self.state, **changes)


def make_accelerator() -> Accelerator:
    """Return an accelerator that neither autocasts nor divides: the scorer and the step do both themselves.

    Raises:
        RecipeError: the launcher started several processes that do not know of each other.
    """
    single = GradientAccumulationPlugin(num_steps=1)  # given as a plug-in, no environment variable overrides it
    # Other processes wait while the first one tokenizes and scores the reference: hours for a large model.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))
    _refuse_context_parallelism(os.environ)
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_plugin=single, kwargs_handlers=[patient])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RecipeError(
            Problem("processes", f"{launched} processes that form one group, as WORLD_SIZE says",
                    f"accelerate sees {accelerator.num_processes}",
                    "on a CPU, launch with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m prefopt train ...")
        )  # fmt: skip
    return accelerator


def _refuse_context_parallelism(launched: Mapping[str, str]) -> None:
    """Raise RecipeError where a launcher wants rows cut over processes: accelerate drops every mask then.

    Its variables are read before accelerate does, which would ask for shards first, and for shards alone.
    """
    given = (launched.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") for name in ("CP", "SP"))
    size = max(int(one) if one.isdecimal() else 1 for one in given)
    if launched.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true" and size > 1:
        raise RecipeError(
            Problem("processes", "whole rows in every process: context parallelism replaces all masks by plain "
                    "causality, and completions of one prompt would read each other", f"{size} processes for a row",
                    "take context and sequence parallelism out of accelerate's parallelism_config; shard data instead")
        )  # fmt: skip


def claim_together(recipe: Recipe, accelerator: Accelerator) -> RunFolder:
    """Claim the run folder in the first process and tell the others which one it is."""
    if accelerator.num_processes == 1:
        return claim_folder(recipe)
    claimed: list[Any] = [None]
    if accelerator.is_main_process:
        folder = claim_folder(recipe)
        broadcast_object_list([(folder.path, folder.note, folder.result)])
        return folder
    broadcast_object_list(claimed)
    return RunFolder(*claimed[0])


def set_up(
    recipe: Recipe,
    folder: RunFolder,
    prepared: Prepared,
    reference: RunReference,
    accelerator: Accelerator,
    screen: Screen,
) -> Run:
    """Load the policy and its optimizer, and the last checkpoint where there is one.

    Raises:
        RecipeError, ModelError: the parts do not fit together.
    """
    newest = latest_state(folder.path)
    policy = load_policy(prepared.recipe, probe_group(prepared.data.train, prepared.data.eval))
    resolved = newest[2] if newest else _resolve(prepared, policy, accelerator)
    policy.settle(recomputed=resolved["gradient_checkpointing"], compiled=recipe.train.compile)
    budget = resolved["token_budget"]
    planner = make_planner(prepared, token_budget=budget)
    total = planner.total_steps(epochs=recipe.train.epochs, max_steps=recipe.train.max_steps)
    if prepared.learns_values:
        policy.scorer.learn_values()
    optimizer = make_optimizer(policy.scorer, recipe.train)
    start = {name: float(value) for name, value in prepared.loss.initial_state().items()}
    state = newest[1] if newest else TrainState(loss_state=start)
    torch.manual_seed(recipe.seed + accelerator.process_index + 1_000_003 * state.step)
    if newest:
        load_checkpoint(newest[0], policy.scorer, optimizer, random_state=accelerator.is_main_process)
    reference.use_policy(policy.scorer)
    evaluator = make_evaluator(prepared, reference, token_budget=budget)
    module, optimizer = accelerator.prepare(policy.scorer, optimizer)
    alone = accelerator.distributed_type == DistributedType.NO  # one process in a group is wrapped as well
    if alone and keeps_gradients(device=accelerator.device.type, processes=accelerator.num_processes):
        policy.scorer.keep_gradients()
    resolved |= {"layout": policy.layout.layout, "attention": policy.layout.backend}
    tracker = None
    if accelerator.is_main_process:
        tracker = Tracker(folder.path, recipe, resumed_at=state.step if newest else -1, resolved=resolved)
        write_json(
            folder.path / "environment.json", environment() | {"processes": accelerator.num_processes, "steps": total}
        )
    screen.plan(policy, resolved, total, state.step, recipe.train.precision)
    if recipe.train.optimizer.name.startswith("paged") and accelerator.device.type == "cpu":
        screen.line("paged_adamw_8bit: on a CPU there is nowhere to move moments to; it is adamw_8bit here")
    return Run(
        recipe, folder.path, prepared, accelerator, policy, module, optimizer, planner,
        reference.feed("train"), reference, evaluator,
        tracker, screen, total, resolved, state, finite=torch.tensor(True, device=accelerator.device),
    )  # fmt: skip


def make_planner(prepared: Prepared, *, token_budget: int) -> StepPlanner:
    """Return the planner of a recipe's steps, which computes what the loss reads and nothing else."""
    recipe, dataset, needs = prepared.recipe, prepared.data.train, prepared.loss.needs
    return StepPlanner(
        dataset,
        batch_size=recipe.train.batch_size,
        token_budget=token_budget,
        seed=recipe.seed,
        rejected=needs.rejected or not dataset.paired,
        gold=needs.gold,
        unit="list" if needs.lists else "comparison",
        minimum=needs.minimum_batch,
    )


def plan_run(prepared: Prepared, policy: Policy, device: torch.device, *, free: int, processes: int = 1) -> MemoryPlan:
    """Decide what `auto` means for a loaded policy: tokens per micro-batch, and whether activations are recomputed."""
    recipe = prepared.recipe
    planner = make_planner(prepared, token_budget=2**62)
    rows = rows_of(planner, planner.total_steps(epochs=recipe.train.epochs, max_steps=recipe.train.max_steps))
    demand = demand_of(
        recipe,
        policy.scorer,
        policy.scorer.language_model,
        rows,
        device=device.type,
        shared=policy.layout.layout == "shared",
        backend=policy.layout.backend,
        processes=processes,
        second_model=_references_beside(prepared) * weights_bytes(reference_source(recipe)),
        # The KL of whole distributions has a gradient of the head of its own, which autograd adds.
        kept=keeps_gradients(device=device.type, processes=processes) and not prepared.loss.needs.sequential_kl,
    )
    recomputable = getattr(policy.scorer.language_model, "supports_gradient_checkpointing", False)
    return plan_memory(
        recipe, demand, rows, free=free, device=device.type, processes=processes, recomputable=recomputable
    )


def _references_beside(prepared: Prepared) -> int:
    """Number of models that stay in memory beside the policy: references that are not its base."""
    recipe = prepared.recipe
    same = recipe.reference.quantization == recipe.model.quantization
    on_base = recipe.adapter is not None and recipe.reference.model is None and same
    return (not prepared.cached and not on_base) + (recipe.reference.sync is not None and recipe.adapter is None)


def _resolve(prepared: Prepared, policy: Policy, accelerator: Accelerator) -> dict[str, Any]:
    """Return what `auto` comes to: the same in every process, whose memory may differ."""
    device, processes = accelerator.device, accelerator.num_processes
    free = free_memory(device) // (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1)
    if processes > 1:
        free = min(gather_object([free]))
    plan = plan_run(prepared, policy, device, free=free, processes=processes)
    return {
        "token_budget": plan.token_budget,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "memory": plan.reason,
        "fits": plan.fits,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def refuse_misfits(recipe: Recipe, prepared: Prepared) -> None:
    """Raise RecipeError with every key that the data and the length of the run make impossible."""
    planner = make_planner(prepared, token_budget=1)  # no budget changes the number of steps
    total = planner.total_steps(epochs=recipe.train.epochs, max_steps=recipe.train.max_steps)
    problems = [*_unknown_best(recipe, prepared), *_endless_warmup(recipe, total), *_resting_reference(recipe, total)]
    if problems:
        raise RecipeError(problems)


def _unknown_best(recipe: Recipe, prepared: Prepared) -> Iterator[Problem]:
    best = recipe.checkpoint.best
    sampled = prepared.data.eval is not None and recipe.eval.samples > 0
    found: tuple[str, str] | None = None
    if best is None:
        return
    if best not in BETTER:
        found = ("one of " + ", ".join(BETTER), best)
    elif prepared.data.eval is None:
        found = ("held-out data to measure it on", "none: set data.eval or data.eval_fraction")
    elif "gold" in best and (recipe.eval.gold_reward is None or not sampled):
        found = ("a gold reward and samples to judge", "set eval.gold_reward and eval.samples")
    elif best == "eval.kl" and not sampled:
        found = ("samples to measure it on", "eval.samples is 0")
    elif best in ("eval.accuracy", "eval.margin", "eval.displacement") and not prepared.data.eval.paired:
        found = ("eval.loss or eval.kl: unpaired data have no margins", best)
    if found:
        yield Problem("checkpoint.best", *found, "name another metric, or checkpoint.best=null")


def _endless_warmup(recipe: Recipe, total: int) -> Iterator[Problem]:
    warmup = steps_of(recipe.train.warmup, total)
    if warmup > total:
        fix = "train.warmup=0.1 is a tenth of the run; with this one the peak learning rate is never reached"
        yield Problem("train.warmup", f"at most the {total} steps of the run", f"{warmup} steps", fix)


def _resting_reference(recipe: Recipe, total: int) -> Iterator[Problem]:
    sync = recipe.reference.sync
    if sync is not None and sync.every > total:
        expected = f"at most the {total} steps of the run: the reference would never move"
        fix = "lower reference.sync.every, or remove reference.sync"
        yield Problem("reference.sync.every", expected, f"{sync.every} steps", fix)
