"""The step-0 invariant: before the first update the policy must not differ from its reference.

Reference = initial policy, held alike: every log-ratio is within rounding, else the run refuses. A quantized
reference of an unquantized policy: the log-ratios *are* the quantization error, which is stated, and refused only
above `reference.max_margin_error`. Another reference model: nothing can be said, and nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from prefopt.batching import make_batch
from prefopt.data.groups import GroupDataset
from prefopt.errors import ModelError, Problem
from prefopt.forward import TOLERANCE, ReferenceLogps, Scorer, compute_dtype, score
from prefopt.planning import every_comparison, pack_slices
from prefopt.recipe import Recipe


@dataclass(frozen=True)
class StepZero:
    """Policy minus reference before the first update."""

    logratios: np.ndarray
    """(completions,) nats per completion."""
    lengths: np.ndarray
    """(completions,) tokens."""
    margins: np.ndarray
    """(comparisons,) difference of two log-ratios, nats, unscaled."""

    @property
    def max_abs_error(self) -> float:
        """Largest log-ratio of a completion, in nats."""
        return float(np.abs(self.logratios).max(initial=0.0))

    @property
    def max_margin_error(self) -> float:
        """Largest unscaled margin, in nats."""
        return float(np.abs(self.margins).max(initial=0.0))

    @property
    def per_root_token(self) -> float:
        """Largest log-ratio over the root of its completion's length: what a rounding tolerance bounds."""
        return float((np.abs(self.logratios) / np.sqrt(self.lengths)).max(initial=0.0))

    def as_dict(self) -> dict[str, float | int]:
        """Return the figures that are kept with a run."""
        return {
            "completions": len(self.logratios),
            "max_abs_error": self.max_abs_error,
            "mean_abs_error": float(np.abs(self.logratios).mean()),
            "max_margin_error": self.max_margin_error,
            "mean_margin_error": float(np.abs(self.margins).mean()) if len(self.margins) else 0.0,
        }


@torch.no_grad()
def step_zero(
    policy: Scorer, dataset: GroupDataset, reference_logps: ReferenceLogps, *, precision: str, count: int = 32
) -> StepZero:
    """Log-ratios of the untouched policy on the first comparisons of a dataset."""
    dataset = dataset.select(range(min(count, len(dataset))))
    plan = pack_slices(dataset, every_comparison(dataset), token_budget=4096)
    batches = (make_batch([dataset[part.group] for part in micro], micro) for micro in plan.micro_batches)
    ratios, lengths, margins = [], [], []
    for batch, result in score(policy, batches, precision=precision):
        difference = result.sums - reference_logps(batch).sums
        ratios.append(difference.double().cpu())
        lengths.append(result.lengths.cpu())
        if batch.two_sided:
            margins.append((difference[batch.chosen] - difference[batch.rejected]).double().cpu())
    joined = torch.cat(ratios)
    return StepZero(joined.numpy(), torch.cat(lengths).numpy(), torch.cat(margins).numpy() if margins else np.zeros(0))


def check_step_zero(recipe: Recipe, found: StepZero) -> str:
    """Compare the step-0 log-ratios with what the recipe promises.

    Returns:
        One line for the screen.

    Raises:
        ModelError: the reference cannot be the one the recipe names, or its error exceeds the recipe's limit.
    """
    largest = f"largest log-ratio {found.max_abs_error:.2g} nats, largest margin {found.max_margin_error:.2g} nats"
    same = recipe.reference.model in (None, recipe.model.path)
    if not same:
        return f"another model is the reference; {largest}"
    if recipe.reference.quantization == recipe.model.quantization:
        limit = TOLERANCE[compute_dtype(recipe.train.precision)]
        if not found.per_root_token <= limit:
            raise ModelError(
                Problem(
                    "reference",
                    f"log-probs equal to the untouched policy's within {limit:g} nats per root token",
                    f"{found.per_root_token:.3g} ({largest})",
                    "the cached reference is not this policy: check versions with `prefopt cache verify`, "
                    "or compute it in every step with reference.cache=off",
                )
            )
        return f"policy equals reference ({largest})"
    allowed = recipe.reference.max_margin_error
    # Unpaired data have no margins; a completion's own error is then what the limit bounds.
    error = found.max_margin_error if len(found.margins) else found.max_abs_error
    if allowed is not None and not error <= allowed:
        raise ModelError(
            Problem(
                "reference.max_margin_error",
                f"margins within {allowed:g} nats of full precision",
                f"{error:.3g} nats with {recipe.reference.quantization}",
                "use int8 or no quantization for the reference, or raise the limit knowingly",
            )
        )
    return f"the {recipe.reference.quantization} reference differs from the policy: {largest}"
