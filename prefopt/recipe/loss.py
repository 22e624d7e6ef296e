"""The `loss` key: its spellings, one normal form, and what the loss library says about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from prefopt.errors import Problem

if TYPE_CHECKING:
    from prefopt_losses import Loss

LossInput = str | dict[str, Any] | list[str | dict[str, Any]]
"""`ipo`, `dpo+0.5*sft`, `{name: dpo, beta: 0.1}`, or `[dpo, {name: sft, weight: 0.5}]`."""


def normal_loss(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the loss as a tuple of mappings with every hyper-parameter, defaults included.

    Args:
        value: any of the spellings.

    Raises:
        PydanticCustomError: carries every problem in its context.
    """
    from prefopt_losses import LossError, loss_from_config  # torch: seconds, and not needed to list recipes

    try:
        config = loss_from_config(value)
    except LossError as error:
        problems = [loss_problem(text, value) for text in error.problems]
        raise PydanticCustomError("problems", "the loss cannot be built", {"problems": problems}) from None
    normal = config.config
    return (normal,) if isinstance(normal, dict) else tuple(normal)


def build_loss(terms: Sequence[Mapping[str, Any]]) -> Loss:
    """Return the loss that the normal form describes."""
    from prefopt_losses import loss_from_config

    return loss_from_config(written_loss(terms))


def written_loss(terms: Sequence[Mapping[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the normal form as a recipe writes it: one mapping, or a list for a weighted sum."""
    if len(terms) == 1 and "weight" not in terms[0]:
        return dict(terms[0])
    return [dict(term) for term in terms]


EXPECTED_GIVEN = re.compile(r"expected (.+), given (.+?)\.?", re.DOTALL)
NO_SUCH = re.compile(r"no such hyper-parameter\. ?(.*?) ?Accepted: (.+?)\.?", re.DOTALL)
NO_LOSS = re.compile(r"no loss .+?\. ?(.+)", re.DOTALL)
NO_FUNCTION = re.compile(r"no function .+?\. ?(.*?) ?Known: (.+?)\.?", re.DOTALL)
FUNCTION = "an elementwise, differentiable function: float tensor in, float tensor of the same shape out"


def loss_problem(text: str, value: Any) -> Problem:
    """Take a sentence such as `loss[1].btea: no such hyper-parameter. ... Accepted: beta.` apart."""
    where, _, said = text.partition(": ")
    path = where.replace("[", ".").replace("]", "").split(".")[1:]
    where = ".".join(["loss", *path])
    given = _shown_at(value, path)
    if match := EXPECTED_GIVEN.fullmatch(said):
        return Problem(where, match[1], match[2])
    of_a_loss = bool(path) and not path[-1].isdecimal()
    kind = "a hyper-parameter of this loss" if of_a_loss else "a loss"
    if match := NO_SUCH.fullmatch(said):
        fix = match[1][:1].lower() + match[1][1:]
        return Problem(where, f"{kind}: {match[2]}", given, fix or "`prefopt losses` explains them")
    if match := NO_LOSS.fullmatch(said):
        fix = "" if match[1].startswith("Known") else match[1][:1].lower() + match[1][1:]
        return Problem(where, "the name of a loss; `prefopt losses` lists them", given, fix)
    if match := NO_FUNCTION.fullmatch(said):
        fix = match[1][:1].lower() + match[1][1:]
        return Problem(where, f"the name of a function: {match[2]}", given, fix)
    if path and path[-1] == "f":
        return Problem(
            where, FUNCTION, f"{given}: {said.removeprefix('f: ').removeprefix(given).removeprefix(': ').strip()}"
        )
    return Problem(where, kind, given, said)


def _shown_at(value: Any, path: Sequence[str]) -> str:
    for part in path:
        if isinstance(value, list | tuple) and part.isdecimal():
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)
