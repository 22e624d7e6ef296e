"""One colour for each contestant, the same in every chart; told apart by people who see few colours (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Sequence

PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
    "#8C6D31", "#7F6FCB", "#B2A300", "#A05195", "#2F9599", "#888888",
)  # fmt: skip
FIXED = {"chosen": "#009E73", "rejected": "#D55E00", "reference": "#888888", "policy": "#0072B2"}


def colors_of(groups: Sequence[str]) -> dict[str, str]:
    """Return a colour for each group."""
    free = [group for group in dict.fromkeys(groups) if group not in FIXED]
    return {**FIXED, **{group: PALETTE[number % len(PALETTE)] for number, group in enumerate(free)}}
