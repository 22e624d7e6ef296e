"""A profile in words: what each number means for somebody who is about to train with this function."""

from __future__ import annotations

import math

from prefopt_losses.errors import LossError
from prefopt_losses.lookup import get_loss
from prefopt_losses.loss import Loss
from prefopt_losses.profiles.profile import Profile, profile
from prefopt_losses.profiles.shape import LowerBound, Overflow, Tail

DPO_KAPPA = 0.5
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def verdicts(seen: Profile) -> dict[str, str]:
    """Return the verdicts on a function, by what they are about, the one to read first in front."""
    pairs = _of_pairs(seen)
    said = {
        "start": _start(seen),
        "convex": _convex(seen),
        "regularisation": _regularisation(seen),
        "right pairs" if pairs else "far right": _right(seen),
        "hopeless pairs" if pairs else "far left": _hopeless(seen),
        "certain labels": _certain_labels(seen) if pairs else "",
        "optimum": _optimum(seen) if pairs else "",
        "lower bound": _lower_bound(seen.lower_bound),
        "overflow": _overflow(seen.overflow),
        "accumulation": f"{'yes' if seen.accumulation.decomposes else 'NO'}: {seen.accumulation.reason}",
        "from the data": _from_record(seen),
    }
    return {label: text for label, text in said.items() if text}


def number(value: float) -> str:
    """Return a number in three digits, without -0 and without an exponent below a million."""
    shown = f"{value + 0.0:.3g}"
    return f"{value:.0f}" if "e+0" in shown and abs(value) < 1e6 else shown


def cures(loss: Loss) -> list[str]:
    """Return the hyper-parameters that make a loss start forwards when set to 1, and what f'(0) is then."""
    found = []
    for key, value in loss.hyperparameters.items():
        if key == "beta" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        try:
            seen = profile(get_loss(loss.name, **{**loss.hyperparameters, key: 1.0}))
        except LossError:
            continue
        if seen.starts == "forwards":
            found.append(f"{key} = 1 removes it: f'(0) = {number(seen.slope)}")
    return found


def _of_pairs(seen: Profile) -> bool:
    return seen.contrast is None or all(seen.contrast)


def _shifted_by_data(seen: Profile) -> bool:
    return any(key == "shift" for key, _ in seen.from_record)


def _origin(seen: Profile) -> str:
    """Say what x = 0 is."""
    if _shifted_by_data(seen):
        return "where x = 0"
    if seen.reference:
        return "at the reference"
    return "at equal scores" if _of_pairs(seen) else "at x = 0"


def _start(seen: Profile) -> str:
    shifted = seen.slope_at_start is not None
    slope = seen.slope_at_start if seen.slope_at_start is not None else seen.slope
    at = f"f'({number(seen.start)})" if shifted else "f'(0)"
    where = f"{_origin(seen)} (x = {number(seen.start)})" if shifted else _origin(seen)
    if seen.starts == "forwards":
        return f"forwards, {at} = {number(slope)}: {where} the gradient {_moves(seen, up=True)}"
    if seen.starts == "backwards":
        return f"BACKWARDS, {at} = +{number(slope)}: {where} the gradient {_moves(seen, up=False)}{_trap(seen)}"
    if _shifted_by_data(seen):
        return f"{at} = 0, as in a regression: each example moves the margin towards the shift that it brings"
    left, _ = seen.one_sided
    if left < -1e-9:
        return f"nowhere: autograd takes {at} = 0 at the kink (it is {number(left)} to the left), so no gradient flows"
    return f"nowhere, {at} = 0: {where} no gradient flows; {_asks(seen)}"


def _asks(seen: Profile) -> str:
    """Say what a function whose slope is zero at the start does around it."""
    kind = next((s.kind for s in seen.stationary if s.x <= seen.start <= (s.x if s.end is None else s.end)), "")
    return {
        "minimum": f"this asks for x = {number(seen.start)} and does not rank",
        "maximum": "this is a maximum, left to either side",
        "flat": "f is flat here",
    }.get(kind, "f only pauses here")


