"""A recipe file with a `sweep` section -> the runs of the sweep, on equal terms; everything wrong is said at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prefopt.errors import Problem, RecipeError
from prefopt.recipe import Recipe, find_recipe, recipe_from_mapping
from prefopt.recipe.files import missing_files
from prefopt.recipe.load import read_mapping
from prefopt.recipe.override import Override, apply_override, parse_overrides, replace_alternative
from prefopt.sweep.axes import MATCH_KEY, SETTINGS, Axes, Axis, parse_axes
from prefopt.sweep.labels import labels_of
from prefopt.sweep.matching import completion_tokens, match_loss

MOST_RUNS = 100_000
"""More than this is a mistake: to write their recipes alone would take minutes."""
LEARNING_RATE, BATCH_SIZE, MAX_STEPS = "train.learning_rate", "train.batch_size", "train.max_steps"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    label: str
    changes: dict[str, Any]
    """What it changes, as the sweep writes it; under `match: kappa` its beta is DPO's."""
    recipe: Recipe
    """Complete, with the folder of its run."""


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
    """What a person should know of the comparison before it runs."""


@dataclass
class _Source:
    """The recipe file, its sweep section apart."""

    name: str
    base: dict[str, Any]
    axes: Axes
    problems: list[Problem] = field(default_factory=list)

    @cached_property
    def tokens(self) -> float:
        """Tokens of a completion; measured once, on the data of the base recipe."""
        assert self.axes.match is not None
        if self.axes.match.tokens is not None:
            return float(self.axes.match.tokens)
        recipe = {**self.base, "loss": "dpo"}
        return completion_tokens(recipe_from_mapping(recipe, name=self.name))


def load_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> SweepPlan:
    """Return the runs that a recipe file with a sweep section stands for.

    Args:
        name_or_path: a YAML file, or the name of a shipped recipe.
        overrides: `key=value` for every run, `sweep.key=[...]` for an axis.

    Raises:
        RecipeError: with every problem of the section, of the overrides and of each run's recipe.
    """
    source = _read(name_or_path, overrides)
    if source.problems:
        raise RecipeError(source.problems)
    notes: list[str] = []
    _vary_learning_rate(source, notes)
    if source.axes.count() > MOST_RUNS:
        fix = "take values away, or draw samples: sweep.samples=50 with {log_uniform: [low, high]}"
        raise RecipeError(Problem("sweep", f"at most {MOST_RUNS:,} runs", f"{source.axes.count():,}", fix))
    folder = Path(str(source.base.get("output", "runs/{recipe}")).replace("{recipe}", source.name)).expanduser()
    changes = list(source.axes.combinations())
    labels = labels_of([_told_apart(each, changes) for each in changes])
    runs, problems, said = _runs(source, changes, labels, folder)
    if problems:
        raise RecipeError(problems)
    notes += [*said, *_fairness(source, changes)]
    counted = vars(source).get("tokens")  # measured only where a loss takes means
    return SweepPlan(source.name, folder, source.axes, tuple(runs), counted, tuple(dict.fromkeys(notes)))


def _read(name_or_path: str, overrides: Sequence[str]) -> _Source:
    path = find_recipe(name_or_path)
    changes, problems = parse_overrides(overrides)
    mapping = read_mapping(path)
    section = mapping.pop("sweep", None)
    wanted = [change for change in changes if change.path[0] == "sweep"]
    if section is None and not wanted:
        fix = 'add axes: sweep.loss.name="[dpo, ipo]" sweep.seed="[0, 1, 2]"; prefopt train runs a single recipe'
        raise RecipeError([Problem(str(path), "a recipe with a sweep section", "none", fix), *problems])
    section = _with_overrides(section, wanted, problems)
    axes, wrong = parse_axes(section)
    plain = [change for change in changes if change.path[0] != "sweep"]
    problems += wrong
    problems += [problem for change in plain if (problem := apply_override(mapping, change))]
    replace_alternative(mapping, plain)
    for change in plain:
        if ".".join(change.path) in axes.varied():
            key = ".".join(change.path)
            fix = f"sweep.{key}=[{change.value}] for one value of it"
            problems.append(Problem(change.written, "a key that the sweep does not vary", f"{key}, an axis", fix))
    name = path.parent.resolve().name if path.stem == "recipe" else path.stem
    return _Source(name, mapping, axes, problems)


def _with_overrides(section: Any, overrides: Sequence[Override], problems: list[Problem]) -> Any:
    """Set axes and settings from the command line; an axis is one key, dots and all."""
    if section is None:
        section = {}
    if not isinstance(section, dict):
        return section
    section = deepcopy(section)
    for change in overrides:
        _, *rest = change.path
        if not rest:
            section = change.value
        elif rest[0] in SETTINGS:
            found = apply_override(section, Override(tuple(rest), change.value, change.written))
            problems += [found] if found else []
        else:
            section[".".join(rest)] = change.value
    return section


