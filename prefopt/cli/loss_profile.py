"""Profiles on the terminal: one in words and numbers, several in one table, and the betas that match."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.cli.printing import print_labelled
from prefopt_losses import Loss
from prefopt_losses.profiles.matched_beta import MatchedBeta
from prefopt_losses.profiles.profile import Profile
from prefopt_losses.profiles.shape import Stationary
from prefopt_losses.profiles.verdicts import cures, number, verdicts

WIDTH = 20


def show_profiles(out: Console, profiles: Sequence[Profile], loss: Loss | None) -> None:
    """Print what each different function of a loss does: the verdicts first, then the numbers."""
    if not profiles:
        _heading(out, "Profile")
        text = "none: it weighs all completions of a prompt at once, so there is no function of one margin"
        print_labelled(out, "", text, width=4)
    grouped: dict[tuple[object, ...], list[int]] = {}
    for index, seen in enumerate(profiles):
        grouped.setdefault((seen.name, seen.contrast, seen.start, seen.from_record), []).append(index)
    for terms in grouped.values():
        seen = profiles[terms[0]]
        _heading(out, "Profile", _title(seen, terms, len(profiles)))
        for label, text in verdicts(seen).items():
            print_labelled(out, label, text, width=WIDTH, style=_style(label, seen))
            if label == "start" and seen.starts == "backwards" and loss is not None:
                for cure in cures(loss):
                    print_labelled(out, "", cure, width=WIDTH, style="green")
        _show_numbers(out, seen)


def _title(seen: Profile, terms: Sequence[int], count: int) -> str:
    if count == 1:
        moved = not seen.reference or seen.start or any(key == "shift" for key, _ in seen.from_record)
        return f"of {seen.name}" if moved else f"of {seen.name}; x = 0 is the reference"
    sides = {(1, -1): "a pair", (1, 0): "the chosen", (0, -1): "the rejected", (-1, 0): "the chosen, turned round"}
    numbers = " and ".join(str(index + 1) for index in terms)
    side = sides.get(seen.contrast or (1, -1), "its contrast")  # type: ignore[arg-type]
    return f"of {seen.name} on {side} (term{'s' if len(terms) > 1 else ''} {numbers} of {count})"


def _style(label: str, seen: Profile) -> str:
    bad = (label == "start" and seen.starts == "backwards") or (label == "lower bound" and seen.lower_bound.unbounded)
    doubtful = label == "convex" and seen.convexity.status == "refuted"
    return "bold red" if bad and label == "start" else "red" if bad else "yellow" if doubtful else ""


def _show_numbers(out: Console, seen: Profile) -> None:
    out.print()
    values = {"f(0)": seen.value, "f'(0)": seen.slope, "f''(0)": seen.curvature, "kappa": seen.kappa}
    shown = "   ".join(f"{key} {'-' if value is None else number(value)}" for key, value in values.items())
    print_labelled(out, "at zero", shown, width=WIDTH)
    print_labelled(out, "f' = 0", _stationary(seen.stationary), width=WIDTH)
    jumps = ", ".join(f"x = {number(k.x)} ({number(k.left)} to {number(k.right)})" for k in seen.kinks[:4])
    print_labelled(out, "f' jumps at", jumps, width=WIDTH)
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", width=WIDTH)
    for _ in seen.weights:
        table.add_column(justify="right", min_width=5)
    table.add_row("    x", *(number(x) for x, _ in seen.weights))
    table.add_row("    pull -f'/|f'(0)|", *(_cell(value) for _, value in seen.weights))
    table.add_row("    p_f(x)", *(_cell(value) for _, value in seen.win_probability))
    out.print(table)


def _stationary(points: Sequence[Stationary]) -> str:
    if not points:
        return "nowhere on the range"
    nearest = sorted(points, key=lambda each: abs(each.x))[:6]
    shown = [
        f"flat from {number(each.x)} to {number(each.end or 0.0)}"
        if each.kind == "flat"
        else f"{each.kind} {each.x:.3f}"
        for each in sorted(nearest, key=lambda each: each.x)
    ]
    more = f", and {len(points) - 6} more" if len(points) > 6 else ""
    return ", ".join(shown) + more


def _cell(value: float | None) -> str:
    return "-" if value is None else number(value)


def show_comparison(out: Console, profiles: dict[str, Profile]) -> None:
    """Print several functions side by side."""
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    heads = ("", "f'(0)", "convex", "kappa", "at -4", "at +4", "rests at", "bound")
    for head in heads:
        table.add_column(
            justify="left" if head in ("", "convex") else "right",
            overflow="fold",
            no_wrap=head == "" and out.width >= 100,
        )
    table.add_row(*(Text(head, style="dim") for head in heads))
    for name, seen in profiles.items():
        table.add_row(*_compared(name, seen))
    out.print()
    out.print(table)
    rows = {
        "f'(0)": "negative: training starts forwards",
        "kappa": "f''(0) / |f'(0)|; regularisation near the reference is kappa * beta (dpo: 0.5)",
        "at -4, +4": "-f'(x) / |f'(0)|: how hard a hopeless pair (-4) and a right one (+4) pull; negative: pushed back",
        "rests at": "x where a pair that is always labelled the same comes to rest; never: its margin grows for ever",
        "bound": "how low f can fall; none: without end; -: not found",
    }
    out.print()
    for label, text in rows.items():
        print_labelled(out, label, text, width=14)


def _compared(name: str, seen: Profile) -> list[Text]:
    convex = {
        "certified": Text("yes"),
        "not refuted": Text("not refuted"),
        "refuted": Text(f"not {seen.convexity.reason}".replace("x = ", "").replace("between", "in"), style="yellow"),
    }[seen.convexity.status]
    weights = dict(seen.weights)
    bound = "none" if seen.lower_bound.unbounded else _cell(seen.lower_bound.value)
    backwards = "bold red" if seen.starts == "backwards" else ""
    return [
        Text(name),
        Text(f"{'+' if seen.slope > 0 else ''}{number(seen.slope)}", style=backwards),
        convex,
        Text(_cell(seen.kappa)),
        *(Text(_cell(weights[x])) for x in (-4.0, 4.0)),
        Text("never" if seen.rest is None else number(seen.rest)),
        Text(bound, style="red" if seen.lower_bound.unbounded else ""),
    ]


def show_matches(out: Console, matches: Sequence[MatchedBeta], other: Loss) -> None:
    """Print the beta of each loss that regularises like `other` does, and why some have none."""
    p = matches[0].p
    found = [each for each in matches if each.near_zero is not None or each.at_strength is not None]
    beta = number(other.hyperparameters["beta"])
    _heading(out, f"The beta that matches {other.name} at {beta}", found[0].unit if found else "")
    if found:
        _show_matched(out, found, p)
    reasons: dict[str, list[str]] = {}
    for each in matches:
        if each not in found:
            reasons.setdefault(each.near_zero_reason, []).append(each.name)
    if reasons:
        _heading(out, "No match")
        for reason, names in reasons.items():
            print_labelled(out, "", ", ".join(names), width=4)
            print_labelled(out, "", reason, width=8, style="dim")
    rules = {
        "near zero": "kappa * beta is the same: how strongly the policy is held near the reference",
        f"at p = {p:g}": f"the optimum of a pair that is preferred with probability {p:g} is the same",
    }
    if any(each.times_tokens or each.over_tokens for each in found):
        rules["T"] = "the tokens of a completion: between sums and means over tokens, beta changes by that factor"
    out.print()
    for label, text in rules.items():
        print_labelled(out, label, text, width=18)
    out.print()


def _show_matched(out: Console, matches: Sequence[MatchedBeta], p: float) -> None:
    table = Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
    for head in ("    ", "near zero", f"at p = {p:g}", ""):
        table.add_column(justify="right" if head.strip() else "left", no_wrap=head != "")
    table.add_row("", *(Text(head, style="dim") for head in ("near zero", f"at p = {p:g}", "")))
    for each in matches:
        if each.times_tokens and each.note.endswith("completion") and "normalize: sum" in each.note:
            table.add_row(f"    {each.name} normalize=sum", _beta(each.near_zero), _beta(each.at_strength), "")
        factor = " T" if each.times_tokens else " / T" if each.over_tokens else ""
        row = (_beta(each.near_zero, factor), _beta(each.at_strength, factor))
        table.add_row(f"    {each.name}", *row, Text(_why(each), style="dim"))
    out.print(table)


def _why(match: MatchedBeta) -> str:
    if match.times_tokens:
        return "per nat per token: it takes means"
    if match.over_tokens:
        return "per nat of the whole completion: it takes sums"
    near = f"near zero none: {match.near_zero_reason}" if match.near_zero is None else ""
    far = f"at p none: {match.at_strength_reason}" if match.at_strength is None else ""
    return "; ".join(filter(None, (near, far)))


def _beta(value: float | None, factor: str = "") -> str:
    return "-" if value is None else f"{number(value)}{factor}"


def _heading(out: Console, title: str, aside: str = "") -> None:
    out.print()
    out.print(Text(title, style="bold"), Text(aside, style="dim"), sep="   ")
