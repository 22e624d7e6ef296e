"""What a scalar function does as a preference loss: the microscope.

    profile("savage")                     a function of `FUNCTIONS`, or a method of the table
    profile(lambda x: (1 - x).exp())      your own f, elementwise
    profile(get_loss("cdpo"))             the term that ranks; profile_terms gives one profile per term

The curve looked at is g(x) = q f(x) + (1 - q) f(-x), with the label q of the term; x = beta * (a . s - shift) is
positive when the chosen completion wins. `print(profile("dpo"))` says in words what the numbers mean.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from prefopt_losses.convex import FUNCTIONS, Function
from prefopt_losses.errors import LossError, suggest
from prefopt_losses.lookup import get_loss
from prefopt_losses.loss import Loss
from prefopt_losses.methods import METHODS
from prefopt_losses.profiles.convexity import Convexity, certificate, convexity
from prefopt_losses.profiles.curve import Curve
from prefopt_losses.profiles.matching import Population, optimum, population, win_probability
from prefopt_losses.profiles.shape import (
    Kink,
    LowerBound,
    Overflow,
    Stationary,
    Tail,
    kinks,
    lower_bound,
    overflow,
    tail,
)
from prefopt_losses.profiles.shape import stationary as stationary_points
from prefopt_losses.terms import FromRecord, Term, function_name

RADIUS = 20.0
"""How far f is sampled unless somebody says otherwise."""
AT = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
"""Margins at which gradient weights and win probabilities are tabulated."""


@dataclass(frozen=True)
class Accumulation:
    """Whether the mean over micro-batches is the mean over the step."""

    decomposes: bool
    reason: str


@dataclass(frozen=True)
class Profile:
    """What one scalar function does; plain data."""

    name: str
    """The function, with its label where that is not 1: `0.9 logistic(x) + 0.1 logistic(-x)`."""
    radius: float
    domain: tuple[float, float]
    """The interval around zero, within the radius, where value and slope are finite."""
    convexity: Convexity
    value: float
    """f(0)."""
    slope: float
    """f'(0), as autograd has it; negative: training starts in the right direction."""
    one_sided: tuple[float, float]
    """f' just left and just right of zero."""
    curvature: float | None
    """f''(0); None at a kink."""
    kappa: float | None
    """f''(0) / |f'(0)|: regularisation near the reference is kappa * beta. None at a kink or where f'(0) = 0."""
    stationary: tuple[Stationary, ...]
    kinks: tuple[Kink, ...]
    weights: tuple[tuple[float, float | None], ...]
    """(x, -f'(x) / |f'(0)|): how hard a pair at x pulls, in units of a pair at the reference."""
    win_probability: tuple[tuple[float, float | None], ...]
    """(x, p_f(x)); None where no strength of preference has its optimum at x."""
    population: Population
    """Of f itself, whatever the label."""
    rest: float | None
    """Where a pair with a certain label (q = 1) comes to rest, walking downhill from x = 0; None: nowhere."""
    left: Tail
    right: Tail
    lower_bound: LowerBound
    overflow: tuple[Overflow, ...]
    """In fp32 and in bf16."""
    accumulation: Accumulation
    q: float = 1.0
    from_record: tuple[tuple[str, str], ...] = ()
    """Coordinates that each example brings, and their names; a label among them is looked at as q = 1."""
    contrast: tuple[float, float] | None = None
    """Of a term: what multiplies the chosen and the rejected score."""
    reference: bool = True
    """Of a term: whether its score is measured from a reference, so that x = 0 is the reference."""
    start: float = 0.0
    """Of a term with a shift: x where both scores are equal."""
    slope_at_start: float | None = None

    @property
    def starts(self) -> str:
        """`forwards`, `backwards`, or `nowhere`, by the sign of the slope where training starts."""
        slope = self.slope if self.slope_at_start is None else self.slope_at_start
        return "forwards" if slope < 0 else "backwards" if slope > 0 else "nowhere"

    def as_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold: lists for tuples, "inf" and "-inf" for infinite numbers."""
        return _plain({**dataclasses.asdict(self), "starts": self.starts})

    def __str__(self) -> str:
        from prefopt_losses.profiles.verdicts import verdicts  # which reads this dataclass

        return "\n".join([self.name, *(f"  {label:<17}{text}" for label, text in verdicts(self).items())])


def profile(f: str | Function | Term | Loss, *, radius: float = RADIUS, name: str | None = None) -> Profile:
    """Return what a function does: convexity, start, regularisation, tails, optimum, bounds, numerics.

    Args:
        f: a name of `FUNCTIONS` or `METHODS`, an elementwise function (float64 tensor to tensor), a Term, or a
            Loss, whose ranking term is profiled.
        radius: f is sampled on [-radius, radius], from 1.5 to 10000.
        name: what to call it.

    Raises:
        LossError: where f is no elementwise, deterministic, differentiable function that is finite at 0, or a
            loss of lists, which has no scalar function.
    """
    if isinstance(f, str):
        f = _named(f)
    if isinstance(f, Loss):
        return _of_term(
            _scalar(f.ranking_term, f.name), radius, name, _accumulation(f.needs.batch, f.needs.step_tokens)
        )
    if isinstance(f, Term):
        return _of_term(f, radius, name, _accumulation(f.batch, f.unit == "token"))
    if not callable(f):
        raise LossError(f"f: expected a name, a function, a Term or a Loss, given {f!r}.")
    return _profile(Curve(f, name or _called(f), radius), certificate(f), None)


def profile_terms(loss: Loss, *, radius: float = RADIUS) -> tuple[Profile, ...]:
    """Return one profile per term of a loss; raises as `profile` does."""
    return tuple(profile(_scalar(term, loss.name), radius=radius) for term in loss.terms)


def effective(term: Term) -> Function:
    """Return g(x) = q f(x) + (1 - q) f(-x) of a term; f where the label is 1 or comes from the record."""
    f, q = term.f, 1.0 if isinstance(term.q, FromRecord) else term.q
    return f if q == 1 else lambda x: q * f(x) + (1 - q) * f(-x)


def _called(f: Function) -> str:
    """Return the name of a function; a function with parameters of its own shows them."""
    return repr(f) if dataclasses.is_dataclass(f) else function_name(f)


def _named(name: str) -> Function | Loss:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    known = [*FUNCTIONS, *METHODS]
    if name not in METHODS:
        raise LossError(f"f: no function or loss {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")
    return get_loss(name)


def _scalar(term: object, name: str) -> Term:
    if isinstance(term, Term):
        return term
    raise LossError(
        f"{name}: expected a loss of single completions or of pairs, given a loss of lists, which weighs all "
        "completions of a prompt at once: it has no scalar function to profile."
    )


def _of_term(term: Term, radius: float, name: str | None, accumulation: Accumulation) -> Profile:
    from_record = tuple(
        (key, coordinate.name)
        for key in ("beta", "shift", "q", "weight")
        if isinstance(coordinate := getattr(term, key), FromRecord)
    )
    q = 1.0 if isinstance(term.q, FromRecord) else float(term.q)
    called = _called(term.f)
    if q != 1:
        mirrored = f"{'+' if q < 1 else '-'} {abs(1 - q):.4g}"
        name = name or f"{q:.4g} {called}(x) {mirrored} {called}(-x)"
    labels = (0.0, 1.0) if isinstance(term.q, FromRecord) else (q, q)
    seen = _profile(
        Curve(effective(term), name or called, radius),
        certificate(term.f, *labels),
        accumulation,
        base=None if q == 1 else Curve(term.f, called, radius),
    )
    start = 0.0
    if not isinstance(term.shift, FromRecord) and not isinstance(term.beta, FromRecord):
        start = -term.beta * term.shift + 0.0
    return dataclasses.replace(
        seen,
        q=q,
        from_record=from_record,
        contrast=term.contrast,
        reference=term.score.reference,
        start=start,
        slope_at_start=Curve(effective(term), called, radius).slope(start) if start else None,
    )


def _profile(curve: Curve, proof: str | None, accumulation: Accumulation | None, base: Curve | None = None) -> Profile:
    slope, curvature = curve.slope(0.0), curve.curvature(0.0)
    kappa = None if curvature is None or slope == 0 else curvature / abs(slope) + 0.0
    rests, x = stationary_points(curve), torch.tensor(AT, dtype=torch.float64)
    exists = curve.values(x).isfinite()  # a slope may go on where f has ended, such as that of a logarithm
    weights = (-curve.slopes(x) / abs(slope) + 0.0).where(exists, torch.nan).tolist() if slope else [None] * len(AT)
    win = win_probability(curve, x).where(exists & exists.flip(0), torch.nan)  # AT is symmetric
    return Profile(
        name=curve.name,
        radius=float(curve.radius),
        domain=curve.domain,
        convexity=convexity(curve, proof),
        value=curve.value(0.0),
        slope=slope,
        one_sided=curve.one_sided_slopes(0.0),
        curvature=None if curvature is None else curvature + 0.0,
        kappa=kappa,
        stationary=rests,
        kinks=kinks(curve),
        weights=tuple(zip(AT, map(_finite, weights))),
        win_probability=tuple(zip(AT, map(_finite, win.tolist()))),
        population=_population(base or curve, kappa if base is None else None),
        rest=_rest(curve, slope, rests),
        left=tail(curve, "left"),
        right=tail(curve, "right"),
        lower_bound=lower_bound(curve, rests),
        overflow=tuple(overflow(curve.f, dtype) for dtype in (torch.float32, torch.bfloat16)),
        accumulation=accumulation or _accumulation((), False),
    )


def _population(curve: Curve, kappa: float | None) -> Population:
    if kappa is None:
        slope, curvature = curve.slope(0.0), curve.curvature(0.0)
        kappa = None if curvature is None or slope == 0 else curvature / abs(slope)
    return population(curve, kappa)


def _rest(curve: Curve, slope: float, rests: tuple[Stationary, ...]) -> float | None:
    if slope == 0:
        return 0.0
    if slope < 0:
        return optimum(curve, 1.0)
    below = [each.end if each.kind == "flat" else each.x for each in rests if each.x < 0 and each.kind != "maximum"]
    return max((x for x in below if x is not None), default=None)


def _accumulation(batch: tuple[str, ...], step_tokens: bool) -> Accumulation:
    if batch:
        return Accumulation(
            False, f"taken over the whole step, of which a micro-batch sees a part: {' and '.join(batch)}"
        )
    if step_tokens:
        return Accumulation(True, "given the step's tokens_per_example: it holds a mean over tokens")
    return Accumulation(True, "one value per example, whatever the other examples are")


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