def _moves(seen: Profile, *, up: bool) -> str:
    """Say which completion a rising (or falling) margin makes more likely."""
    chosen, rejected = seen.contrast or (1.0, -1.0)
    if chosen and rejected:
        return f"makes the chosen completion {'more' if up else 'LESS'} likely against the rejected one"
    side, sign = ("chosen", chosen) if chosen else ("rejected", rejected)
    return f"makes the {side} completion {'more' if (sign > 0) == up else 'less'} likely"


def _trap(seen: Profile) -> str:
    """Say where a backwards start ends, and what bars the way up."""
    hole = max((s.x for s in seen.stationary if s.kind == "minimum" and s.x < 0), default=None)
    barrier = min((s.x for s in seen.stationary if s.kind == "maximum" and s.x > 0), default=None)
    ends = f", down to the local minimum at x = {hole:.3f}" if hole is not None else ""
    bars = f"; a barrier at x = {barrier:+.3f} bars the way up" if barrier is not None else ""
    return ends + bars


def _convex(seen: Profile) -> str:
    verdict = seen.convexity
    if verdict.status == "certified":
        return f"yes, certified: {verdict.reason}"
    if verdict.status == "refuted":
        assert verdict.witness is not None
        assert verdict.width is not None
        chord = f"at x = {number(verdict.witness)} it lies above the chord over x ± {number(verdict.width)}"
        return f"not convex, refuted {verdict.reason}: {chord}"
    low, high = seen.domain
    return f"not refuted on [{low:g}, {high:g}]: sampled, which is no proof"


def _regularisation(seen: Profile) -> str:
    if seen.kappa is None:
        return "" if seen.slope == 0 else "kappa is not defined: f has a kink at x = 0"
    kappa = f"kappa = {number(seen.kappa)}"
    if not seen.reference:
        return f"{kappa}, but there is no reference: nothing holds the policy where it started"
    if abs(seen.kappa) < 1e-9:
        kink = min(seen.kinks, key=lambda each: abs(each.x), default=None)
        return f"{kappa}: nothing holds the policy at the reference" + (
            f" but the kink at x = {number(kink.x)}" if kink else ""
        )
    if seen.kappa < 0:
        return f"{kappa}: f bends down at the reference and drives the policy away from it"
    ratio = seen.kappa / DPO_KAPPA
    if math.isclose(ratio, 1, rel_tol=1e-6):
        return f"{kappa}: holds the policy at the reference as dpo does at the same beta"
    times = "twice" if math.isclose(ratio, 2, rel_tol=1e-6) else f"{number(ratio)} times"
    matched = "half" if math.isclose(ratio, 2, rel_tol=1e-6) else number(1 / ratio)
    return f"{kappa}: holds the policy {times} as strongly as dpo at the same beta, so {matched} of dpo's beta matches"


def _right(seen: Profile) -> str:
    flat = next((each.x for each in seen.stationary if each.kind == "flat" and each.x > 0), None)
    if seen.right.kind == "is zero":
        return f"no gradient beyond x = {number(flat)}" if flat is not None else "no gradient far out"
    fate = {
        "fades": ", less and less further out",
        "levels off": ", and never stops",
        "grows": ", ever harder further out",
    }
    return _pull(seen, 4, seen.right, fate)


def _hopeless(seen: Profile) -> str:
    if seen.left.kind == "is zero":
        return "no gradient far out: given up"
    fate = {
        "fades": ", less and less further out: given up",
        "levels off": ", and no harder further out",
        "grows": ", ever harder further out",
        "grows exponentially": ", exponentially harder further out: a few such pairs are the whole gradient",
    }
    return _pull(seen, -4, seen.left, fate)


