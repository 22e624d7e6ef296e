"""A name, or a recipe's mapping or list -> Loss.

get_loss("ipo", beta=0.05)
get_loss("dpo+0.5*sft")
loss_from_config([{"name": "dpo", "beta": 0.1}, {"name": "sft", "weight": 0.5}])
loss_from_config({"terms": [{"f": "squared", "beta": 0.2, "aggregate": "mean"}]})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from prefopt_losses.errors import LossError, suggest
from prefopt_losses.hyperparameters import check
from prefopt_losses.loss import Loss
from prefopt_losses.methods import METHODS, OTHER_NAMES
from prefopt_losses.written import loss_of_terms

FOREIGN = {
    "loss_type": "it is the name of the loss here: {name: ...}.",
    "reference_free": "losses without a reference are methods of their own here: cpo, simpo, orpo, ...",
}
"""What other tools write into every loss, and what to write here."""

LossConfig: TypeAlias = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def get_loss(name: str, **hyperparameters: Any) -> Loss:
    """Return the loss of a published method, or a sum of methods with their default hyper-parameters.

    Args:
        name: a name of the table, or a sum: `"simpo+sft"`, `"dpo+0.5*sft"`.
        hyperparameters: the method's own, by keyword; none with a sum (add two losses instead).

    Raises:
        LossError: unknown name or hyper-parameter, wrong type or range; all problems at once.
    """
    if not isinstance(name, str):
        hint = " A mapping or a list of a recipe is for loss_from_config." if isinstance(name, (Mapping, list)) else ""
        raise LossError(f"loss: expected the name of a loss, given {name!r}.{hint}")
    if "+" not in name and "*" not in name:
        return _method(name, hyperparameters, where=name)
    if hyperparameters:
        raise LossError(
            f"{name}: a sum written as a name takes its methods' default hyper-parameters. "
            'Add losses instead: get_loss("dpo", beta=0.1) + 0.5 * get_loss("sft").'
        )
    return loss_from_config([_weighted_name(part) for part in name.split("+")])


def loss_from_config(config: LossConfig, *, where: str = "loss") -> Loss:
    """Return the loss that a recipe describes.

    Args:
        config: a name; a mapping of `name` and the method's hyper-parameters; a mapping with `terms`, the loss
            written in the algebra; or a list of these, each with an optional `weight` (1 by default): their sum.
        where: key path of the config, which starts every problem.

    Raises:
        LossError: with the problems of all parts at once.
    """
    if isinstance(config, str):
        return get_loss(config) if "+" in config or "*" in config else _method(config, {}, where)
    if isinstance(config, Mapping):
        return _part(config, where)
    if not isinstance(config, Sequence) or not config:
        raise LossError(f"{where}: expected a name, a mapping with `name`, or a list of these, given {config!r}.")
    losses, problems = [], []
    for index, part in enumerate(config):
        try:
            losses.append(_part({"name": part} if isinstance(part, str) else part, f"{where}[{index}]", weighted=True))
        except LossError as error:
            problems += error.problems
    if problems:
        raise LossError(problems)
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


def _method(name: str, given: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> Loss:
    if f"gpo_{name}" in METHODS:  # GPO's functions under their plain names
        name = f"gpo_{name}"
    if name not in METHODS:
        raise LossError(f"{where}: no loss {name!r}.{_instead(name) or _all_names()}")
    method = METHODS[name]
    hyperparameters, problems = check(method.make, given, where, {**FOREIGN, **method.foreign}, also)
    if problems:
        raise LossError(problems)
    try:
        terms = method.make(**hyperparameters)
    except LossError as error:
        raise LossError(f"{where}.{problem}" for problem in error.problems) from error
    return Loss(name=name, terms=terms, hyperparameters=hyperparameters, note=method.note)


def _part(config: Mapping[str, Any], where: str, *, weighted: bool = False) -> Loss:
    if isinstance(config, Mapping) and "terms" in config:
        return _weighted(config, where, lambda: loss_of_terms(config, where))
    if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
        raise LossError(f"{where}: expected a name or a mapping with `name`, given {config!r}.")
    hyperparameters = {str(key): value for key, value in config.items() if key not in ("name", "weight")}
    also = ("weight",) if weighted else ()
    return _weighted(config, where, lambda: _method(config["name"], hyperparameters, where, also))


def _weighted(config: Mapping[str, Any], where: str, make: Callable[[], Loss]) -> Loss:
    """Make a loss and multiply it by the config's weight, with the problems of both."""
    problems = []
    if "weight" in config and not _is_weight(config["weight"]):
        problems.append(f"{where}.weight: expected a finite number >= 0, given {config['weight']!r}.")
    try:
        loss = make()
    except LossError as error:
        raise LossError(problems + error.problems) from error
    if problems:
        raise LossError(problems)
    return config["weight"] * loss if "weight" in config else loss


def _is_weight(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _weighted_name(text: str) -> dict[str, Any]:
    weight, star, name = text.rpartition("*")
    if not star:
        return {"name": name.strip()}
    try:
        return {"name": name.strip(), "weight": float(weight)}
    except ValueError:
        raise LossError(f"{text.strip()}: expected weight * name, as in 0.5*sft.") from None


def _all_names() -> str:
    return f" Known: {', '.join(METHODS)}."


def _instead(name: str) -> str:
    if "+" in name or "*" in name:
        return " Write a sum as a list, [{name: dpo, beta: 0.2}, {name: sft, weight: 0.5}]."
    if name in OTHER_NAMES:
        return f' It is called "{OTHER_NAMES[name]}" here.'
    return suggest(name, METHODS)
