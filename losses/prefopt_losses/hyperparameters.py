"""A maker's signature is the schema of its hyper-parameters: names, types, ranges and defaults.

    def cdpo(*, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> tuple[Term, ...]

Nothing is declared twice: recipes, error messages, docstrings and the table of methods read this signature.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real as Number
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from prefopt_losses.errors import suggest


@dataclass(frozen=True)
class Range:
    """An interval of real numbers; `str` writes it for people."""

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        return above and (value <= self.high if self.includes_high else value < self.high)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "of either sign"
        lower = f"{'>=' if self.includes_low else '>'} {self.low:g}"
        return lower if self.high == math.inf else f"{lower} and {'<=' if self.includes_high else '<'} {self.high:g}"


Positive: TypeAlias = Annotated[float, Range(0, includes_low=False)]
NonNegative: TypeAlias = Annotated[float, Range(0)]
Real: TypeAlias = Annotated[float, Range(-math.inf)]
Fraction: TypeAlias = Annotated[float, Range(0, 1, includes_low=False)]
UnitInterval: TypeAlias = Annotated[float, Range(0, 1, includes_high=True)]
Smoothing: TypeAlias = Annotated[float, Range(0, 0.5)]
"""Probability that a label is flipped; at 0.5 labels say nothing and robust DPO divides by zero."""


@dataclass(frozen=True)
class HyperParameter:
    """One hyper-parameter of a method, read from its maker's signature."""

    name: str
    default: Any
    expected: str
    """The values it takes, for people: `a number > 0`."""
    choices: tuple[Any, ...] | None
    """All its values where they can be listed, else None."""
    annotation: Any


def schema(maker: Callable[..., Any]) -> dict[str, HyperParameter]:
    """Return the hyper-parameters of a maker, by name, in the order of its signature."""
    hints = get_type_hints(maker, include_extras=True)
    return {
        name: HyperParameter(name, parameter.default, _expected(hints[name]), _choices(hints[name]), hints[name])
        for name, parameter in inspect.signature(maker).parameters.items()
    }


def check(
    maker: Callable[..., Any],
    given: Mapping[str, Any],
    where: str,
    foreign: Mapping[str, str],
    also: tuple[str, ...] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Return all hyper-parameters, defaults filled in, and every problem with the ones given.

    Args:
        maker: whose signature is the schema.
        given: what the user wrote.
        where: prefix of each problem: a method's name or a recipe's key path.
        foreign: names other tools use for this method, and what to write instead.
        also: keys beside the hyper-parameters that a misspelt name may have meant.
    """
    accepted = schema(maker)
    problems = []
    for name, value in given.items():
        if name in accepted:
            if not _fits(value, accepted[name].annotation):
                problems.append(f"{where}.{name}: expected {accepted[name].expected}, given {value!r}.")
        elif name in foreign:
            problems.append(f"{where}.{name}: {foreign[name]}")
        else:
            known = [*accepted, *also]
            names = ", ".join(known) or "none"
            problems.append(f"{where}.{name}: no such hyper-parameter.{suggest(name, known)} Accepted: {names}.")
    return {name: given.get(name, each.default) for name, each in accepted.items()}, problems


def _expected(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return f"a number {get_args(annotation)[1]}"
    if get_origin(annotation) is Literal:
        return " or ".join(repr(choice) for choice in get_args(annotation))
    if annotation is bool:
        return "true or false"
    return "a name" if annotation is str else "the name of a function or a callable"


def _choices(annotation: Any) -> tuple[Any, ...] | None:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return (False, True) if annotation is bool else None


def _fits(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        number = isinstance(value, Number) and not isinstance(value, bool)
        return number and math.isfinite(value) and value in get_args(annotation)[1]
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if annotation is bool:
        return isinstance(value, bool)
    return isinstance(value, str) or (annotation is not str and callable(value))