def _pull(seen: Profile, x: int, tail: Tail, fate: dict[str, str]) -> str:
    """Say how hard a pair far out pulls, and what becomes of that further out."""
    weight = dict(seen.weights)[float(x)]
    if weight is None:
        edge = seen.domain[x > 0]
        return f"f does not reach x = {x}: it ends at x = {edge:.2g}" if abs(edge) < 4 else ""
    if weight < 0:
        return f"at x = {x} pushed back {_times(-weight)} one at the reference is moved".replace(
            "at the reference", _origin(seen)
        )
    beyond = f"; not finite beyond x = {number(tail.at)}" if tail.kind == "unknown" else fate.get(tail.kind, "")
    return f"at x = {x} pulls {_times(weight)} one {_origin(seen)}{beyond}"


def _times(weight: float) -> str:
    if math.isclose(weight, 1, rel_tol=1e-3):
        return "as hard as"
    return f"{100 * weight:.2g}% as hard as" if weight < 1 else f"{number(weight)} times as hard as"


def _certain_labels(seen: Profile) -> str:
    who = "a pair that is always labelled the same"
    if seen.rest is not None:
        side = ", on the wrong side" if seen.rest < 0 else ""
        return f"{who} comes to rest at x = {number(seen.rest)}{side}"
    if seen.starts == "backwards":
        return f"{who} moves the wrong way without end"
    return f"{who} never comes to rest: its margin grows as long as you train"


def _optimum(seen: Profile) -> str:
    kind, scale = seen.population.kind, seen.population.scale or 1.0
    by = "" if scale == 1 else f"{number(scale)} "
    labels = "" if seen.q == 1 else f", for labels taken with q = {seen.q:.4g}"
    if kind == "logistic":
        whose = "dpo's at the same beta" if scale == 1 else f"that of dpo at {number(scale)} times this beta"
        if not seen.reference:
            whose = "that of a logistic regression on x"
        return f"p_f(x) = s({by}x): on unlimited data {whose}{labels}"
    return {
        "linear": f"p_f(x) = (1 + {by}x) / 2: on unlimited data that of the squared function (ipo){labels}",
        "step": f"p_f steps up at |x| = {number(scale)}: only which side wins more often counts, not how often",
        "constant": "p_f = 1/2 everywhere: whichever side wins more often is pushed without end",
        "own": "p_f is of no known class: the table of win probabilities shows it",
        "none": "none: around x = 0 no win probability belongs to a margin",
    }[kind]


def _lower_bound(bound: LowerBound) -> str:
    if bound.unbounded:
        assert bound.witness is not None
        return f"none, unbounded below: f({number(bound.at)}) = {number(bound.witness)}, and still falling as fast"
    if bound.value is None:
        return f"not found: f({number(bound.at)}) = {number(bound.witness or 0.0)}, and it still falls"
    if math.isinf(bound.at):
        return f"{number(bound.value)}, approached towards x = {'+' if bound.at > 0 else '-'}∞"
    return f"{number(bound.value)}, at x = {number(bound.at)}"


def _overflow(found: tuple[Overflow, ...]) -> str:
    texts = {SHORT.get(each.dtype, each.dtype): _edges(each) for each in found}
    if len(set(texts.values())) == 1:
        return f"{' and '.join(texts)} {next(iter(texts.values()))}"
    return "; ".join(f"{dtype} {text}" for dtype, text in texts.items())


def _edges(found: Overflow) -> str:
    if found.refused:
        return f"refused ({found.refused})"
    below = [f"below x = {number(found.below)}"] if found.below is not None else []
    above = [f"above x = {number(found.above)}"] if found.above is not None else []
    return f"not finite {' and '.join(below + above)}" if below or above else "finite out to |x| = 10000"


def _from_record(seen: Profile) -> str:
    brought = ", ".join(f"{key} ({name})" for key, name in seen.from_record)
    profiled = "; profiled at q = 1" if any(key == "q" for key, _ in seen.from_record) else ""
    return f"each example brings its {brought}{profiled}" if brought else ""
