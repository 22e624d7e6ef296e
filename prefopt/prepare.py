"""What every command needs of a recipe: the sandbox in place, the tokenizer, the data, the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefopt.data.groups import GroupDataset
from prefopt.data.load import LoadedData, load_data
from prefopt.errors import DataError, Problem
from prefopt.forward import compute_dtype
from prefopt.models import DTYPES, ModelSource, load_tokenizer
from prefopt.recipe import Recipe
from prefopt_losses import Loss

SANDBOX = "sandbox"

AUTO_TOKEN_BUDGET = {"cpu": 8192, "cuda": 16384}
"""Computed tokens per micro-batch where the recipe says `auto`."""


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything that is read before a model is."""

    recipe: Recipe
    """With `sandbox` replaced by the folders and files of the small world."""
    tokenizer: Any
    data: LoadedData
    loss: Loss

    @property
    def eval_data(self) -> GroupDataset | None:
        """Held-out groups; None where the recipe holds nothing out."""
        return self.data.eval


def prepare(recipe: Recipe, *, quiet: bool = False) -> Prepared:
    """Make the sandbox if it is asked for, load the tokenizer and the data, build the loss.

    Raises:
        DataError, ModelError: what is wrong with data or tokenizer.
    """
    recipe = with_sandbox(recipe, quiet=quiet)
    loss = recipe.build_loss()
    tokenizer = load_tokenizer(policy_source(recipe))
    data = load_data(recipe.data, tokenizer, seed=recipe.seed, quiet=quiet)
    _refuse_what_the_loss_cannot_use(loss, data)
    return Prepared(recipe, tokenizer, data, loss)


def with_sandbox(recipe: Recipe, *, quiet: bool = False) -> Recipe:
    """Replace `sandbox` by the model folder and the files of the embedded small world, making it if needed."""
    wants_model, wants_data = recipe.model.path == SANDBOX, recipe.data.train == SANDBOX
    if not (wants_model or wants_data):
        return recipe
    from prefopt.sandbox import build_world

    world = build_world(seed=0, quiet=quiet)
    changes: dict[str, Any] = {}
    if wants_model:
        changes["model"] = recipe.model.model_copy(update={"path": str(world.model)})
    if wants_data:
        held_out = recipe.data.eval or str(world.eval)
        changes["data"] = recipe.data.model_copy(update={"train": str(world.train), "eval": held_out})
    return recipe.model_copy(update=changes).named(recipe.name)


def policy_source(recipe: Recipe) -> ModelSource:
    """Where the policy's weights come from and how they are held while it trains."""
    return ModelSource(
        recipe.model.path,
        recipe.model.revision,
        _held_in(recipe),
        recipe.model.quantization,
        compute_dtype(recipe.train.precision),
    )


def reference_source(recipe: Recipe) -> ModelSource:
    """Where the reference's weights come from: the policy's initial ones unless the recipe names others."""
    if recipe.reference.model is None:
        path, revision, key = recipe.model.path, recipe.model.revision, "model"
    else:
        path, revision, key = recipe.reference.model, recipe.reference.revision, "reference.model"
    compute = compute_dtype(recipe.train.precision)
    return ModelSource(path, revision, _held_in(recipe), recipe.reference.quantization, compute, key)


def _held_in(recipe: Recipe) -> torch.dtype:
    if recipe.model.dtype != "auto":
        return DTYPES[recipe.model.dtype]
    return torch.bfloat16 if recipe.train.precision == "bf16-pure" else torch.float32


def resolve_token_budget(budget: int | str, device: torch.device) -> int:
    """Return the computed tokens per micro-batch that `auto` stands for on a device."""
    return AUTO_TOKEN_BUDGET.get(device.type, 8192) if budget == "auto" else int(budget)


def _refuse_what_the_loss_cannot_use(loss: Loss, data: LoadedData) -> None:
    """Say before any model loads that data and loss do not go together."""
    if loss.needs.pairs and not data.train.paired:
        raise DataError(
            Problem("loss", f"data with chosen and rejected completions: {loss.name} compares two",
                    "rows with one completion and a label",
                    "choose a loss of single completions: bco_pair, nca_pair, sppo_hard, apo_zero, sft")
        )  # fmt: skip
    if loss.needs.preference_probability:
        sets = [("data.train", data.train), ("data.eval", data.eval)]
        bare = [name for name, groups in sets if groups is not None and np.isnan(groups.layout.probabilities).any()]
        if bare:
            raise DataError(
                Problem(bare[0], "a preference_probability in every row: the loss is asked for soft labels",
                        "rows without one", "set soft_labels: false, or map the column: data.columns")
            )  # fmt: skip
