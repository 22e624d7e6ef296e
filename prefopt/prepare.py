"""What every command needs of a recipe: the sandbox in place, the tokenizer, the data, the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.data.load import LoadedData, load_data
from prefopt.errors import DataError, ModelError, Problem
from prefopt.forward import compute_dtype
from prefopt.models import DTYPES, ModelSource, load_config, load_tokenizer
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
    _refuse_another_vocabulary(recipe, tokenizer)
    _refuse_unreadable_rows(recipe, data)
    return Prepared(recipe, tokenizer, data, loss)


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


def _refuse_another_vocabulary(recipe: Recipe, tokenizer: Any) -> None:
    """Compare the tokenizer of a named reference with the policy's: the same ids must be the same text."""
    if recipe.reference.model is None:
        return
    source = reference_source(recipe)
    theirs = {number: token for token, number in load_tokenizer(source).get_vocab().items()}
    moved = sum(theirs.get(number, token) != token for token, number in tokenizer.get_vocab().items())
    if moved:
        raise ModelError(
            Problem("reference.model", "a model with the policy's vocabulary: both read the same token ids",
                    f"{moved:,} ids are other text to {source.path}",
                    "name a reference of the same family, or leave reference.model out")
        )  # fmt: skip


def _refuse_what_the_loss_cannot_use(loss: Loss, data: LoadedData) -> None:
    """Say before any model loads that data and loss do not go together."""
    if loss.needs.pairs and not data.train.paired:
        raise DataError(
            Problem("loss", f"data with chosen and rejected completions: {loss.name} compares two",
                    "rows with one completion and a label",
                    "choose a loss of single completions: bco_pair, nca_pair, sppo_hard, apo_zero, sft")
        )  # fmt: skip
    if not loss.needs.rejected and not (data.train.layout.chosen >= 0).any():
        raise DataError(
            Problem("data.train", f"desirable completions: {loss.name} reads nothing else", "only undesirable ones",
                    "check the labels, or choose a loss that uses both")
        )  # fmt: skip
    if loss.needs.preference_probability:
        sets = [("data.train", data.train), ("data.eval", data.eval)]
        bare = [name for name, groups in sets if groups is not None and np.isnan(groups.layout.probabilities).any()]
        if bare:
            raise DataError(
                Problem(bare[0], "a preference_probability in every row: the loss is asked for soft labels",
                        "rows without one", "set soft_labels: false, or map the column: data.columns")
            )  # fmt: skip


def _refuse_unreadable_rows(recipe: Recipe, data: LoadedData) -> None:
    """Compare token ids and row lengths with what the models have embeddings and positions for, by their configs.

    Raises:
        ModelError: with everything that does not fit.
    """
    sources = [policy_source(recipe), *([reference_source(recipe)] if recipe.reference.model else [])]
    problems = [problem for source in sources for problem in _misfits(source, recipe, data)]
    if problems:
        raise ModelError(problems)


def _misfits(source: ModelSource, recipe: Recipe, data: LoadedData) -> Iterator[Problem]:
    config = load_config(source).get_text_config()
    sets = [groups for groups in (data.train, data.eval) if groups is not None]
    rows, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
    largest, longest = max(groups.largest_id for groups in sets), max(groups.longest_row for groups in sets)
    if largest >= rows:
        expected = f"token ids below {rows}, the rows of the model's embedding"
        yield Problem(
            source.key, expected, f"{largest}", "the tokenizer belongs to another model: put its own beside it"
        )
    if positions is None:
        return
    if longest > positions:
        expected = f"rows of at most {positions} tokens: {source.path} has no more positions"
        yield Problem("data.max_length", expected, f"a row of {longest}", f"data.max_length={positions}")
    if data.eval is not None and recipe.eval.samples:
        needed = int(data.eval.prompt_lengths.max()) + recipe.eval.max_new_tokens
        if needed > positions:
            expected = f"the longest held-out prompt and its sample within the {positions} positions of {source.path}"
            fitting = max(1, recipe.eval.max_new_tokens - (needed - positions))
            fix = f"eval.max_new_tokens={fitting}"
            yield Problem("eval.max_new_tokens", expected, f"{needed} positions", fix)