def _vary_learning_rate(source: _Source, notes: list[str]) -> None:
    """Make the learning rate an axis where the sweep does not say: gradient scales differ between losses."""
    if LEARNING_RATE in source.axes.varied():
        given = next((axis for axis in source.axes.grid if axis.key == LEARNING_RATE), None)
        if given is not None and len(given.values) == 1 and _varies_loss(source.axes):
            notes.append(
                f"one learning rate, {given.values[0]:g}, for all: gradients of losses differ in scale, and the one "
                "that it suits best has an advantage"
            )
        return
    train = source.base.get("train")
    base = train.get("learning_rate", 5e-7) if isinstance(train, dict) else 5e-7
    if not isinstance(base, int | float):
        return  # the recipe's own check says what is wrong
    values = tuple(float(f"{base * factor:.2g}") for factor in (1 / 3, 1, 3))
    source.axes = source.axes.with_axis(Axis(LEARNING_RATE, values))
    shown = ", ".join(f"{value:g}" for value in values)
    notes.append(
        f"learning rates {shown}: losses differ in the scale of their gradients, so each is tried at a third and at "
        f"three times the recipe's (sweep.{LEARNING_RATE}=[...] chooses others)"
    )


def _varies_loss(axes: Axes) -> bool:
    return any(key.split(".")[0] == "loss" for key in axes.varied())


def _told_apart(changes: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Leave out of a name what is the same in all runs, but for loss and seed."""
    always = ("loss", "loss.name", "seed")
    return {
        key: value
        for key, value in changes.items()
        if key != MATCH_KEY and (key in always or any(other.get(key) != value for other in every))
    }


def _runs(
    source: _Source, changes: Sequence[dict[str, Any]], labels: Sequence[str], folder: Path
) -> tuple[list[PlannedRun], list[Problem], list[str]]:
    runs: list[PlannedRun] = []
    missing: list[Problem] = []
    problems: dict[tuple[str, str, str], list[tuple[str, Problem]]] = {}
    notes: list[str] = []
    for each, label in zip(changes, labels):
        mapping, found = _changed(source.base, each)
        matched = source.axes.match is not None and each.get(MATCH_KEY) != "none"
        if matched and not found:
            said, problem = match_loss(mapping, _loss_word(mapping), lambda: source.tokens)
            notes += [said] if said else []
            found += [problem] if problem else []
        mapping["output"] = str(folder / "runs" / label)
        if not found:
            try:
                recipe = recipe_from_mapping(mapping, name=label)
                if not runs:
                    missing += missing_files(recipe)
                told = {key: value for key, value in each.items() if key != MATCH_KEY}
                runs.append(PlannedRun(label, told, recipe))
            except RecipeError as error:
                found += error.problems
        for problem in found:
            problems.setdefault((problem.where, problem.expected, problem.fix), []).append((label, problem))
    return runs, [*missing, *(_located(found, len(labels)) for found in problems.values())], notes


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the recipe's mapping with one run's changes; sections before the keys in them."""
    mapping = deepcopy(dict(base))
    overrides = [
        Override(tuple(key.split(".")), deepcopy(value), f"sweep.{key}")
        for key, value in sorted(changes.items(), key=lambda item: item[0].count("."))
        if key != MATCH_KEY
    ]
    problems = [problem for each in overrides if (problem := apply_override(mapping, each))]
    replace_alternative(mapping, overrides)
    _keep_comparisons(mapping, base, changes)
    return mapping, problems


def _keep_comparisons(mapping: dict[str, Any], base: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Give runs of other batch sizes the steps that see as many comparisons."""
    train = base.get("train")
    if BATCH_SIZE not in changes or MAX_STEPS in changes or not isinstance(train, dict):
        return
    steps, size, own = train.get("max_steps"), train.get("batch_size", 64), changes[BATCH_SIZE]
    if all(isinstance(each, int) and each > 0 for each in (steps, size, own)):
        mapping["train"]["max_steps"] = max(1, round(steps * size / own))


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


def _fairness(source: _Source, changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say where runs are not on equal terms, and what follows."""
    varied = [key for key in source.axes.varied() if len({repr(each.get(key)) for each in changes}) > 1]
    notes = []
    if BATCH_SIZE in varied and MAX_STEPS not in varied and "max_steps" in (source.base.get("train") or {}):
        notes.append("train.max_steps follows train.batch_size, so that every run sees as many comparisons")
    if unequal := [key for key in varied if key in (MAX_STEPS, "train.epochs")]:
        notes.append(f"runs differ in length ({', '.join(unequal)}): they are not on an equal budget")
    if rows := [key for key in varied if key.startswith("data.")]:
        notes.append(f"runs differ in their training data ({', '.join(rows)})")
    if models := [key for key in varied if key.split(".")[0] in ("model", "adapter", "reference")]:
        notes.append(f"runs differ in {', '.join(models)}: their KL and drift are from different starting points")
    if "seed" not in varied:
        notes.append("one seed: what another seed would change stays unknown (sweep.seed=[0, 1, 2])")
    return notes
