"""`data.filter`: column -> value, list of values, or a comparison such as `">= 0.6"`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from prefopt.errors import DataError, Problem, suggest

Condition = Callable[[Any], bool]

_COMPARISON = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(.*?)\s*", re.DOTALL)
_ORDER: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def parse_filter(conditions: Mapping[str, Any]) -> dict[str, Condition]:
    """Return a condition per column.

    A string that begins with >=, <=, >, <, == or != is a comparison; any other string, number, boolean or
    null must be equal; of a list, one value must be. Numbers in text (CSV) count as numbers. A missing or
    non-numeric value satisfies no order; `"!= null"` keeps the rows that have the column at all.

    Raises:
        DataError: a comparison without a number, or a value that cannot be compared; all at once.
    """
    parsed: dict[str, Condition] = {}
    problems: list[Problem] = []
    for column, wanted in conditions.items():
        try:
            parsed[column] = _condition(wanted)
        except ValueError as error:
            problems.append(Problem(f"data.filter.{column}", str(error), repr(wanted), 'write for example: ">= 0.6"'))
    if problems:
        raise DataError(problems)
    return parsed


def keeps(conditions: Mapping[str, Condition], values: Mapping[str, Any]) -> bool:
    """Return whether a row satisfies every condition; an absent column counts as null."""
    return all(condition(values.get(column)) for column, condition in conditions.items())


def unknown_columns(conditions: Mapping[str, Condition], found: list[str], where: str) -> list[Problem]:
    """Return a problem for every filter column that is not among the columns found."""
    return [
        Problem(
            f"data.filter.{column}",
            f"a column of {where}, which has: {', '.join(found)}",
            column,
            suggest(column, found) or "use one of these columns",
        )
        for column in conditions
        if column not in found
    ]


def _condition(wanted: Any) -> Condition:
    if isinstance(wanted, list | tuple):
        values = [_plain(value) for value in wanted]
        return lambda given: any(_equal(given, value) for value in values)
    match = _COMPARISON.fullmatch(wanted) if isinstance(wanted, str) else None
    if match is None:
        value = _plain(wanted)
        return lambda given: _equal(given, value)
    sign, right = match.groups()
    other = None if right == "null" else right
    if sign == "==":
        return lambda given: _equal(given, other)
    if sign == "!=":
        return lambda given: not _equal(given, other)
    limit = _number(right)
    if limit is None:
        raise ValueError(f"a number after {sign}")
    compare = _ORDER[sign]
    return lambda given: (number := _number(given)) is not None and compare(number, limit)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError("a text, a number, true, false, null, a list of these, or a comparison")


def _equal(given: Any, wanted: Any) -> bool:
    if isinstance(given, bool) or isinstance(wanted, bool):
        return str(given).lower() == str(wanted).lower()
    left, right = _number(given), _number(wanted)
    return left == right if left is not None and right is not None else given == wanted


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except ValueError:
        return None
