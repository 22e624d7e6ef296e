"""What a person wrote: a recipe file with its `sweep` section, and the changes on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from prefopt.errors import Problem, RecipeError
from prefopt.recipe import find_recipe, recipe_from_mapping
from prefopt.recipe.load import read_mapping
from prefopt.recipe.override import SHORTHANDS, Override, apply_override, parse_overrides, replace_alternative
from prefopt.sweep.axes import Axes, Axis
from prefopt.sweep.matching import completion_tokens
from prefopt.sweep.section import SETTINGS, parse_axes, without_axis

LEARNING_RATE = "train.learning_rate"
THIRDS = (1 / 3, 1, 3)
OTHER_WAY = {"train.epochs": "train.max_steps", "train.max_steps": "train.epochs"}


@dataclass
class SweepSource:
    """The recipe file, its sweep section apart."""

    name: str
    base: dict[str, Any]
    axes: Axes
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def tokens(self) -> float:
        """Tokens of a completion; measured once, on the data of the base recipe."""
        assert self.axes.match is not None
        if self.axes.match.tokens is not None:
            return float(self.axes.match.tokens)
        recipe = {**self.base, "loss": "dpo"}
        return completion_tokens(recipe_from_mapping(recipe, name=self.name))

    @property
    def measured_tokens(self) -> float | None:
        """The same; None where no loss asked for it."""
        return vars(self).get("tokens")


def read_source(name_or_path: str, overrides: Sequence[str]) -> SweepSource:
    """Return what a file and the command line say together; its `problems` say what is wrong with it."""
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
    problems += [problem for change in plain if (problem := _without_effect(change, axes))]
    problems += _other_held_out(mapping, axes)
    name = path.parent.resolve().name if path.stem == "recipe" else path.stem
    source = SweepSource(name, mapping, axes, problems)
    _vary_learning_rate(source)
    return source


def _with_overrides(section: Any, overrides: Sequence[Override], problems: list[Problem]) -> Any:
    """Set axes and settings from the command line; an axis is one key, dots and all, however the file nests it."""
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
            section = {**without_axis(section, ".".join(rest)), ".".join(rest): change.value}
    return section


def _without_effect(change: Override, axes: Axes) -> Problem | None:
    """Say where an axis decides what a change on the command line sets."""
    key = ".".join(change.path)
    everywhere = {axis.key for axis in axes.grid} | {each.key for each in axes.distributions}
    if axes.points:
        everywhere |= set.intersection(*({axis.key for axis in point} for point in axes.points))
    same = {key, OTHER_WAY.get(key, key)}
    if key in SHORTHANDS and isinstance(change.value, str):
        same.add(f"{key}.{SHORTHANDS[key]}")
    axis = next((one for one in sorted(everywhere) if one in same or f"{key}.".startswith(f"{one}.")), None)
    if axis is None:
        return None
    fix = f"sweep.{key if key in OTHER_WAY else axis}=[{change.value}] for one value of it"
    if axis not in same:
        fix = f"write it into the values of {axis}, or vary {axis}.{SHORTHANDS.get(axis, 'name')} instead"
    return Problem(change.written, "a key that the sweep does not vary", f"{axis}, an axis", fix)


def _other_held_out(base: dict[str, Any], axes: Axes) -> Iterator[Problem]:
    """Say where other training data would mean other held-out data."""
    data = base.get("data")
    if not isinstance(data, dict) or data.get("eval") is not None:
        return
    for key in axes.varied():
        if key == "data.split" or f"{key}.".startswith("data.train."):
            given = f"{key} as an axis, with held-out comparisons taken from data.train"
            fix = "give all runs the same held-out data: data.eval=FILE"
            yield Problem(f"sweep.{key}", "the same held-out data in every run", given, fix)


def _vary_learning_rate(source: SweepSource) -> None:
    """Make the learning rate an axis where the sweep does not say: gradient scales differ between losses."""
    train = source.base.get("train")
    base = train.get("learning_rate", 5e-7) if isinstance(train, dict) else 5e-7
    if not isinstance(base, int | float):
        return  # the recipe's own check says what is wrong
    values = tuple(float(f"{base * factor:.2g}") for factor in THIRDS)
    varied = source.axes.with_default(Axis(LEARNING_RATE, values))
    if varied == source.axes:
        return
    source.axes = varied
    shown = ", ".join(f"{value:g}" for value in values)
    source.notes.append(
        f"learning rates {shown}: losses differ in the scale of their gradients, so each is tried at a third and at "
        f"three times the recipe's (sweep.{LEARNING_RATE}=[...] chooses others)"
    )
