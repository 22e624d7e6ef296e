"""Published formulas, written out by hand in Python floats; nothing here shares code with the algebra.

One file per family. A formula takes one example `e` and the hyper-parameters:

    l_w, l_l, r_w, r_l   policy and reference log-probs of chosen and rejected, summed
    n_w, n_l             tokens;  t_w, t_l, tr_w, tr_l their log-probs, as lists
    p                    soft label;  s_w, s_l scores;  v value of the prompt
    l_g, n_g             the gold completion
    a_w, a_l             policy log-probs less log sum p^2;  k_w, k_l sequential KL
    m, rm                policy and reference log-prob of the mismatched completion
    tokens               mean chosen tokens over the batch
    batch                all examples of the batch, in order; `e` is one of them

and returns the loss of that example. A formula of lists takes `e.completions`, each with l, r, n, s.
"""

from published import (
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

FAMILIES = (pairwise, divergences, margins, reference_free, pointwise, batchwise, tokenwise, listwise, mixtures)

PUBLISHED = {name: formula for family in FAMILIES for name, formula in family.PUBLISHED.items()}
"""Name of the method -> formula."""

OTHER_VALUES = {key: value for family in FAMILIES for key, value in family.OTHER_VALUES.items()}
"""Hyper-parameter -> a value other than its default; those not named here are multiplied by 1.7."""

OVERFLOWS = {name: why for family in FAMILIES for name, why in family.OVERFLOWS.items()}
"""Methods that are not finite ten thousand nats from the reference, and the documented reason."""

BACKWARDS = {name: why for family in FAMILIES for name, why in family.BACKWARDS.items()}
"""Methods whose first step does not separate a pair, or not every pair, and why."""

DETACHED = {name: why for family in FAMILIES for name, why in getattr(family, "DETACHED", {}).items()}
"""Methods part of whose value depends on the policy without gradient, so that no finite difference equals it."""
