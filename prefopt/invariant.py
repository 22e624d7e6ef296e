"""The step-0 invariant: before the first update the policy must not differ from its reference.

Reference = initial policy, held alike: every log-ratio is within rounding, else the run refuses. A quantized
reference of an unquantized policy: the log-ratios *are* the quantization error; they must agree with the certificate,
and where there is none, `reference.max_margin_error` bounds them here. Another reference model: nothing can be said,
and nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from prefopt.batching import make_batch
from prefopt.data.groups import GroupDataset
from prefopt.errors import ModelError, Problem
from prefopt.forward import TOLERANCE, ReferenceLogps, Scorer, compute_dtype, score
from prefopt.planning import every_comparison, pack_slices
from prefopt.recipe import Recipe

if TYPE_CHECKING:
    from prefopt.reference.certificate import Certificate

FACTOR = 4.0
"""How far the mean error at step 0 may lie outside the certificate's interval: its comparisons are the first of the
data and may share few prompts, whose errors differ by their lengths alone up to threefold."""
WAYS_OUT = (
    "margins that start at 0 need a policy that is quantized alike (QLoRA: model.quantization={0} with an adapter), "
    "or an unquantized or int8 reference"
)


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


def check_step_zero(recipe: Recipe, found: StepZero, certificate: Certificate | None = None) -> str:
    """Compare the step-0 log-ratios with what the recipe promises.

    Args:
        recipe: names policy and reference.
        found: policy minus reference before the first update.
        certificate: of a quantized reference, where there is one.

    Returns:
        One line for the screen.

    Raises:
        ModelError: the reference cannot be the one the recipe names, its error is not the certified one, or, without
            a certificate, it exceeds the recipe's limit.
    """
    largest = f"largest log-ratio {found.max_abs_error:.2g} nats, largest margin {found.max_margin_error:.2g} nats"
    same = recipe.reference.model in (None, recipe.model.path)
    if not same:
        return f"another model is the reference; {largest}"
    if recipe.reference.quantization == recipe.model.quantization:
        _refuse_another_reference(recipe, found, largest)
        return f"policy equals reference ({largest})"
    kind = str(recipe.reference.quantization)
    said = f"the margins are the error of the {kind} reference, for the policy starts unquantized: {largest}"
    if certificate is None:
        _refuse_large_error(recipe, found)
        return f"{said}; {WAYS_OUT.format(kind)}"
    return f"{said}; {_agreement(found, certificate)}; {WAYS_OUT.format(kind)}"


def _refuse_another_reference(recipe: Recipe, found: StepZero, largest: str) -> None:
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


def _agreement(found: StepZero, certificate: Certificate) -> str:
    """Say that the mean error is the certified one; raises ModelError where it cannot be."""
    # Unpaired data have no margins; a completion's own error stands in.
    sizes = np.abs(found.margins if len(found.margins) else found.logratios)
    certified = certificate.limited
    low, high = certified.mean_abs_interval or (certified.mean_abs, certified.mean_abs)
    here = float(sizes.mean())
    stated = f"{here:.2g} nats on average here, {certified.mean_abs:.2g} ({low:.2g} to {high:.2g}) certified"
    if low / FACTOR <= here <= high * FACTOR:
        return f"they agree with the certificate ({stated})"
    raise ModelError(
        Problem(
            "reference",
            f"margins at step 0 as far from 0 as the certificate says, within a factor of {FACTOR:g}",
            stated,
            "policy and reference do not start from the same weights, or the cache was written by other versions: "
            "`prefopt cache verify` tells; " + WAYS_OUT.format(certificate.quantization),
        )
    )


def _refuse_large_error(recipe: Recipe, found: StepZero) -> None:
    """Raise ModelError where 95 % of the margins do not stay within `reference.max_margin_error`."""
    allowed = recipe.reference.max_margin_error
    sizes = np.abs(found.margins if len(found.margins) else found.logratios)
    error = float(np.quantile(sizes, 0.95, method="inverted_cdf")) if len(sizes) else 0.0
    if allowed is not None and not error <= allowed:
        raise ModelError(
            Problem(
                "reference.max_margin_error",
                f"95 % of the margins within {allowed:g} nats of full precision",
                f"{error:.3g} nats with {recipe.reference.quantization}, on {len(sizes)} comparisons at step 0",
                "use int8 or no quantization for the reference, or raise the limit knowingly",
            )
        )
