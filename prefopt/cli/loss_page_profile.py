"""What the profile of a loss says, as Markdown: for each of its functions a picture, verdicts and numbers.

A verdict on a function is one on the loss only where the loss is that function of a margin and nothing else: no second
term, no link, no coordinate from the data. Elsewhere what would not follow is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass

import torch

from prefopt_losses import Loss
from prefopt_losses.convex import Function, linear
from prefopt_losses.profiles.profile import Profile, effective, profile
from prefopt_losses.profiles.verdicts import cures, number, verdicts
from prefopt_losses.score import Score, identity
from prefopt_losses.terms import CHOSEN, NEGATED_CHOSEN, NEITHER, PAIR, REJECTED, FromRecord, Term, function_name


@dataclass(frozen=True)
class PageFunction:
    """One scalar function of a loss, and the terms that apply it."""

    name: str
    """As profiles call it: with parameters, and with its label where that is not 1."""
    picture: str
    """File name without ending; losses with the same function share it."""
    f: Function
    terms: tuple[Term, ...]


def page_functions(loss: Loss) -> list[PageFunction]:
    """Return the different functions of a loss, the one that ranks first.

    Left out are terms that are constant in both completions, and lines in a single log-prob, such as NLL.
    """
    found: dict[str, list[Term]] = {}
    for term in sorted(loss.terms, key=lambda each: each is not loss.ranking_term):
        if isinstance(term, Term) and term.contrast != NEITHER and (term.f is not linear or term.contrast == PAIR):
            found.setdefault(profile_name(term), []).append(term)
    return [
        PageFunction(name, _picture(loss.name, terms[0]), effective(terms[0]), tuple(terms))
        for name, terms in found.items()
    ]


def profile_name(term: Term) -> str:
    """Return what profiles call the function of a term."""
    called = repr(term.f) if is_dataclass(term.f) else function_name(term.f)
    if isinstance(term.q, FromRecord) or term.q == 1:
        return called
    return f"{term.q:.4g} {called}(x) {'+' if term.q < 1 else '-'} {abs(1 - term.q):.4g} {called}(-x)"


def profile_lines(loss: Loss) -> Iterator[str]:
    """Return the lines of the section, none for a loss of lists."""
    functions = page_functions(loss)
    term = loss.ranking_term
    if isinstance(term, Term) and term.score.link is not identity:
        yield from (_link(term.score), "")
    for each in functions:
        if len(functions) > 1:
            yield f"### `{each.name}`, of {' and of '.join(dict.fromkeys(map(_side, each.terms)))}"
            yield ""
        yield f"![f, its slope and the win probability it implies: {each.name}](plots/{each.picture}.svg)"
        yield ""
        seen = [profile(term) for term in each.terms]
        yield f"`{each.name}`: {_at_zero(seen[0])}."
        yield ""
        yield from _verdict_lines(loss, each.terms, seen)
        yield ""
        yield from _table(seen[0])
        yield ""
    if any(term.f is linear and term.contrast != PAIR for term in loss.terms if isinstance(term, Term)):
        yield "`linear` is a line: it pulls equally hard wherever the policy stands."


def _link(score: Score) -> str:
    """Say what passes through the link, and how steep it is where training starts."""
    passes = f"Scores pass through `{function_name(score.link)}` before they are compared"
    if not score.reference:
        return f"{passes}, so x counts no longer in nats."
    at_reference = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(score.link(at_reference), at_reference)
    return f"{passes}; its slope at the reference is {number(slope.item())}, by which the first step is multiplied."


def comparable(loss: Loss) -> bool:
    """Whether a beta can be found at which the loss regularises as another: f of a margin over the reference."""
    return _only_a_margin(loss) and "beta" in loss.hyperparameters and profile(loss).starts == "forwards"


def _only_a_margin(loss: Loss) -> bool:
    term = loss.ranking_term
    if len(loss.terms) > 1 or not isinstance(term, Term) or term.contrast != PAIR or not term.score.reference:
        return False
    plain = term.score.link is identity and isinstance(term.score.aggregate, str) and not term.sort
    return plain and not term.from_record and term.shift == 0


def _picture(loss: str, term: Term) -> str:
    plain = not is_dataclass(term.f) and (isinstance(term.q, FromRecord) or term.q == 1)
    return function_name(term.f) if plain else loss


def _side(term: Term) -> str:
    sides = {CHOSEN: "the chosen", REJECTED: "the rejected", NEGATED_CHOSEN: "the chosen, turned round"}
    return sides.get(term.contrast, "the pair")


def _at_zero(seen: Profile) -> str:
    values = {"f(0)": seen.value, "f'(0)": seen.slope, "f''(0)": seen.curvature, "kappa": seen.kappa}
    shown = [f"{key} = {'-' if value is None else number(value)}" for key, value in values.items()]
    rests = [
        f"flat from x = {number(each.x)} on" if each.kind == "flat" else f"{each.kind} at x = {number(each.x)}"
        for each in sorted(seen.stationary, key=lambda each: abs(each.x))[:4]
        if each.kind != "flat" or each.x > 0
    ]
    kinks = [f"f' jumps at x = {number(kink.x)}" for kink in seen.kinks[:2]]
    return ", ".join([*shown, *rests, *kinks])


def _verdict_lines(loss: Loss, terms: tuple[Term, ...], seen: list[Profile]) -> Iterator[str]:
    said = _that_follow(loss, terms[0], verdicts(seen[0]))
    said["start"] = _together([verdicts(each)["start"] for each in seen])
    for label, text in said.items():
        yield f"* **{label}**: {text}"
        if label == "start" and seen[0].starts == "backwards":
            yield from (f"  * {cure}" for cure in cures(loss))


def _together(starts: list[str]) -> str:
    """Say once where the terms start, and then what the gradient of each does."""
    split = " the gradient "
    heads = dict.fromkeys(text.partition(split)[0] for text in starts)
    tails = dict.fromkeys(text.partition(split)[2] for text in starts)
    if len(heads) > 1:
        return "; ".join(dict.fromkeys(starts))
    return split.join([*heads, *filter(None, [", ".join(tails)])])


def _that_follow(loss: Loss, term: Term, said: dict[str, str]) -> dict[str, str]:
    """Cut verdicts on the function down to what follows for the loss."""
    alone = len(loss.terms) == 1
    kept = {key: text for key, text in said.items() if key not in ("accumulation", "from the data")}
    if "not finite" not in kept["overflow"]:
        kept.pop("overflow")
    if not alone or isinstance(term.q, FromRecord) or term.score.link is not identity:
        kept.pop("certain labels", None)
    if term.score.link is not identity:
        kept.pop("lower bound")  # a link may not reach where f falls
    if not (_only_a_margin(loss) and term.score.aggregate == "sum"):
        kept.pop("regularisation", None)  # kappa stands among the numbers
        optimum = kept.pop("optimum", "").partition(":")[0]
        if alone and optimum not in ("", "none"):
            kept["optimum"] = f"{optimum}, in terms of x"
    return kept


def _table(seen: Profile) -> Iterator[str]:
    rows = {"pull, -f'(x) / \\|f'(0)\\|": seen.weights}
    if "optimum" in verdicts(seen):
        rows["win probability p_f(x)"] = seen.win_probability
    rows = {label: row for label, row in rows.items() if any(value is not None for _, value in row)}
    if rows:
        yield f"| x | {' | '.join(number(x) for x, _ in seen.weights)} |"
        yield "|---" * (1 + len(seen.weights)) + "|"
    for label, row in rows.items():
        yield f"| {label} | {' | '.join('-' if value is None else number(value) for _, value in row)} |"
