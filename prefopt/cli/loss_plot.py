"""Draw losses: f, f' and the win probability they imply, side by side, for a page or a slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator
from torch import Tensor

from prefopt.cli.loss_words import Subject
from prefopt.errors import Problem, UserError
from prefopt_losses.profiles.curve import Curve
from prefopt_losses.profiles.matching import win_probability
from prefopt_losses.profiles.profile import Profile, effective
from prefopt_losses.profiles.verdicts import number
from prefopt_losses.terms import Term

# Okabe and Ito's colours: distinct under the common kinds of colour blindness; yellow is left out, too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
INK, GREY, WARNING = "#222222", "#8A8A8A", "#B00020"
SUFFIXES = (".png", ".svg", ".pdf")
STYLE: Any = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.labelsize": 13,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Drawn:
    """One function, sampled for the picture."""

    name: str
    colour: str
    profile: Profile
    x: Tensor
    f: Tensor
    slope: Tensor
    probability: Tensor


def draw(subjects: Sequence[Subject], path: Path, *, radius: float = 20.0) -> None:
    """Draw up to eight losses into a file.

    Args:
        subjects: what to draw, in the order of the legend.
        path: .png, .svg or .pdf.
        radius: how far functions are sampled for their profiles; the picture shows the middle.

    Raises:
        UserError: another kind of file, more than eight losses, a loss without a scalar function.
    """
    problems = []
    if path.suffix.lower() not in SUFFIXES:
        problems.append(Problem("--plot", f"a file that ends in {', '.join(SUFFIXES)}", str(path)))
    if len(subjects) > len(COLOURS):
        fix = "draw fewer; more lines than that cannot be told apart"
        problems.append(Problem("--plot", f"at most {len(COLOURS)} losses", str(len(subjects)), fix))
    if path.parent != Path() and not path.parent.is_dir():
        problems.append(Problem("--plot", "a folder that exists", str(path.parent), f"mkdir -p {path.parent}"))
    if problems:
        raise UserError(problems)
    profiles = [subject.profile(radius=radius) for subject in subjects]
    width = _width(profiles)
    drawn = [_sampled(*each, width) for each in zip(subjects, COLOURS, profiles)]
    with rc_context(STYLE):
        _figure(drawn, width).savefig(path, dpi=200, facecolor="white")


def _width(profiles: Sequence[Profile]) -> float:
    """Return how far to draw: to 4, or closer in where everything that happens lies near zero."""
    points = [abs(each.x) for seen in profiles for each in seen.stationary if each.kind != "flat" and each.x]
    close = len(profiles) == 1 and points and max(points) < 0.3
    return min(1.0 if close else 4.0, *(seen.radius for seen in profiles))


def _sampled(subject: Subject, colour: str, seen: Profile, width: float) -> Drawn:
    if subject.loss is None:
        assert subject.f is not None
        f = subject.f
    else:
        term = subject.loss.ranking_term
        assert isinstance(term, Term)  # its profile exists
        f = effective(term)
    curve = Curve(f, subject.name, seen.radius)
    x = torch.linspace(-width, width, 4001, dtype=torch.float64)
    x = x[(x >= seen.domain[0]) & (x <= seen.domain[1])]
    slope = curve.slopes(x)
    slope[1:][_jumps(slope)] = torch.nan  # no line across a jump
    return Drawn(subject.name, colour, seen, x, curve.values(x), slope, _probability(curve, x))


def _jumps(y: Tensor) -> Tensor:
    change = torch.diff(y).abs()
    around = torch.stack([change.roll(by) for by in (-3, -2, 2, 3)]).amax(0)
    return change > 8 * around + 1e-3


def _probability(curve: Curve, x: Tensor) -> Tensor:
    p = win_probability(curve, x)
    p[(p < 0) | (p > 1)] = torch.nan  # no strength of preference has its optimum there
    p[1:][_jumps(p)] = torch.nan
    return p


def _figure(drawn: Sequence[Drawn], width: float) -> Figure:
    figure = Figure(figsize=(16, 6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharex=True, gridspec_kw={"wspace": 0.06})
    bent = any(each.profile.convexity.regions for each in drawn)
    _panel(left, "the loss  f(x)", "dashed where it is not convex" if bent else "of a pair with margin x")
    _panel(middle, "its slope  f′(x)", "circle: the first step, at the reference")
    _panel(right, "the win probability it implies  p(x)", "how often chosen must win for x to be the optimum")
    for axes, curves in ((left, [each.f for each in drawn]), (middle, [each.slope for each in drawn])):
        for order, each in enumerate(drawn):
            _line(axes, each, curves[order], 2.7 + 2.7 * _covered(curves, order), 3 + order)
        _limits(axes, drawn, curves, width, at_zero=axes is left)
    probabilities = [each.probability for each in drawn]
    for order, each in enumerate(drawn):
        wide = 2.7 + 2.7 * _covered(probabilities, order)
        right.plot(each.x, each.probability, color=each.colour, linewidth=wide, zorder=3 + order, solid_capstyle="butt")
    right.set_ylim(-0.12, 1.12)
    right.set_yticks([0, 0.25, 0.5, 0.75, 1])
    if not any(each.isfinite().any() for each in probabilities):
        right.text(0.5, 0.6, "none", transform=right.transAxes, ha="center", color=GREY)
    left.set_xlim(-width, width)
    left.xaxis.set_major_locator(MultipleLocator(1.0 if width > 2 else 0.5))
    _mark_slopes(middle, drawn)
    _mark_stationary(left, drawn)
    _legend(figure, drawn)
    return figure


def _panel(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", pad=28, fontweight="bold")
    axes.annotate(
        subtitle, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", fontsize=12, color=GREY
    )
    axes.set_xlabel("margin  x = β · (chosen − rejected)")
    axes.axhline(0, color=GREY, linewidth=0.9, zorder=1)
    axes.axvline(0, color=GREY, linewidth=0.9, zorder=1)
    axes.tick_params(length=0)


def _covered(curves: Sequence[Tensor], order: int) -> int:
    """Count the later curves that run along this one most of the way: it is drawn wider, so both show."""
    own = curves[order]
    later = (other for other in curves[order + 1 :] if other.shape == own.shape)
    return sum(bool((other - own).abs().lt(5e-3).double().mean() > 0.6) for other in later)


def _line(axes: Axes, each: Drawn, y: Tensor, wide: float, zorder: int) -> None:
    """Draw a curve, dashed where it is refuted as convex."""
    bent = torch.zeros_like(each.x, dtype=torch.bool)
    for start, end in each.profile.convexity.regions:
        bent |= (each.x >= start) & (each.x <= end)
    style: dict[str, Any] = {"color": each.colour, "linewidth": wide, "zorder": zorder}
    axes.plot(each.x, torch.where(bent, torch.nan, y), solid_capstyle="butt", **style)
    axes.plot(each.x, torch.where(bent, y, torch.nan), linestyle=(0, (2.2, 1.2)), **style)


def _limits(axes: Axes, drawn: Sequence[Drawn], curves: Sequence[Tensor], width: float, *, at_zero: bool) -> None:
    """Show all of what happens near zero: one exploding tail must not flatten the rest."""
    kept = [y[y.isfinite()] for y in curves]
    near = [y[(each.x.abs() <= 0.4 * width) & y.isfinite()] for each, y in zip(drawn, curves)]
    low = max(min(y.min().item() for y in kept), 1.25 * min(y.min().item() for y in near))
    high = min(max(y.max().item() for y in kept), max(1.25 * max(y.max().item() for y in near), 0.0))
    low, high = min(low, 0.0), max(high, 0.0)
    if at_zero and len(drawn) == 1 and low == 0.0 and min(y.min().item() for y in kept) > 0.2 * high:
        low = min(y.min().item() for y in kept)
    pad = 0.07 * (high - low or 1.0)
    axes.set_ylim(low - pad, high + pad)


def _mark_slopes(axes: Axes, drawn: Sequence[Drawn]) -> None:
    """Put a circle where training starts, and say so where it starts the wrong way."""
    for order, each in enumerate(drawn):
        slope = each.profile.slope
        same = sum(abs(other.profile.slope - slope) < 1e-9 for other in drawn[order + 1 :])
        axes.plot(
            *(0, slope, "o"),
            color="white",
            markeredgecolor=WARNING if slope > 0 else each.colour,
            markersize=9 + 5 * same,
            markeredgewidth=2.4,
            zorder=20 + order,
        )
        if slope > 0:
            text = f"starts backwards\nf′(0) = +{number(slope)}"
            _note(axes, text, (0, slope), (14, -4), color=WARNING, fontweight="bold", va="top")


def _mark_stationary(axes: Axes, drawn: Sequence[Drawn]) -> None:
    """Mark minima and barriers; a curve on its own has them named."""
    low, high = axes.get_xlim()
    for each in drawn:
        for rest in each.profile.stationary:
            if rest.kind not in ("minimum", "maximum") or not low < rest.x < high:
                continue
            y = each.f[(each.x - rest.x).abs().argmin()].item()
            dip = rest.kind == "minimum"
            axes.plot(rest.x, y, "o" if dip else "v", color=each.colour, markersize=8, zorder=25)
            if len(drawn) == 1:
                name = "local minimum" if dip and each.profile.slope > 0 else "minimum" if dip else "barrier"
                text = f"{name}\nx = {rest.x:.3f}".replace("-", "−")
                place = {"ha": "right" if rest.x < 0 else "left", "va": "top" if dip else "bottom"}
                _note(axes, text, (rest.x, y), (-12 if rest.x < 0 else 12, -12 if dip else 12), **place)


def _note(axes: Axes, text: str, point: tuple[float, float], away: tuple[float, float], **style: Any) -> None:
    axes.annotate(text, point, away, textcoords="offset points", zorder=30, **style)


def _legend(figure: Figure, drawn: Sequence[Drawn]) -> None:
    handles = [Line2D([], [], color=each.colour, linewidth=4, label=each.name) for each in drawn]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), 8 if len(handles) <= 4 else 4 if len(handles) > 6 else 6),
        frameon=False,
        fontsize=14,
        handlelength=1.4,
        columnspacing=1.8,
    )
