"""`prefopt eval RUN`: the measures of a finished run's model, computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prefopt.checkpoint import latest_state, load_value_head
from prefopt.errors import DataError, ModelError, Problem
from prefopt.evaluate import make_evaluator, measure, reference_samples
from prefopt.forward import Scorer
from prefopt.layout import settle_layout
from prefopt.models import ModelSource, default_device, load_model
from prefopt.prepare import Prepared, policy_source, prepare, resolve_token_budget
from prefopt.probe import probe_group
from prefopt.quantization import ready_for_peft
from prefopt.recipe import Recipe, load_recipe
from prefopt.reference.running import open_reference
from prefopt.run_folder import RECIPE, REFERENCE_SAMPLES, write_json
from prefopt.screen import Screen


def evaluate_run(folder: Path, console: Console) -> dict[str, Any]:
    """Evaluate the final model of a run on its held-out data; also written to ``evaluation.json``.

    Raises:
        ModelError: the run has no final model.
        DataError: its recipe holds nothing out.
    """
    if not (folder / "model").is_dir():
        raise ModelError(Problem(str(folder), "a finished run with model/", "no model/ in it",
                                 f"finish it: prefopt train {folder / RECIPE}"))  # fmt: skip
    prepared = prepare(load_recipe(str(folder / RECIPE)), quiet=not console.is_terminal)
    recipe = prepared.recipe
    reference = open_reference(prepared, console, only=("eval", "eval_partners"))
    policy = load_trained(recipe, folder / "model")
    settle_layout(policy, recipe, probe_group(prepared.data.train, prepared.data.eval))
    reference.use_policy(policy)
    budget = resolve_token_budget(recipe.train.token_budget, default_device())
    evaluator = make_evaluator(prepared, reference, token_budget=budget)
    if evaluator is None:
        raise DataError(
            Problem("data.eval", "held-out data", "none: eval_fraction is 0", "set data.eval in the recipe")
        )
    before = reference_samples(evaluator, folder / REFERENCE_SAMPLES)
    measures, samples = measure(evaluator, policy, before, _what_the_loss_learned(prepared, policy, folder))
    Screen(console).side_by_side(before, samples, recipe.eval.show)
    write_json(folder / "evaluation.json", measures)
    return measures


def _what_the_loss_learned(prepared: Prepared, policy: Scorer, folder: Path) -> dict[str, torch.Tensor]:
    """Return the numbers that the loss carried to the end of the run, and give the policy its value head back.

    Raises:
        ModelError: there was something to learn, and its checkpoint is gone.
    """
    newest, carries = latest_state(folder), prepared.loss.needs.state
    if newest is None and (prepared.learns_values or carries):
        what = ", ".join(("the learned V(x)",) * prepared.learns_values + carries)
        raise ModelError(Problem(str(folder / "checkpoints"), f"the last checkpoint, which holds {what}",
                                 "none", "its loss cannot be computed again; run it again"))  # fmt: skip
    if prepared.learns_values and newest is not None:
        policy.learn_values()
        load_value_head(newest[0], policy)
    return {name: torch.tensor(value) for name, value in newest[1].loss_state.items()} if newest else {}


def load_trained(recipe: Recipe, folder: Path) -> Scorer:
    """Load a run's final policy: its weights, or its adapter on the recipe's model."""
    source = policy_source(recipe)
    if recipe.adapter is None:
        return Scorer(load_model(ModelSource(str(folder), dtype=source.dtype, compute=source.compute))).eval()
    ready_for_peft()
    from peft import PeftModel

    return Scorer(PeftModel.from_pretrained(load_model(source), str(folder))).eval()
