"""A recipe file with a `sweep` section -> the runs of the sweep, on equal terms; everything wrong is said at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prefopt.errors import Problem, RecipeError
from prefopt.recipe import Recipe, recipe_from_mapping
from prefopt.recipe.files import missing_files
from prefopt.recipe.override import Override, apply_override, replace_alternative
from prefopt.recipe.schema import TrainRecipe
from prefopt.report.terms import unequal_terms
from prefopt.run_folder import recipe_digest
from prefopt.sweep.axes import MATCH_KEY, Axes
from prefopt.sweep.labels import labels_of
from prefopt.sweep.matching import match_loss
from prefopt.sweep.section import early_stopping_problem
from prefopt.sweep.source import SweepSource, read_source

MOST_RUNS = 100_000
"""More than this is a mistake: to write their recipes alone would take minutes."""
BATCH_SIZE, MAX_STEPS = "train.batch_size", "train.max_steps"
DEFAULT_BATCH: int = TrainRecipe.model_fields["batch_size"].default


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    label: str
    changes: dict[str, Any]
    """What it changes, as the sweep writes it; under `match: kappa` its beta is DPO's."""
    recipe: Recipe
    """Complete, with the folder of its run."""
    matched: bool = False
    """Whether its beta was made out of DPO's."""

    @cached_property
    def digest(self) -> str:
        """What names its numbers: equal for runs that compute the same."""
        return recipe_digest(self.recipe)

    def called(self, label: str, folder: Path) -> PlannedRun:
        """Return the same run under another name."""
        recipe = self.recipe.model_copy(update={"output": str(folder / "runs" / label)})
        return replace(self, label=label, recipe=recipe)


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep, in the order in which they start."""

    name: str
    folder: Path
    axes: Axes
    runs: tuple[PlannedRun, ...]
    tokens: float | None
    """Of a completion, where betas per token were matched."""
    notes: tuple[str, ...]
    """How the runs were made out of the section."""
    terms: tuple[str, ...] = ()
    """Where they are not on equal terms."""


def load_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> SweepPlan:
    """Return the runs that a recipe file with a sweep section stands for.

    Args:
        name_or_path: a YAML file, or the name of a shipped recipe.
        overrides: `key=value` for every run, `sweep.key=[...]` for an axis.

    Raises:
        RecipeError: with every problem of the section, of the overrides and of each run's recipe.
    """
    source = read_source(name_or_path, overrides)
    if source.problems:
        raise RecipeError(source.problems)
    if source.axes.count() > MOST_RUNS:
        fix = "take values away, or draw samples: sweep.samples=50 with {log_uniform: [low, high]}"
        raise RecipeError(Problem("sweep", f"at most {MOST_RUNS:,} runs", f"{source.axes.count():,}", fix))
    folder = Path(str(source.base.get("output", "runs/{recipe}")).replace("{recipe}", source.name)).expanduser()
    changes = list(source.axes.combinations())
    constant = _constant(changes)
    labels = labels_of([{key: value for key, value in each.items() if key not in constant} for each in changes])
    runs, problems, said = _runs(source, changes, labels, folder)
    if runs and (found := early_stopping_problem(source.axes, runs[0].recipe)):
        problems.append(found)
    if problems:
        raise RecipeError(problems)
    kept = list({run.digest: run for run in reversed(runs)}.values())[::-1]
    if len(kept) < len(runs):
        said.append(f"{len(runs) - len(kept):,} of {len(runs):,} combinations repeat another: each is run once")
    notes = dict.fromkeys([*source.notes, *said])
    terms = unequal_terms([run.recipe for run in kept])
    return SweepPlan(source.name, folder, source.axes, tuple(kept), source.measured_tokens, tuple(notes), tuple(terms))


def _constant(changes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys that a name of a run leaves out: those that are the same in all runs, but for loss and seed."""
    keys = dict.fromkeys(key for each in changes for key in each)
    same = {key for key in keys if all(each.get(key) == changes[0].get(key) for each in changes)}
    return (same | {MATCH_KEY}) - {"loss", "loss.name", "seed"}


