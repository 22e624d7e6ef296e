"""A loss written in the algebra itself: the block `terms:` of a recipe.

{name: mine, terms: [{f: squared, beta: 0.2, aggregate: mean}, {f: linear, contrast: chosen, coefficient: 0.5}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prefopt_losses.convex import Function
from prefopt_losses.errors import LossError, suggest
from prefopt_losses.hyperparameters import NonNegative, Positive, Real, check
from prefopt_losses.loss import Loss
from prefopt_losses.methods import METHODS
from prefopt_losses.methods.pairwise import PREFERENCE_PROBABILITY
from prefopt_losses.methods.reference_free import TOKEN_SHARE
from prefopt_losses.own_function import named_function
from prefopt_losses.score import LINKS, Score
from prefopt_losses.terms import CHOSEN, NEGATED_CHOSEN, PAIR, REJECTED, Contrast, Term

CONTRASTS: dict[str, Contrast] = {
    "pair": PAIR,
    "chosen": CHOSEN,
    "rejected": REJECTED,
    "negated_chosen": NEGATED_CHOSEN,
}
NAME = "terms"
"""What a loss without a name of its own is called."""


def term(
    *,
    f: str | Function = "logistic",
    beta: Positive = 1.0,
    aggregate: Literal["sum", "mean"] = "sum",
    reference: bool = True,
    link: str = "identity",
    contrast: Literal["pair", "chosen", "rejected", "negated_chosen"] = "pair",
    shift: Real = 0.0,
    q: Real = 1.0,
    soft_labels: bool = False,
    coefficient: NonNegative = 1.0,
    weight: Literal["one", "token_share"] = "one",
) -> Term:
    """One term: coefficient * weight * ( q f(x) + (1 - q) f(-x) ),  x = beta * ( a . s - shift ).

    Args:
        f: a name (logistic, hinge, squared, ...), or your own as `module:function`.
        beta: multiplies the contrast; always GPO's beta, also where f is squared.
        aggregate: log-probs summed or averaged over completion tokens.
        reference: whether the reference's log-prob is subtracted.
        link: applied to the score: identity, log_odds, ...
        contrast: pair (chosen minus rejected), chosen, rejected (its score negated), negated_chosen.
        shift: target margin in the unit of the score, subtracted before beta multiplies.
        q: label: 1 hard, 1 - eps smoothed, (1 - eps) / (1 - 2 eps) robust.
        soft_labels: take q = preference_probability instead.
        coefficient: factor of the term.
        weight: one, or token_share, which turns means over completions into means over tokens.
    """
    problems = []
    if link not in LINKS:
        problems.append(f"link: no link {link!r}.{suggest(link, LINKS)} Known: {', '.join(LINKS)}.")
    if soft_labels and q != 1:
        problems.append(f"q: expected no q beside soft_labels, which is a q of its own, given {q!r}.")
    if weight == "token_share" and (contrast, aggregate) != ("chosen", "mean"):
        problems.append(f"weight: expected one, for token_share is for means of chosen completions, given {weight!r}.")
    if problems:
        raise LossError(problems)
    return Term(
        named_function(f),
        Score(aggregate, reference, LINKS[link]),
        CONTRASTS[contrast],
        beta,
        shift,
        PREFERENCE_PROBABILITY if soft_labels else q,
        coefficient,
        TOKEN_SHARE if weight == "token_share" else 1.0,
    )


def loss_of_terms(config: Mapping[str, Any], where: str) -> Loss:
    """Return the loss that `terms:` spells out.

    Args:
        config: `terms`, a list of the arguments of `term`; and optionally `name`.
        where: key path of the config, which starts every problem.

    Raises:
        LossError: with the problems of all terms at once.
    """
    problems = _around(config, where)
    listed = () if problems and _not_a_list(config["terms"]) else config["terms"]
    terms, written = [], []
    for index, given in enumerate(listed):
        place = f"{where}.terms[{index}]"
        if not isinstance(given, Mapping):
            problems.append(f"{place}: expected a mapping such as {{f: squared, beta: 0.2}}, given {given!r}.")
            continue
        arguments, wrong = check(term, {str(key): value for key, value in given.items()}, place, {})
        problems += wrong
        right = {
            key: value for key, value in arguments.items() if not any(_is_about(each, place, key) for each in wrong)
        }
        try:
            terms.append(term(**right))
            written.append(arguments)
        except LossError as error:
            problems += [f"{place}.{problem}" for problem in error.problems]
    if problems:
        raise LossError(problems)
    return Loss(str(config.get("name", NAME)), tuple(terms), {"terms": written})


def _is_about(problem: str, place: str, key: str) -> bool:
    return problem.startswith(f"{place}.{key}: ")


def _around(config: Mapping[str, Any], where: str) -> list[str]:
    """Problems with the block around the terms."""
    problems = [
        f"{where}.{key}: no such key beside terms. Accepted: name, terms, weight."
        for key in config
        if key not in ("name", "terms", "weight")
    ]
    name, listed = config.get("name", NAME), config["terms"]
    if not isinstance(name, str) or not name or name in METHODS:
        problems.append(f"{where}.name: expected a name of your own, not one of a published method, given {name!r}.")
    if _not_a_list(listed):
        problems.append(
            f"{where}.terms: expected a list of terms such as [{{f: squared, beta: 0.2}}], given {listed!r}."
        )
    return problems


def _not_a_list(listed: object) -> bool:
    return not isinstance(listed, Sequence) or isinstance(listed, str) or not listed
