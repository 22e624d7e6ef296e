"""The beta at which one loss regularises like another at a beta that is known to work.

Two rules. Near the reference a loss holds the policy with strength kappa * beta, so beta_f = beta * kappa / kappa_f. At
a preference of strength p its optimum lies at x*_f(p), so beta_f = beta * x*_f(p) / x*(p). They agree as p -> 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefopt_losses.errors import LossError
from prefopt_losses.loss import Loss
from prefopt_losses.profiles.curve import Curve
from prefopt_losses.profiles.matching import optimum
from prefopt_losses.profiles.profile import Profile, effective, profile
from prefopt_losses.terms import PAIR, FromRecord, Term, function_name


@dataclass(frozen=True)
class MatchedBeta:
    """The method's own `beta` that matches, or why there is none."""

    name: str
    near_zero: float | None
    """Matched near the reference."""
    at_strength: float | None
    """Matched at a preference of strength p."""
    p: float
    unit: str
    """What the two numbers are per: nat of the whole completion, or nat per token."""
    times_tokens: bool = False
    """True: the loss takes means where the other takes sums. Multiply by the tokens of a completion."""
    over_tokens: bool = False
    """True: the loss takes sums where the other takes means. Divide by the tokens of a completion."""
    near_zero_reason: str = ""
    """Why there is no number near zero."""
    at_strength_reason: str = ""
    note: str = ""


def match_beta(loss: Loss, other: Loss, *, p: float = 0.75) -> MatchedBeta:
    """Return the beta at which `loss` regularises like `other` does.

    Args:
        loss: whose beta is looked for; its own value of beta does not matter.
        other: of which the beta is known.
        p: strength of preference, above 1/2 and below 1.

    Raises:
        LossError: where p is out of range, or `other` has no scale that could be matched.
    """
    if not 0.5 < p < 1:
        raise LossError(f"p: expected a win probability above 0.5 and below 1, given {p:g}.")
    known = _scalar_pair(other)
    if isinstance(known, str):
        raise LossError(f"{other.name}: nothing can be matched to it: {known}.")
    anchor = profile(other)
    strength = optimum(_curve(known), p)
    if anchor.slope >= 0 or (strength is None and not anchor.kappa):
        raise LossError(f"{other.name}: nothing can be matched to it: {_no_local(anchor) or _no_optimum(anchor)}.")
    term = _no_common_reference(loss, known) or _scalar_pair(loss)
    if not isinstance(term, str) and (reason := _incomparable(term, known)):
        term = reason
    if isinstance(term, str):
        return MatchedBeta(loss.name, None, None, p, "", near_zero_reason=term, at_strength_reason=term)
    return _matched(loss, term, known, anchor, strength, p)


def _matched(loss: Loss, term: Term, known: Term, anchor: Profile, strength: float | None, p: float) -> MatchedBeta:
    seen = profile(loss)
    # From the beta that multiplies the contrast to the method's own: ipo's is half of it.
    own = loss.hyperparameters["beta"] / term.beta * known.beta
    no_local, reached = _no_local(seen), optimum(_curve(term), p)
    near = None if no_local or not anchor.kappa else round(own * anchor.kappa / seen.kappa, 9)
    at_strength = None if reached is None or strength is None else round(own * reached / strength, 9)
    crosses = term.score.aggregate != known.score.aggregate
    per_token = known.score.aggregate == "mean"
    return MatchedBeta(
        loss.name,
        near,
        at_strength,
        p,
        unit=f"per nat {'per token' if per_token else 'of the whole completion'}",
        times_tokens=crosses and not per_token,
        over_tokens=crosses and per_token,
        near_zero_reason=no_local or ("" if anchor.kappa else f"{_no_local(anchor)}, of the other"),
        at_strength_reason=_no_optimum(seen) if reached is None else "",
        note=_note(loss, crosses=crosses, to_mean=not per_token),
    )


def _scalar_pair(loss: Loss) -> Term | str:
    """Return the one term whose beta can be matched, or why there is none."""
    term = loss.ranking_term
    if not isinstance(term, Term):
        return "it weighs all completions of a prompt at once"
    if loss.parts:
        return "it is a sum of methods; match its parts"
    if "beta" not in loss.hyperparameters:
        return "it has no beta"
    if isinstance(term.beta, FromRecord):
        return "its beta comes with the batch"
    if term.contrast != PAIR:
        uneven = "it weighs the two completions of a pair unevenly"
        return uneven if all(term.contrast) else "it judges completions one by one, not pairs"
    if len(loss.terms) > 1:
        return "it is a sum of terms, and beta scales only what one of them sees"
    return _shifted(term)


def _shifted(term: Term) -> Term | str:
    if isinstance(term.shift, FromRecord):
        return "each example brings a shift of its own, so equal scores are not x = 0"
    if term.shift != 0:
        return f"a target margin shifts x by {term.shift:g}, so equal scores are not x = 0"
    return "it sorts a batch first" if term.sort else term


def _no_common_reference(loss: Loss, known: Term) -> str:
    term = loss.ranking_term
    if loss.parts or not isinstance(term, Term) or term.score.reference == known.score.reference:
        return ""
    return "it has no reference to hold the policy to" if known.score.reference else "it has a reference"


def _incomparable(term: Term, known: Term) -> str:
    """Say why the scores of two terms have no common unit; means and sums differ by a known factor."""
    if term.score.link is not known.score.link:
        return "its scores pass through another link than the other's"
    odd = next((a for a in (term.score.aggregate, known.score.aggregate) if not isinstance(a, str)), None)
    if odd is not None and term.score.aggregate != known.score.aggregate:
        return "its scores weigh tokens unevenly, so no one factor converts"
    return ""


def _curve(term: Term) -> Curve:
    return Curve(effective(term), function_name(term.f))


def _no_local(seen: Profile) -> str:
    """Say why there is no regularisation strength near zero, or nothing."""
    if seen.slope >= 0:
        return f"it starts {seen.starts} (f'(0) = {seen.slope:+.3g})"
    if seen.kappa is None:
        return "it has a kink at x = 0"
    if abs(seen.kappa) > 1e-9:
        return "" if seen.kappa > 0 else f"it bends away from the reference (kappa = {seen.kappa:.3g})"
    kink = min(seen.kinks, key=lambda each: abs(each.x), default=None)
    return f"its curvature is a kink at x = {kink.x:g} (kappa = 0)" if kink else "it has no curvature there (kappa = 0)"


def _no_optimum(seen: Profile) -> str:
    if seen.slope >= 0:
        return f"it starts {seen.starts} (f'(0) = {seen.slope:+.3g})"
    return "its margin never comes to rest at any strength"


def _note(loss: Loss, *, crosses: bool, to_mean: bool) -> str:
    if not crosses:
        return ""
    if not to_mean:
        return "crosses units: divide by T, the tokens of a completion, for scores summed over tokens"
    if loss.hyperparameters.get("normalize") == "mean":
        return (
            "crosses units: the number is for normalize: sum; as a mean its beta is per token, so multiply by T, "
            "the tokens of a completion"
        )
    return "crosses units: its beta is per token, so multiply by T, the tokens of a completion"
