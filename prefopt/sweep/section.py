"""The `sweep` section of a recipe file: which keys vary, and over what; every mistake in it is named."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefopt.errors import Problem
from prefopt.recipe import Recipe
from prefopt.recipe.allowed import keys_of, schema_at
from prefopt.recipe.explain import shown, unknown_key
from prefopt.recipe.measures import BETTER
from prefopt.recipe.override import SHORTHANDS
from prefopt.sweep.axes import MATCH_KEY, Axes, Axis, Distribution, EarlyStopping, Match

SETTINGS = ("points", "samples", "samples_seed", "match", "early_stopping")
"""Keys of the section that are no axes."""
KINDS = ("uniform", "log_uniform", "choice")
SAME_FOR_ALL = (
    "eval", "data.eval", "data.eval_fraction", "data.held_out_seed", "data.max_length", "data.truncation",
    "data.columns", "data.filter", "data.eos", "data.chat_template",
)  # fmt: skip
"""Keys that decide what is measured: runs that differ in them cannot be compared."""
NO_NUMBER = ("output", "tracking", "checkpoint", "data.processes")
"""Keys that change no number of a run."""
SECTIONS = ("data", "train")
"""Keys that are no settings: their own keys are, and a whole section would hide which of them varies."""


def parse_axes(section: Any) -> tuple[Axes, list[Problem]]:
    """Return what a `sweep` section says, and everything that is wrong with it."""
    if not isinstance(section, dict) or not section:
        example = "sweep: {loss.name: [dpo, ipo], loss.beta: [0.05, 0.1], seed: [0, 1, 2]}"
        return Axes(), [Problem("sweep", "a mapping from recipe keys to lists of values", shown(section), example)]
    problems: list[Problem] = []
    grid: list[Axis] = []
    distributions: list[Distribution] = []
    written = list(_flat({name: value for name, value in section.items() if name not in SETTINGS}))
    for key, value in written:
        where = f"sweep.{key}"
        if found := key_problem(where, key):
            problems.append(found)
        elif isinstance(value, dict):
            distribution, wrong = _distribution(where, key, value)
            problems += wrong
            distributions += [distribution] if distribution else []
        else:
            problems += _value_problems(where, value)
            grid += [Axis(key, tuple(value))] if isinstance(value, list) else []
    points, wrong = _points(section.get("points"))
    problems += wrong
    axes = Axes(tuple(grid), points, tuple(distributions))
    problems += _twice(axes, [key for key, _ in written])
    axes, wrong = _settings(axes, section)
    return axes, problems + wrong


def without_axis(section: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the section without one axis, be it written dotted or nested."""
    kept: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict) and key.startswith(f"{name}."):
            if inner := without_axis(value, key.removeprefix(f"{name}.")):
                kept[name] = inner
        elif name != key:
            kept[name] = value
    return kept


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield axes by dotted key: `train: {seed: [0]}` is `train.seed: [0]`; a distribution stays whole."""
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and not set(value) & set(KINDS):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def key_problem(where: str, key: str) -> Problem | None:
    """Say why a key cannot be an axis; None where it can."""
    path = key.split(".")
    if key in SECTIONS:
        keys = ", ".join(f"{key}.{name}" for name in keys_of((key,))[:3])
        return Problem(where, f"a setting; {key} is a section", key, f"vary its keys: {keys}, ...")
    if _within(key, NO_NUMBER):
        return Problem(where, "a key that changes what a run computes", key, "set it outside the sweep section")
    if _within(key, SAME_FOR_ALL):
        fix = "set it outside the sweep section, for all runs; what it changes is seen by sweeps of their own"
        return Problem(where, "the same held-out data and measures in every run", f"{key} as an axis", fix)
    for depth, part in enumerate(path if path[0] != "loss" else ()):
        before: tuple[Any, ...] = tuple(int(each) if each.isdecimal() else each for each in path[:depth])
        known = keys_of(before)
        if part.isdecimal() or part in known:
            continue
        if not known and depth and schema_at(before).get("type") == "object":
            break  # columns have names of the user's own
        found = unknown_key((*before, part))
        return Problem(where, f"an axis is a recipe key; {found.expected}", key, found.fix)
    return None


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _value_problems(where: str, value: Any) -> Iterator[Problem]:
    if not isinstance(value, list):
        yield Problem(where, "a list of values", shown(value), f"{where}=[{shown(value)}] for one value")
    elif not value:
        yield Problem(where, "at least one value", "an empty list", f"remove {where}, or give it values")
    else:
        again = [one for number, one in enumerate(value) if one in value[:number]]
        if again:
            yield Problem(where, "every value once", f"{shown(again[0])} twice", "keep one of them")


def _distribution(where: str, key: str, value: Mapping[str, Any]) -> tuple[Distribution | None, list[Problem]]:
    expected = "a list of values, or {uniform: [low, high]}, {log_uniform: [low, high]}, {choice: [...]}"
    kind, given = next(iter(value.items())) if len(value) == 1 else ("", None)
    if kind not in KINDS or not isinstance(given, list) or not given:
        return None, [Problem(where, expected, shown(dict(value)))]
    if kind != "choice":
        numbers = [each for each in given if _is_number(each)]
        least = 0.0 if kind == "log_uniform" else -math.inf
        if len(numbers) != 2 or len(given) != 2 or not least < numbers[0] < numbers[1]:
            positive = "two positive numbers" if kind == "log_uniform" else "two numbers"
            return None, [Problem(where, f"{kind}: {positive}, the smaller one first", shown(given))]
    return Distribution(key, kind, tuple(given)), []


def _points(given: Any) -> tuple[tuple[tuple[Axis, ...], ...], list[Problem]]:
    if given is None:
        return (), []
    expected = "a list of mappings: points: [{loss: dpo}, {loss.name: simpo, loss.beta: [2, 4]}]"
    if not isinstance(given, list) or not given:
        return (), [Problem("sweep.points", expected, shown(given))]
    points: list[tuple[Axis, ...]] = []
    problems: list[Problem] = []
    for number, point in enumerate(given):
        where = f"sweep.points.{number}"
        if not isinstance(point, dict) or not point:
            problems.append(Problem(where, expected, shown(point)))
            continue
        axes: list[Axis] = []
        for key, value in point.items():
            problems += _point_problems(f"{where}.{key}", key, value)
            axes.append(Axis(key, tuple(value) if isinstance(value, list) else (value,)))
        points.append(tuple(axes))
    return tuple(points), problems


def _point_problems(where: str, key: str, value: Any) -> Iterator[Problem]:
    if key == MATCH_KEY:
        if value not in ("kappa", "none"):
            yield Problem(where, "kappa or none", shown(value))
    elif found := key_problem(where, key):
        yield found
    elif isinstance(value, list):
        yield from _value_problems(where, value)


def _twice(axes: Axes, written: Sequence[str]) -> Iterator[Problem]:
    """Say which keys are given in two ways, so that one would be ignored."""
    inside = {axis.key for point in axes.points for axis in point}
    for key in dict.fromkeys(key for number, key in enumerate(written) if key in written[:number]):
        yield Problem(f"sweep.{key}", "every key once", f"{key} dotted and nested", "keep one of them")
    for key in [*(axis.key for axis in axes.grid), *(each.key for each in axes.distributions)]:
        for within in sorted(_set_inside(axes, key)):
            given = f"{key} as an axis, and in a value of {within}"
            yield Problem(f"sweep.{key}", "every key once", given, "take it out of one of the two")
        if key in inside:
            fix = "give it in one of the two; a point may hold a list"
            yield Problem(f"sweep.{key}", "every key once", f"{key} as an axis and in sweep.points", fix)


def _set_inside(axes: Axes, key: str) -> set[str]:
    """Return the axes of sections (`loss: [{name: dpo, beta: 0.1}]`) of which a value says what an axis says too."""
    every = [*axes.grid, *(axis for point in axes.points for axis in point)]
    found = set()
    for axis in every:
        if key.startswith(f"{axis.key}."):
            rest = key.removeprefix(f"{axis.key}.")
            named = SHORTHANDS.get(axis.key) == rest
            found |= {axis.key for value in axis.values if (rest in value if isinstance(value, dict) else named)}
    return found


def _settings(axes: Axes, section: Mapping[str, Any]) -> tuple[Axes, list[Problem]]:
    """Add samples, matching and early stopping."""
    problems: list[Problem] = []
    samples = section.get("samples")
    if samples is not None and not _is_count(samples):
        problems.append(Problem("sweep.samples", "a whole number of at least 1", shown(samples)))
    elif samples is not None and not any(isinstance(value, dict) for _, value in _flat(section)):
        fix = "draw a key: sweep.train.learning_rate={log_uniform: [1e-6, 1e-4]}"
        problems.append(Problem("sweep.samples", "an axis to draw from", f"{samples} samples of nothing", fix))
    elif samples is None and axes.distributions:
        drawn = ", ".join(each.key for each in axes.distributions)
        problems.append(Problem("sweep.samples", "how often to draw", "nothing", f"sweep.samples=20 draws {drawn}"))
    seed = section.get("samples_seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        problems.append(Problem("sweep.samples_seed", "a whole number", shown(seed)))
    match, wrong = _match(section.get("match"))
    stopping, more = _early_stopping(section.get("early_stopping"))
    counted = samples if _is_count(samples) else 1
    whole = replace(axes, samples=int(counted or 1), samples_seed=seed, match=match, early_stopping=stopping)
    return whole, [*problems, *wrong, *more]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _match(given: Any) -> tuple[Match | None, list[Problem]]:
    if given in (None, "none"):
        return None, []
    rule = {"rule": given} if isinstance(given, str) else given
    tokens = rule.get("tokens") if isinstance(rule, dict) else None
    known = isinstance(rule, dict) and set(rule) <= {"rule", "tokens"} and rule.get("rule", "kappa") == "kappa"
    if not known or not (tokens is None or (_is_number(tokens) and tokens > 0)):
        expected = "kappa, or {rule: kappa, tokens: 128} with the tokens of a completion"
        return None, [Problem("sweep.match", expected, shown(given))]
    return Match(tokens), []


def _early_stopping(given: Any) -> tuple[EarlyStopping | None, list[Problem]]:
    if given is None:
        return None, []
    keys = dict(given) if isinstance(given, dict) else {"rule": given}
    stopping = EarlyStopping()
    checks = {
        "rule": (lambda value: value == "asha", "asha"),
        "metric": (lambda value: isinstance(value, str) and value in BETTER, f"one of {', '.join(BETTER)}"),
        "grace": (lambda value: _is_number(value) and 0 < value < 1, "a share of the run, 0 to 1"),
        "factor": (lambda value: _is_count(value) and value >= 2, "a whole number of at least 2"),
    }
    problems = []
    for key, value in keys.items():
        holds, expected = checks.get(key, (lambda _: False, f"one of {', '.join(checks)}"))
        if not holds(value):
            problems.append(Problem(f"sweep.early_stopping.{key}", expected, shown(value)))
        elif key != "rule":
            stopping = replace(stopping, **{key: value})
    return (None if problems else stopping), problems


def early_stopping_problem(axes: Axes, recipe: Recipe) -> Problem | None:
    """Say where runs would be stopped by a number that they do not have, or that does not compare them."""
    if axes.early_stopping is None:
        return None
    metric, measured = axes.early_stopping.metric, recipe.eval
    units = [key for key in axes.varied() if key.split(".")[0] == "loss"]
    expected, given = "a measure that is taken during the run", ""
    if any(axis.key == "seed" and len(axis.values) > 1 for axis in axes.grid):
        expected = "one seed: a setting of which some seeds are stopped cannot be compared"
        fix = "sweep.seed=[0] to search, then a sweep of the best settings with several seeds and no early_stopping"
        return Problem("sweep.early_stopping", expected, "several seeds", fix)
    if not measured.every:
        given = f"{metric}, taken only at the end: eval.every is {measured.every}"
    elif "gold" in metric and (measured.gold_reward is None or not measured.samples):
        given = f"{metric}, without eval.gold_reward or eval.samples"
    elif metric == "eval.kl" and not measured.samples:
        given = f"{metric}, with eval.samples 0"
    elif metric == "eval.loss" and units:
        expected, given = "a measure that compares these runs", f"{metric}, in another unit for every {units[0]}"
    return Problem("sweep.early_stopping.metric", expected, given, f"one of {', '.join(BETTER)}") if given else None
