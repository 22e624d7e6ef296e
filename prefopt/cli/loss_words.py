"""The words after `prefopt losses`: which losses they mean, with which hyper-parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt.errors import Problem, UserError
from prefopt.recipe.loss import loss_problem
from prefopt.recipe.text import parse_yaml
from prefopt_losses import FUNCTIONS, METHODS, Loss, LossError, get_loss
from prefopt_losses.convex import Function
from prefopt_losses.own_function import named_function
from prefopt_losses.profiles.profile import Profile, profile, profile_terms

HYPERPARAMETER = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
EXPECTED_GIVEN = re.compile(r"(?:.*?: )?expected (.+), given (.+?)\.?", re.DOTALL)


@dataclass(frozen=True)
class Subject:
    """One thing to look at: a loss of the table, or a scalar function."""

    name: str
    """As it was written, with its hyper-parameters."""
    loss: Loss | None = None
    f: Function | None = None

    def profile(self, *, radius: float) -> Profile:
        """Return the profile of the function, or of the term that ranks; UserError where there is none."""
        what: Any = self.f if self.loss is None else self.loss
        try:
            return profile(what, radius=radius, name=self.name if self.loss is None else None)
        except LossError as error:
            raise UserError([_function_problem(self.name, text) for text in error.problems]) from None

    def term_profiles(self, *, radius: float) -> tuple[Profile, ...]:
        """Return one profile per term; none of a loss of lists, which has no function of one margin."""
        if self.loss is not None and self.loss.needs.lists:
            return ()
        if self.loss is None or len(self.loss.terms) == 1:
            return (self.profile(radius=radius),)
        try:
            return profile_terms(self.loss, radius=radius)
        except LossError as error:
            raise UserError([_function_problem(self.name, text) for text in error.problems]) from None


@dataclass
class _Asked:
    name: str
    given: dict[str, Any] = field(default_factory=dict)


def subjects(words: Sequence[str]) -> list[Subject]:
    """Return what the words name: `dpo beta=0.2 ipo my.module:f` are three, the first with a hyper-parameter.

    Raises:
        UserError: with every unknown name, wrong hyper-parameter and function that cannot be used.
    """
    asked: list[_Asked] = []
    problems: list[Problem] = []
    for word in words:
        match = HYPERPARAMETER.fullmatch(word)
        if match and asked:
            if match[1] in asked[-1].given:
                problems.append(Problem(word, "every hyper-parameter once", f"{match[1]} twice", "keep one of the two"))
            asked[-1].given[match[1]] = parse_yaml(match[2], where=match[1])
        elif match:
            problems.append(Problem(word, "a loss in front of its hyper-parameters", word, f"write dpo {word}"))
        else:
            asked.append(_Asked(word))
    found = []
    for each in asked:
        try:
            found.append(_subject(each))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return found


def _subject(asked: _Asked) -> Subject:
    name, given = asked.name, asked.given
    if ":" in name or (name in FUNCTIONS and name not in METHODS):
        if given:
            keys = ", ".join(given)
            raise UserError(Problem(name, "a function by itself", keys, f"give it to a loss: gpo f={name} beta=0.1"))
        return Subject(name, f=_function(name))
    try:
        loss = get_loss(name, **given)
    except LossError as error:
        raise UserError([_loss_problem(text, name, given) for text in error.problems]) from None
    return Subject(" ".join([name, *(f"{key}={_plain(value)}" for key, value in given.items())]), loss=loss)


def _loss_problem(text: str, name: str, given: dict[str, Any]) -> Problem:
    if text.startswith("loss["):  # a part of a sum
        return loss_problem(text, [part.strip() for part in name.split("+")])
    if text.startswith((f"{name}:", f"{name}.")):
        return loss_problem(text, {"name": name, **given})
    return Problem(name, "a loss, or a sum of losses", name, text)


def _function(name: str) -> Function:
    module, _, function = name.partition(":")
    if ":" in name and not (module and function):
        raise UserError(Problem(name, "module:function", name, "such as my_package.my_losses:mine"))
    try:
        return named_function(name)
    except LossError as error:
        raise UserError([_function_problem(name, text) for text in error.problems]) from None
    except SystemExit:
        problem = Problem(name, "a module that can be imported", f"{module} ended the program while it was imported")
        raise UserError(problem) from None


def _function_problem(name: str, text: str) -> Problem:
    """Take a sentence of the loss library about a function apart."""
    said = text.removeprefix("f: ").removeprefix(name).removeprefix(": ").strip()
    if match := EXPECTED_GIVEN.fullmatch(said):
        return Problem(name, match[1], *match[2].split("; ", 1))
    if " has no function " in said:
        return Problem(name, "a function of that module", said)
    expected = "an elementwise, differentiable function: float tensor in, float tensor of the same shape out"
    return Problem(name, expected, said, "use torch.where instead of if" if "ambiguous" in said else "")


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def matched_loss(word: str) -> Loss:
    """Return the loss of `NAME:BETA`, such as `dpo:0.1`; UserError where the word is not that."""
    name, _, beta = word.partition(":")
    try:
        value = float(beta)
    except ValueError:
        raise UserError(Problem("--match", "NAME:BETA", word, f"such as --match {name or 'dpo'}:0.1")) from None
    try:
        return get_loss(name, beta=value)
    except LossError as error:
        raise UserError([_loss_problem(text, name, {"beta": value}) for text in error.problems]) from None
