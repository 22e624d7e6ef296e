"""The table of published methods, assembled from the rooms of their families; nothing else decides what a name means.

Notation of the formulas: minimised, per example; s is the sigmoid; w the chosen, l the rejected completion;
l_w, l_l policy and r_w, r_l reference log-probs summed over completion tokens; u = l - r a log-ratio;
rho = u_w - u_l; a bar (l̄, ū) divides by the completion's tokens; nll is the token mean of -l_w.

To add a method: write its maker (terms, keyword-only hyper-parameters) and its row in the room of its family, and
its formula, by hand, in tests/published. Its function, its page and its recipe block follow from these.
"""

from __future__ import annotations

from prefopt_losses.method import Method
from prefopt_losses.methods import (
    batchwise,
    divergences,
    listwise,
    margins,
    mixtures,
    pairwise,
    pointwise,
    reference_free,
    tokenwise,
)

FAMILIES: dict[str, str] = {
    "pairwise": "A pair against a reference",
    "divergences": "A pair, held by another divergence than reverse KL",
    "margins": "A pair with a margin of its own",
    "reference_free": "Without a reference",
    "pointwise": "Single completions against a reference",
    "batchwise": "A pair among the others of its batch",
    "tokenwise": "A pair, token by token",
    "listwise": "A whole list of completions",
    "mixtures": "Sums",
}
"""Rooms of the table, in its order, and what their methods have in common."""

METHODS: dict[str, Method] = {
    **pairwise.ROWS,
    **divergences.ROWS,
    **margins.ROWS,
    **reference_free.ROWS,
    **pointwise.ROWS,
    **batchwise.ROWS,
    **tokenwise.ROWS,
    **listwise.ROWS,
    **mixtures.ROWS,
}

OTHER_NAMES: dict[str, str] = {other: name for name, method in METHODS.items() for other in method.also}
"""What other tools call a method."""
