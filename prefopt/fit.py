"""Whether recipe, data, loss and models go together; said before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from prefopt.data.groups import GroupDataset
from prefopt.data.load import LoadedData
from prefopt.data.mismatched import only_prompt
from prefopt.errors import DataError, ModelError, Problem
from prefopt.models import ModelSource, load_config, load_tokenizer
from prefopt.recipe import Recipe
from prefopt_losses import LogProbs, Loss, LossError


def _cached_distribution(loss: Loss, recipe: Recipe) -> Iterator[Problem]:
    if loss.needs.sequential_kl and recipe.reference.cache not in ("auto", "off"):
        expected = f"auto or off: {loss.name} reads the reference's whole distribution, which no cache holds"
        yield Problem("reference.cache", expected, recipe.reference.cache, "remove reference.cache")


def refuse_another_vocabulary(loss: Loss, policy: ModelSource, reference: ModelSource, tokenizer: Any) -> None:
    """Compare a named reference with the policy: the same ids must be the same text.

    Raises:
        ModelError: they are not, or the loss compares distributions over vocabularies of different sizes.
    """
    problems = []
    fix = "name a reference of the same family, or leave reference.model out"
    theirs = {number: token for token, number in load_tokenizer(reference).get_vocab().items()}
    moved = sum(theirs.get(number, token) != token for token, number in tokenizer.get_vocab().items())
    if moved:
        expected = "a model with the policy's vocabulary: both read the same token ids"
        problems.append(Problem("reference.model", expected, f"{moved:,} ids are other text to {reference.path}", fix))
    rows, own = (load_config(source).get_text_config().vocab_size for source in (reference, policy))
    if loss.needs.sequential_kl and rows != own:
        expected = f"a vocabulary of {own} rows, as {policy.path} has: {loss.name} compares whole distributions"
        problems.append(Problem("reference.model", expected, f"{rows} rows in {reference.path}", fix))
    if problems:
        raise ModelError(problems)


def refuse_unusable_data(loss: Loss, data: LoadedData, recipe: Recipe) -> None:
    """Say before any model loads that data, loss and recipe do not go together.

    Raises:
        DataError: with every reason.
    """
    problems = [
        *_wrong_kind(loss, data),
        *_missing_columns(loss, data),
        *_refused_numbers(loss, data),
        *_too_few(loss, data, recipe),
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
    values_are_learned = "values" in needs.learns and data.train.without_values == len(data.train.layout.values)
    for name, groups in _sets(data):
        bare = int(np.isnan(groups.layout.probabilities).sum())
        wanted = {
            "preference_probability": (needs.preference_probability, bare),
            "chosen_score and rejected_score": (needs.scores and groups.paired, groups.without_scores),
            "score": (needs.scores and not groups.paired, groups.without_scores),
            "value": (needs.values and not values_are_learned, groups.without_values),
            "gold": (needs.gold, groups.without_gold),
        }
        for column, (needed, missing) in wanted.items():
            if needed and missing:
                learned = column == "value" and "values" in needs.learns
                other = "take the values out of data.train: V(x) is then learned" if learned else "choose another loss"
                fix = f"{MENDING[column]}: data.columns, or {other}"
                yield Problem(name, f"{column} in every row: {loss.name} reads it", f"{missing:,} rows without", fix)


MENDING = {
    "preference_probability": "set soft_labels: false, or map the column",
    "chosen_score and rejected_score": "map the columns of your reward model",
    "score": "map the column of your reward model",
    "value": "map the column that holds the expected score of each prompt",
    "gold": "map the column that holds the third, gold completion",
}


def _sets(data: LoadedData) -> list[tuple[str, GroupDataset]]:
    sets = {"data.train": data.train, "data.eval": data.eval}
    return [(name, groups) for name, groups in sets.items() if groups is not None]


def _refused_numbers(loss: Loss, data: LoadedData) -> Iterator[Problem]:
    """Ask the loss itself, with log-probs of zero, whether it takes the scores that the data have."""
    for name, groups in _sets(data):
        if not loss.needs.scores or not groups.paired:
            continue
        there = ~np.isnan(groups.layout.scores).any(axis=(1, 2))
        scores = torch.from_numpy(groups.layout.scores[there]).float()
        found = list(islice(_refused(loss, scores, groups.layout.source_rows[there]), SHOWN_ROWS + 1))
        if found:
            reason, *_, fix = found[0][1].split(". ")
            rows = ", ".join(str(row) for row, _ in found[:SHOWN_ROWS])
            more = " and more" if len(found) > SHOWN_ROWS else ""
            expected = f"{reason.replace(': expected', '')}, as {loss.name} asks"
            yield Problem(name, expected, f"others in rows {rows}{more}", fix.rstrip("."))


SHOWN_ROWS = 8


def _refused(loss: Loss, scores: torch.Tensor, rows: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield the rows whose scores (comparisons, 2, models) the loss refuses, each with what it says."""
    if not len(rows):
        return
    repeated = scores.repeat(-(-loss.needs.minimum_batch // len(rows)), 1, 1)
    chosen, rejected = (side.squeeze(1) if side.shape[1] == 1 else side for side in repeated.unbind(1))
    read = {
        name: torch.zeros(len(repeated), 1) if "token_logps" in name else torch.full((len(repeated),), blank)
        for name in loss.needs.tensors
        for blank in [1.0 if name.endswith("lengths") else 0.0]
    }
    try:
        loss(LogProbs(**{**read, "chosen_scores": chosen, "rejected_scores": rejected}))
    except LossError as error:
        half = len(rows) // 2
        if not half:
            yield int(rows[0]), str(error)
            return
        yield from _refused(loss, scores[:half], rows[:half])
        yield from _refused(loss, scores[half:], rows[half:])


def _too_few(loss: Loss, data: LoadedData, recipe: Recipe) -> Iterator[Problem]:
    """What is taken over several examples needs them, of the step and of the held-out data; so do partners."""
    needs, unit = loss.needs, "lists" if loss.needs.lists else "comparisons"
    epochs = recipe.train.epochs if recipe.train.max_steps is None else None
    for name, groups in _sets(data):
        count = int(groups.lists_per_group.sum()) if needs.lists else len(groups.layout.chosen)
        trained = max(1, round(count * epochs)) if epochs is not None and name == "data.train" else count
        if trained < needs.minimum_batch:
            expected = f"at least {needs.minimum_batch} {unit}: {', '.join(needs.batch)} is taken over them"
            yield Problem(name, expected, f"{trained}", "give more rows, or choose another loss")
        if needs.mismatched:
            yield from only_prompt(groups, name)


def _uncoupled_recipe(loss: Loss, recipe: Recipe) -> Iterator[Problem]:
    needs, size = loss.needs, recipe.train.batch_size
    if size < needs.minimum_batch:
        expected = f"at least {needs.minimum_batch}: {', '.join(needs.batch)} is taken over a whole optimizer step"
        yield Problem("train.batch_size", expected, str(size), f"train.batch_size={8 * needs.minimum_batch}")
    dropping = {"train.dropout": recipe.train.dropout, "adapter.dropout": recipe.adapter and recipe.adapter.dropout}
    for key, given in dropping.items():
        if needs.batch and given:
            expected = f"no dropout: {loss.name} couples the examples of a step, whose log-probs are computed twice"
            yield Problem(key, expected, str(given).lower(), f"{key}={'false' if given is True else 0}")


def refuse_router_loss(policy: ModelSource) -> None:
    """Read the policy's config: a loss that it asks for beside ours would not be added.

    transformers adds it in the forward pass with labels, which no preference loss runs; and where a prompt is
    computed once for all its completions, a mean over the tokens of a row is another one.

    Raises:
        ModelError: it asks for the auxiliary loss of its routers.
    """
    if getattr(load_config(policy).get_text_config(), "output_router_logits", False):
        expected = "output_router_logits: false in its config: the auxiliary loss of the routers is not added"
        fix = f'set "output_router_logits": false in the config.json of {policy.path}, or of a copy of it'
        raise ModelError(Problem(policy.key, expected, "true", fix))


def refuse_unreadable_rows(
    sources: Sequence[ModelSource], recipe: Recipe, data: LoadedData, partners: Iterable[GroupDataset] = ()
) -> None:
    """Compare token ids and row lengths with what the models have embeddings and positions for, by their configs.

    A prompt with another one's completion after it, which `partners` hold, can be longer than any row of the data.

    Raises:
        ModelError: with everything that does not fit.
    """
    sets = [groups for _, groups in _sets(data)]
    largest = max(groups.largest_id for groups in sets)
    longest = max(groups.longest_row for groups in (*sets, *partners))
    problems = [problem for source in sources for problem in _misfits(source, recipe, data, largest, longest)]
    if problems:
        raise ModelError(problems)


def _misfits(source: ModelSource, recipe: Recipe, data: LoadedData, largest: int, longest: int) -> Iterator[Problem]:
    config = load_config(source).get_text_config()
    rows, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
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
