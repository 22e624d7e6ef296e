"""What every command needs of a recipe: the sandbox in place, the tokenizer, the data, the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefopt.acceleration import refuse_what_cannot_run
from prefopt.adapter_fit import refuse_another_base
from prefopt.adapters import AdapterSource
from prefopt.data.groups import GroupDataset
from prefopt.data.load import LoadedData, load_data
from prefopt.data.mismatched import mismatched
from prefopt.errors import Problem, RecipeError
from prefopt.fit import refuse_another_vocabulary, refuse_router_loss, refuse_unreadable_rows, refuse_unusable_data
from prefopt.forward import compute_dtype
from prefopt.models import DTYPES, ModelSource, default_device, load_config, load_tokenizer
from prefopt.quantization import skipped_layers
from prefopt.recipe import Recipe
from prefopt.recipe.quantization import Quantization, quantization_details
from prefopt_losses import Loss

SANDBOX = "sandbox"

AUTO_TOKEN_BUDGET = {"cpu": 8192, "cuda": 16384}
"""Computed tokens per batch of a pass without gradient where the recipe says `auto`; `memory_plan` finds training's."""


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
        """Return the data whose completions the initial reference scores, by name.

        Held-out data are among them also for a loss without reference: the evaluation's drift needs them. Training
        data are not where a moving reference reads them.
        """
        train = [("train", self.data.train)] if self.loss.needs.reference else []
        held_out = [] if self.data.eval is None else [("eval", self.data.eval)]
        moving = [name for name, _ in self.read_by_moving_reference()]
        return [one for one in (*train, *held_out, *self.partners.items()) if one[0] not in moving]

    def read_by_moving_reference(self) -> list[tuple[str, GroupDataset]]:
        """Return the data that a reference which follows the policy scores: the training data, in every step."""
        if self.recipe.reference.sync is None:
            return []
        partners = [(name, groups) for name, groups in self.partners.items() if name == "train_partners"]
        return [("train", self.data.train), *partners]


def prepare(recipe: Recipe, *, quiet: bool = False) -> Prepared:
    """Make the sandbox if it is asked for, load the tokenizer and the data, build the loss.

    Raises:
        DataError, ModelError: what is wrong with data or tokenizer.
        RecipeError: a wish for speed that this machine cannot meet.
    """
    refuse_what_cannot_run(recipe, default_device())
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
    refuse_unfit_parts(recipe, loss)
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


def refuse_unfit_parts(recipe: Recipe, loss: Loss) -> None:
    """Say before a model loads what of quantization, adapter and moving reference cannot be.

    Raises:
        ModelError: names in `skip` that no module has; an adapter of another base; a router loss.
        RecipeError: a moving reference that the loss does not read.
    """
    policy, reference = policy_source(recipe), reference_source(recipe)
    refuse_router_loss(policy)
    for where, source in (("model.quantization.skip", policy), ("reference.quantization.skip", reference)):
        details = quantization_details(source.quantization)
        if details.type != "none":
            skipped_layers(load_config(source), details.skip, where=where)
    pretrained = adapter_source(recipe)
    if pretrained is not None:
        refuse_another_base(pretrained, policy)
    if recipe.reference.sync is not None and not loss.needs.reference:
        fix = "remove reference.sync, or choose a loss with a reference"
        given = f"{loss.name}, which reads no reference"
        raise RecipeError(Problem("reference.sync", "a loss that reads the reference", given, fix))


def policy_source(recipe: Recipe) -> ModelSource:
    """Where the policy's weights come from and how they are held while it trains; its adapter is not among them."""
    quantization = recipe.model.quantization
    return ModelSource(
        recipe.model.path, recipe.model.revision, _held_in(recipe), quantization, _expanded_to(recipe, quantization)
    )


def adapter_source(recipe: Recipe) -> AdapterSource | None:
    """Where the adapter comes from that training goes on from; None for a fresh one or none."""
    adapter = recipe.adapter
    return AdapterSource(adapter.path, adapter.revision) if adapter is not None and adapter.path is not None else None


def reference_source(recipe: Recipe) -> ModelSource:
    """Where the reference's weights come from: the policy's initial ones unless the recipe names others.

    The policy's own start includes the adapter that training goes on from.
    """
    named, policy = recipe.reference, recipe.model
    quantization = named.quantization
    compute, held = _expanded_to(recipe, quantization), _held_in(recipe)
    if named.model is None:
        return ModelSource(policy.path, policy.revision, held, quantization, compute, "model", adapter_source(recipe))
    own = (named.model, named.revision) == (policy.path, policy.revision)
    adapter = adapter_source(recipe) if own else None
    return ModelSource(named.model, named.revision, held, quantization, compute, "reference.model", adapter)


def _expanded_to(recipe: Recipe, quantization: Quantization) -> torch.dtype:
    """The dtype that quantized weights are expanded to; `auto` is that of `train.precision`."""
    compute = quantization_details(quantization).compute
    return compute_dtype(recipe.train.precision) if compute == "auto" else DTYPES[compute]


def _held_in(recipe: Recipe) -> torch.dtype:
    if recipe.model.dtype != "auto":
        return DTYPES[recipe.model.dtype]
    return torch.bfloat16 if recipe.train.precision == "bf16-pure" else torch.float32


def resolve_token_budget(budget: int | str, device: torch.device) -> int:
    """Return the computed tokens per batch that `auto` stands for on a device, in passes without gradient."""
    return AUTO_TOKEN_BUDGET.get(device.type, 8192) if budget == "auto" else int(budget)
