"""Whether recipe, data, loss and models go together; said before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prefopt.data.load import LoadedData
from prefopt.errors import DataError, ModelError, Problem
from prefopt.models import ModelSource, load_config, load_tokenizer
from prefopt.recipe import Recipe
from prefopt_losses import Loss


def _cached_distribution(loss: Loss, recipe: Recipe) -> Iterator[Problem]:
    if loss.needs.sequential_kl and recipe.reference.cache not in ("auto", "off"):
        expected = f"auto or off: {loss.name} reads the reference's whole distribution, which no cache holds"
        yield Problem("reference.cache", expected, recipe.reference.cache, "remove reference.cache")


def refuse_another_vocabulary(recipe: Recipe, source: ModelSource, tokenizer: Any) -> None:
    """Compare the tokenizer of a named reference with the policy's: the same ids must be the same text."""
    if recipe.reference.model is None:
        return
    theirs = {number: token for token, number in load_tokenizer(source).get_vocab().items()}
    moved = sum(theirs.get(number, token) != token for token, number in tokenizer.get_vocab().items())
    if moved:
        raise ModelError(
            Problem("reference.model", "a model with the policy's vocabulary: both read the same token ids",
                    f"{moved:,} ids are other text to {source.path}",
                    "name a reference of the same family, or leave reference.model out")
        )  # fmt: skip


def refuse_unusable_data(loss: Loss, data: LoadedData, recipe: Recipe) -> None:
    """Say before any model loads that data, loss and recipe do not go together.

    Raises:
        DataError: with every reason.
    """
    problems = [
        *_wrong_kind(loss, data),
        *_missing_columns(loss, data),
        *_uncoupled_recipe(loss, recipe),
        *_cached_distribution(loss, recipe),
    ]
    if problems:
        raise DataError(problems)


def _wrong_kind(loss: Loss, data: LoadedData) -> Iterator[Problem]:
    needs = loss.needs
    if (needs.pairs or needs.lists) and not data.train.paired:
        yield Problem("loss", f"data with chosen and rejected completions: {loss.name} compares them",
                      "rows with one completion and a label",
                      "choose a loss of single completions: kto, bco, nca_pair, sppo_hard, apo_zero, sft")  # fmt: skip
    if not needs.rejected and not (data.train.layout.chosen >= 0).any():
        yield Problem("data.train", f"desirable completions: {loss.name} reads nothing else", "only undesirable ones",
                      "check the labels, or choose a loss that uses both")  # fmt: skip


def _missing_columns(loss: Loss, data: LoadedData) -> Iterator[Problem]:
    """What the loss reads of the data themselves, and rows that do not have it."""
    needs = loss.needs
    sets = [(name, groups) for name, groups in (("data.train", data.train), ("data.eval", data.eval)) if groups]
    for name, groups in sets:
        bare = int(np.isnan(groups.layout.probabilities).sum())
        wanted = {
            "preference_probability": (needs.preference_probability, bare),
            "chosen_score and rejected_score": (needs.scores and groups.paired, groups.without_scores),
            "score": (needs.scores and not groups.paired, groups.without_scores),
            "value": (needs.values and "values" not in needs.learns, groups.without_values),
            "gold": (needs.gold, groups.without_gold),
        }
        for column, (needed, missing) in wanted.items():
            if needed and missing:
                fix = f"{MENDING[column]}: data.columns, or choose another loss"
                yield Problem(name, f"{column} in every row: {loss.name} reads it", f"{missing:,} rows without", fix)


MENDING = {
    "preference_probability": "set soft_labels: false, or map the column",
    "chosen_score and rejected_score": "map the columns of your reward model",
    "score": "map the column of your reward model",
    "value": "map the column that holds the expected score of each prompt",
    "gold": "map the column that holds the third, gold completion",
}


def _uncoupled_recipe(loss: Loss, recipe: Recipe) -> Iterator[Problem]:
    needs, size = loss.needs, recipe.train.batch_size
    if size < needs.minimum_batch:
        expected = f"at least {needs.minimum_batch}: {', '.join(needs.batch)} is taken over a whole optimizer step"
        yield Problem("train.batch_size", expected, str(size), f"train.batch_size={8 * needs.minimum_batch}")
    if needs.batch and (recipe.train.dropout or (recipe.adapter is not None and recipe.adapter.dropout > 0)):
        expected = f"no dropout: {loss.name} couples the examples of a step, whose log-probs are computed twice"
        yield Problem("train.dropout", expected, "dropout", "set train.dropout=false and adapter.dropout=0")


def refuse_unreadable_rows(sources: Sequence[ModelSource], recipe: Recipe, data: LoadedData) -> None:
    """Compare token ids and row lengths with what the models have embeddings and positions for, by their configs.

    Raises:
        ModelError: with everything that does not fit.
    """
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
