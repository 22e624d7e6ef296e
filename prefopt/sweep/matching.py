"""`match: kappa`: the betas of a sweep are DPO's, and every other loss takes the one that regularises as strongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefopt.errors import Problem
from prefopt.recipe import Recipe
from prefopt.recipe.override import Override, apply_override
from prefopt.report.strength import factor_of
from prefopt_losses import LossError, get_loss, loss_from_config

DEFAULT: float = get_loss("dpo").hyperparameters["beta"]
"""DPO's beta where none is written; not that of the loss itself, which is on another scale."""


def match_loss(mapping: dict[str, Any], label: str, tokens: Callable[[], float]) -> tuple[str, Problem | None]:
    """Turn the DPO beta that stands in a recipe's mapping into the loss's own, in place.

    Args:
        mapping: of one run.
        label: which loss, for the error.
        tokens: gives the tokens of a completion; asked only where the loss takes means.

    Returns:
        what there is to say about it; what is wrong.
    """
    try:
        loss = loss_from_config(mapping["loss"])
    except (LossError, KeyError):
        return "", None  # the recipe's own check says what is wrong
    factor = factor_of(loss)
    if factor.value is None or "beta" not in loss.hyperparameters:
        fix = f"give {label} a point of its own, with betas of its own scale and match: none"
        reason = factor.note or "it has no beta"
        return "", Problem("sweep.match", "losses whose beta can be matched to DPO's", f"{label}: {reason}", fix)
    given = mapping["loss"].get("beta") if isinstance(mapping["loss"], dict) else None
    wanted = DEFAULT if given is None else given
    scale = factor.value * tokens() if factor.per_token else factor.value
    apply_override(mapping, Override(("loss", "beta"), float(f"{wanted * scale:.6g}"), "sweep.match"))
    said = [f"no beta is given, so it is matched to DPO's default, {DEFAULT:g}"] if given is None else []
    if factor.note:
        said.append(factor.note)
    if factor.per_token:
        said.append(f"its beta is per token: multiplied by {tokens():.4g} tokens of a completion")
    return f"{loss.name}: {'; '.join(said)}" if said else "", None


def completion_tokens(recipe: Recipe) -> float:
    """Return the mean number of tokens of the training completions, with three digits."""
    from prefopt.prepare import prepare

    groups = prepare(recipe, quiet=True).data.train
    lengths = [len(completion) for number in range(len(groups)) for completion in groups[number].completions]
    return float(f"{sum(lengths) / len(lengths):.3g}")