def _runs(
    source: SweepSource, changes: Sequence[dict[str, Any]], labels: Sequence[str], folder: Path
) -> tuple[list[PlannedRun], list[Problem], list[str]]:
    runs: list[PlannedRun] = []
    missing: dict[tuple[str, str], Problem] = {}
    problems: dict[tuple[str, str, str], list[tuple[str, Problem]]] = {}
    notes: list[str] = []
    for each, label in zip(changes, labels):
        mapping, found = _changed(source.base, each, notes)
        matched = source.axes.match is not None and each.get(MATCH_KEY) != "none"
        if matched and not found:
            said, problem = match_loss(mapping, _loss_word(mapping), lambda: source.tokens)
            notes += [said] if said else []
            found += [problem] if problem else []
        mapping["output"] = str(folder / "runs" / label)
        if not found:
            try:
                recipe = recipe_from_mapping(mapping, name=label)
                missing |= {(found.where, found.given): found for found in missing_files(recipe)}
                told = {key: value for key, value in each.items() if key != MATCH_KEY}
                runs.append(PlannedRun(label, told, recipe, matched))
            except RecipeError as error:
                found += error.problems
        for problem in found:
            problems.setdefault((problem.where, problem.expected, problem.fix), []).append((label, problem))
    return runs, [*missing.values(), *(_located(found, len(labels)) for found in problems.values())], notes


def _changed(
    base: Mapping[str, Any], changes: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the recipe's mapping with one run's changes; sections before the keys in them."""
    mapping = deepcopy(dict(base))
    overrides = [
        Override(tuple(key.split(".")), deepcopy(value), f"sweep.{key}")
        for key, value in sorted(changes.items(), key=lambda item: item[0].count("."))
        if key != MATCH_KEY
    ]
    problems = [problem for each in overrides if (problem := apply_override(mapping, each))]
    replace_alternative(mapping, overrides)
    notes += _keep_comparisons(mapping, base, changes)
    return mapping, problems


def _keep_comparisons(mapping: dict[str, Any], base: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Give a run of another batch size the steps that see as many comparisons; returns what there is to say."""
    train, before = mapping.get("train"), base.get("train")
    if BATCH_SIZE not in changes or MAX_STEPS in changes or not isinstance(train, dict):
        return []
    size = before.get("batch_size", DEFAULT_BATCH) if isinstance(before, dict) else DEFAULT_BATCH
    given = (train.get("max_steps"), size, changes[BATCH_SIZE])
    counts = [each for each in given if isinstance(each, int) and each > 0]
    if len(counts) < len(given) or size == changes[BATCH_SIZE]:
        return []
    steps, size, own = counts
    mapping["train"]["max_steps"] = max(1, round(steps * size / own))
    return ["train.max_steps follows train.batch_size, so that every run sees as many comparisons"]


def _loss_word(mapping: Mapping[str, Any]) -> str:
    loss = mapping.get("loss")
    return str(loss.get("name", loss)) if isinstance(loss, dict) else str(loss)


def _located(found: Sequence[tuple[str, Problem]], count: int) -> Problem:
    """Say of a problem that some runs have which ones they are, and what they have there."""
    labels, problem = [label for label, _ in found], found[0][1]
    problem = replace(problem, given=", ".join(dict.fromkeys(each.given for _, each in found)))
    if len(labels) == count or problem.where.startswith("sweep"):
        return problem
    more = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
    where = f"{problem.where} of {', '.join(labels[:2])}{more}"
    fix = problem.fix
    if problem.where.startswith("loss."):
        fix = f"{fix + '; or ' if fix else ''}give the loss a point of its own under sweep.points"
    return Problem(where, problem.expected, problem.given, fix)
