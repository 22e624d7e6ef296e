"""The `sweep` section of a recipe file: which keys vary, and over what."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefopt.errors import Problem
from prefopt.recipe.allowed import keys_of, schema_at
from prefopt.recipe.explain import shown, unknown_key

SETTINGS = ("points", "samples", "samples_seed", "match", "early_stopping")
"""Keys of the section that are no axes."""
KINDS = ("uniform", "log_uniform", "choice")
SAME_FOR_ALL = ("data.eval", "data.eval_fraction", "data.held_out_seed", "eval.")
"""Keys that decide what is measured: runs that differ in them cannot be compared."""
NO_NUMBER = ("output", "tracking.", "checkpoint.", "data.processes")
"""Keys that change no number of a run."""
MATCH_KEY = "match"
"""In a point: whether this point's betas are matched."""


@dataclass(frozen=True)
class Axis:
    """One key and its values."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Distribution:
    """One key and what its values are drawn from."""

    key: str
    kind: str
    given: tuple[Any, ...]
    """Lower and upper end, or the choices."""

    def draw(self, generator: random.Random) -> Any:
        """Return one value; numbers are rounded to three digits, for they become names of folders."""
        if self.kind == "choice":
            return generator.choice(self.given)
        low, high = self.given
        if self.kind == "uniform":
            return float(f"{generator.uniform(low, high):.3g}")
        return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.3g}")


@dataclass(frozen=True)
class Match:
    """Betas are DPO's; every other loss takes the beta that regularises as strongly."""

    tokens: float | None = None
    """Tokens of a completion, for losses that take means; None measures them on the data."""


@dataclass(frozen=True)
class EarlyStopping:
    """ASHA: at each rung only the best 1 / factor of the runs go on."""

    metric: str = "eval.accuracy"
    grace: float = 0.25
    """Share of a run before which it is not stopped."""
    factor: int = 3


@dataclass(frozen=True)
class Axes:
    """Everything that the section says."""

    grid: tuple[Axis, ...] = ()
    points: tuple[tuple[Axis, ...], ...] = ()
    """Each a small grid of its own; crossed with the axes."""
    distributions: tuple[Distribution, ...] = ()
    samples: int = 1
    samples_seed: int = 0
    match: Match | None = None
    early_stopping: EarlyStopping | None = None

    def varied(self) -> list[str]:
        """Return every key that varies, each once, in the order in which they are written."""
        inside = [axis.key for point in self.points for axis in point if axis.key != MATCH_KEY]
        return list(
            dict.fromkeys([*inside, *(axis.key for axis in self.grid), *(each.key for each in self.distributions)])
        )

    def with_axis(self, axis: Axis) -> Axes:
        """Return the same with one axis more."""
        return replace(self, grid=(*self.grid, axis))

    def count(self) -> int:
        """Return the number of runs."""
        points = sum(math.prod(len(axis.values) for axis in point) for point in self.points) if self.points else 1
        return points * self.samples * math.prod(len(axis.values) for axis in self.grid)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yield what each run changes; seeds vary slowest, so that a sweep that is stopped has whole seeds."""
        seeds = [axis for axis in self.grid if axis.key == "seed"]
        others = [axis for axis in self.grid if axis.key != "seed"]
        generator = random.Random(self.samples_seed)
        drawn = [{each.key: each.draw(generator) for each in self.distributions} for _ in range(self.samples)]
        points: list[dict[str, Any]] = [changes for point in self.points for changes in _grid(point)] or [{}]
        for outer in _grid(seeds):
            for point, inner, draws in itertools.product(points, list(_grid(others)), drawn):
                yield {**point, **inner, **draws, **outer}


def _grid(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*(axis.values for axis in axes)):
        yield {axis.key: value for axis, value in zip(axes, values)}


def parse_axes(section: Any) -> tuple[Axes, list[Problem]]:
    """Return what a `sweep` section says, and everything that is wrong with it."""
    if not isinstance(section, dict) or not section:
        example = "sweep: {loss.name: [dpo, ipo], loss.beta: [0.05, 0.1], seed: [0, 1, 2]}"
        return Axes(), [Problem("sweep", "a mapping from recipe keys to lists of values", shown(section), example)]
    problems: list[Problem] = []
    grid: list[Axis] = []
    distributions: list[Distribution] = []
    for key, value in _flat({name: value for name, value in section.items() if name not in SETTINGS}):
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
    problems += _twice(axes)
    axes, wrong = _settings(axes, section)
    return axes, problems + wrong


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
    if key.startswith(NO_NUMBER):
        return Problem(where, "a key that changes what a run computes", key, "set it outside the sweep section")
    if key.startswith(SAME_FOR_ALL):
        fix = "set it outside the sweep section, for all runs"
        return Problem(where, "the same held-out data and measures in every run", f"{key} as an axis", fix)
    for depth, part in enumerate(path if path[0] != "loss" else ()):
        before: tuple[Any, ...] = tuple(int(each) if each.isdecimal() else each for each in path[:depth])
        known = keys_of(before)
        if part.isdecimal() or part in known:
            continue
        if not known and depth and schema_at(before).get("type") == "object":
            break  # columns and filters have names of the user's own
        found = unknown_key((*before, part))
        return Problem(where, f"an axis is a recipe key; {found.expected}", key, found.fix)
    return None


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
        numbers = [each for each in given if isinstance(each, int | float) and not isinstance(each, bool)]
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


def _twice(axes: Axes) -> Iterator[Problem]:
    """Say which keys are given in two ways, so that one would be ignored."""
    inside = {axis.key for point in axes.points for axis in point}
    for key in [*(axis.key for axis in axes.grid), *(each.key for each in axes.distributions)]:
        if key in inside:
            fix = "give it in one of the two; a point may hold a list"
            yield Problem(f"sweep.{key}", "every key once", f"{key} as an axis and in sweep.points", fix)


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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _match(given: Any) -> tuple[Match | None, list[Problem]]:
    if given in (None, "none"):
        return None, []
    rule = {"rule": given} if isinstance(given, str) else given
    tokens = rule.get("tokens") if isinstance(rule, dict) else None
    known = isinstance(rule, dict) and set(rule) <= {"rule", "tokens"} and rule.get("rule", "kappa") == "kappa"
    if not known or not (tokens is None or (isinstance(tokens, int | float) and tokens > 0)):
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
        "metric": (lambda value: isinstance(value, str) and value.startswith("eval."), "a metric: eval.accuracy"),
        "grace": (
            lambda value: isinstance(value, int | float) and 0 < value < 1,
            "a share of the run, 0 to 1",
        ),
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
