"""How strongly a loss holds the policy to its reference, on one scale for all losses.

Near the reference a loss regularises with strength kappa * beta (kappa = f''(0) / |f'(0)|), and DPO's kappa is a half.
A loss without a local strength (hinge) is placed where it agrees with DPO at preferences of strength 0.75.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from prefopt_losses import Loss, get_loss, loss_from_config
from prefopt_losses.errors import LossError
from prefopt_losses.profiles.matched_beta import match_beta
from prefopt_losses.terms import FromRecord, Term

AT = 0.75
"""The preference strength at which losses without a local match are matched."""
DPO_KAPPA = 0.5


@dataclass(frozen=True)
class Strength:
    """What a loss's beta amounts to."""

    beta: float | None
    """The method's own."""
    gpo_beta: float | None
    """What multiplies the contrast."""
    unit: str
    """What beta is per."""
    kappa_beta: float | None
    """Regularisation strength per nat of a completion; half of the DPO beta that holds as strongly."""
    note: str
    """How it was matched, or why it was not."""


@dataclass(frozen=True)
class Factor:
    """Own beta = factor * DPO's beta, times the tokens of a completion where the loss takes means."""

    value: float | None
    per_token: bool
    note: str


def factor_of(loss: Loss) -> Factor:
    """Return what turns a DPO beta into the beta of this loss that regularises as strongly."""
    return _factor(json.dumps(loss.config, sort_keys=True))


@lru_cache(maxsize=4096)
def _factor(config: str) -> Factor:
    try:
        matched = match_beta(loss_from_config(json.loads(config)), get_loss("dpo", beta=1.0), p=AT)
    except LossError as error:
        return Factor(None, False, str(error))
    if matched.near_zero is not None:
        return Factor(matched.near_zero, matched.times_tokens, "")
    if matched.at_strength is not None:
        said = f"{matched.near_zero_reason}: matched at a preference of strength {AT}"
        return Factor(matched.at_strength, matched.times_tokens, said)
    return Factor(None, False, matched.near_zero_reason or matched.at_strength_reason)


def strength_of(loss: Loss, tokens: float | None) -> Strength:
    """Return what the loss's beta amounts to.

    Args:
        loss: with its hyper-parameters.
        tokens: of a completion on average, for losses that take means; None where not known.
    """
    term, own = loss.ranking_term, loss.hyperparameters.get("beta")
    gpo = term.beta if isinstance(term, Term) and not isinstance(term.beta, FromRecord) else None
    mean = isinstance(term, Term) and term.score.aggregate == "mean"
    unit = f"per nat{' per token' if mean else ''}" if own is not None else ""
    if own is None:
        return Strength(None, gpo, unit, None, "it has no beta")
    factor = factor_of(loss)
    if factor.value is None or (factor.per_token and tokens is None):
        return Strength(own, gpo, unit, None, factor.note or "the tokens of a completion are not known")
    scale = factor.value * (tokens or 1.0) if factor.per_token else factor.value
    return Strength(own, gpo, unit, DPO_KAPPA * own / scale, factor.note)
