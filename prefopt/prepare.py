"""What every command needs of a recipe: the sandbox in place, the tokenizer, the data, the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefopt.data.groups import GroupDataset
from prefopt.data.load import LoadedData, load_data
from prefopt.data.mismatched import mismatched
from prefopt.fit import refuse_another_vocabulary, refuse_unreadable_rows, refuse_unusable_data
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
    partners: dict[str, GroupDataset] = field(default_factory=dict)
    """Mismatched completions, `train_partners` and `eval_partners`, for a loss that reads them."""

    @property
    def cached(self) -> bool:
        """Whether the reference's log-probs come from the cache; whole distributions are in none."""
        return self.recipe.reference.cache != "off" and not self.loss.needs.sequential_kl

    @property
    def learns_values(self) -> bool:
        """Whether the loss's V(x) is learned beside the policy, for the data bring none."""
        return "values" in self.loss.needs.learns and self.data.train.without_values > 0

    def read_by_reference(self) -> list[tuple[str, GroupDataset]]:
        """Return the data whose completions the reference scores, by name.

        Held-out data are among them also for a loss without reference: the evaluation's drift needs them.
        """
        train = [("train", self.data.train)] if self.loss.needs.reference else []
        held_out = [] if self.data.eval is None else [("eval", self.data.eval)]
        return [*train, *held_out, *self.partners.items()]


def prepare(recipe: Recipe, *, quiet: bool = False) -> Prepared:
    """Make the sandbox if it is asked for, load the tokenizer and the data, build the loss.

    Raises:
        DataError, ModelError: what is wrong with data or tokenizer.
    """
    recipe = with_sandbox(recipe, quiet=quiet)
    loss = recipe.build_loss()
    tokenizer = load_tokenizer(policy_source(recipe))
    data = load_data(recipe.data, tokenizer, seed=recipe.seed, quiet=quiet)
    refuse_unusable_data(loss, data, recipe)
    sources = [policy_source(recipe)]
    if recipe.reference.model is not None:
        sources.append(reference_source(recipe))
        refuse_another_vocabulary(loss, sources[0], sources[1], tokenizer)
    partners = _partners(loss, data, recipe)
    refuse_unreadable_rows(sources, recipe, data, partners.values())
    return Prepared(recipe, tokenizer, data, loss, partners)


def _partners(loss: Loss, data: LoadedData, recipe: Recipe) -> dict[str, GroupDataset]:
    if not loss.needs.mismatched:
        return {}
    sets = {"train_partners": data.train, "eval_partners": data.eval}
    limit = recipe.data.max_length
    return {name: mismatched(groups, max_length=limit) for name, groups in sets.items() if groups is not None}


def with_sandbox(recipe: Recipe, *, quiet: bool = False) -> Recipe:
    """Replace `sandbox` by the model folder and the files of the embedded small world, making it if needed."""
    data = recipe.data
    if SANDBOX not in (recipe.model.path, *_names(data.train), *_names(data.eval)):
        return recipe
    from prefopt.sandbox import build_world

    world = build_world(seed=0, quiet=quiet)
    held_out = str(world.eval) if data.eval is None and data.train == SANDBOX else _placed(data.eval, world.eval)
    files = data.model_copy(update={"train": _placed(data.train, world.train), "eval": held_out})
    changes: dict[str, Any] = {"data": files}
    if recipe.model.path == SANDBOX:
        changes["model"] = recipe.model.model_copy(update={"path": str(world.model)})
    return recipe.model_copy(update=changes).named(recipe.name)


def _names(sources: Any) -> list[str]:
    """Names of the sources of a recipe key: a name, or a list of names and mappings."""
    listed = [] if sources is None else [sources] if isinstance(sources, str) else sources
    return [one if isinstance(one, str) else one.path for one in listed]


def _placed(sources: Any, file: Path) -> Any:
    """Put a file in the place of `sandbox`."""
    if sources is None or isinstance(sources, str):
        return str(file) if sources == SANDBOX else sources
    return [
        str(file) if one == SANDBOX
        else one.model_copy(update={"path": str(file)}) if not isinstance(one, str) and one.path == SANDBOX
        else one
        for one in sources
    ]  # fmt: skip


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
