"""What a loss sees of a reference's error: its own margin, its value and its pull, where policy = full precision.

There the exact reference gives every log-ratio 0. What the cached one gives instead is compared with that, by the
loss itself, so that any loss, beta, label and weight is covered by the same lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.data.groups import Comparison
from prefopt.reference.certified_sample import CertifiedSample
from prefopt.reference.error_statistics import ErrorStatistics, Share, error_statistics, plain, share_of
from prefopt_losses import LogProbs, Loss, UnpairedLogProbs

NOTICEABLE = 0.1
"""A gradient weight that changes by more than this is counted."""
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class LossEffect:
    """Differences between the loss at the cached reference and at the exact one, over the examples of a sample."""

    loss: dict[str, Any] | list[dict[str, Any]]
    """What builds the loss again."""
    at_reference: float
    """Mean value of the loss at the exact reference."""
    margin: ErrorStatistics
    """Of the loss's own margin, beta included (`Loss.margin`; of labels beta times the score): 0 without error."""
    value: ErrorStatistics
    """Of the loss of an example."""
    gradient_weight: ErrorStatistics | None
    """Of f'(x) / f'(0), 1 without error: the pull on an example; None where the exact reference gives none a pull."""
    weight_changes: Share | None
    """Examples whose gradient weight changes by more than NOTICEABLE."""

    def as_dict(self) -> dict[str, Any]:
        """Return the effect as plain data."""
        named = {"margin": self.margin, "value": self.value, "gradient_weight": self.gradient_weight}
        changes = plain({"weight_changes": self.weight_changes})
        return {"loss": self.loss, "at_reference": self.at_reference, **plain(named), **changes}


def why_not_stated(loss: Loss) -> str | None:
    """Say why the effect on a loss cannot be stated; None where it can."""
    needs = loss.needs
    if not needs.reference:
        return f"{loss.name} reads no reference"
    beyond = {"lists": "ranked lists", "relative": "the policy's whole distribution", "sequential_kl": "both models'"}
    lacking = [words for name, words in beyond.items() if getattr(needs, name)]
    return f"{loss.name} reads {', '.join(lacking)}, which the sample does not hold" if lacking else None


def loss_effect(loss: Loss, sample: CertifiedSample) -> LossEffect | None:
    """State what the error of a sample does to a loss.

    Labels, scores and values are the data's. Completions of other prompts, which kto reads, are stood for by the
    sample's own, each by the next one.

    Returns:
        The effect; None where `why_not_stated` says why, or where the sample lacks what the loss reads.
    """
    if why_not_stated(loss) is not None:
        return None
    examples = _examples(loss, sample)
    if examples is None:
        return None
    exact, cached = (_at(loss, sample, examples, reference) for reference in (sample.full, sample.cached))
    prompts = examples.prompts
    squared = (exact.gradient**2).sum(1)
    pulled = squared > 0
    weight = (exact.gradient * cached.gradient).sum(1)[pulled] / squared[pulled] - 1
    margin, value = (
        error_statistics(getattr(cached, name) - getattr(exact, name), prompts) for name in ("margin", "value")
    )
    assert margin is not None
    assert value is not None  # there are examples
    return LossEffect(
        loss=loss.config,
        at_reference=float(exact.value.mean()),
        margin=margin,
        value=value,
        gradient_weight=error_statistics(weight, prompts[pulled]),
        weight_changes=share_of(np.abs(weight) > NOTICEABLE, prompts[pulled]),
    )


@dataclass(frozen=True, eq=False)
class _Examples:
    """What the loss has one value for each of."""

    comparisons: list[Comparison]
    sides: dict[str, np.ndarray]
    """(examples,) completions by side; of labels both sides are the one completion."""
    desirable: Tensor | None
    """Of labels: (examples,) bool."""
    prompts: np.ndarray


def _examples(loss: Loss, sample: CertifiedSample) -> _Examples | None:
    paired = [one for one in sample.comparisons if one.chosen is not None and one.rejected is not None]
    labels = [one for one in sample.comparisons if one not in paired]
    desirable = None
    if paired:
        kept = paired
        sides = {side: np.array([getattr(one, side) for one in paired]) for side in _SIDES}
    elif labels and not loss.needs.pairs:
        kept = [_on_both_sides(one) for one in labels]
        own = np.array([one.chosen if one.rejected is None else one.rejected for one in labels])
        sides = dict.fromkeys(_SIDES, own)
        desirable = torch.tensor([one.chosen is not None for one in labels])
    else:
        return None
    if len(kept) < loss.needs.minimum_batch or not _brings(loss, kept):
        return None
    return _Examples(kept, sides, desirable, sample.prompts[sides["chosen"]])


def _on_both_sides(label: Comparison) -> Comparison:
    own = label.rejected_score if label.chosen is None else label.chosen_score
    return replace(label, chosen_score=own, rejected_score=own)


def _brings(loss: Loss, kept: list[Comparison]) -> bool:
    """Whether the data brought the numbers that the loss reads beside log-probs."""
    if loss.needs.preference_probability and any(None in (one.chosen, one.rejected) for one in kept):
        return False  # labels of single completions have none
    wanted = [*(["preference_probability"] if loss.needs.preference_probability else []),
              *(["value"] if loss.needs.values else []),
              *(f"{side}_score" for side in _SIDES if f"{side}_scores" in loss.needs.tensors)]  # fmt: skip
    return all(getattr(one, name) is not None for one in kept for name in wanted)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a loss makes of the examples against one reference."""

    value: np.ndarray
    margin: np.ndarray
    gradient: np.ndarray
    """(examples, n) with respect to the policy's log-probs."""


def _at(loss: Loss, sample: CertifiedSample, examples: _Examples, reference: np.ndarray) -> _Seen:
    tokens = loss.needs.tokens
    policy = {side: _policy(sample, index, tokens).requires_grad_() for side, index in examples.sides.items()}
    if examples.desirable is not None:
        policy["rejected"] = policy["chosen"]
    record = LogProbs(
        **dict(_logps(sample, examples, policy, reference, tokens)),
        **_from_data(examples.comparisons),
        desirable=examples.desirable,
    )
    values = loss(record, check=False) if examples.desirable is None else _of_labels(loss, record, examples.desirable)
    leaves = list(dict.fromkeys(policy.values()))
    gradients = torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        chosen, rejected = loss.rewards(record)
        margin = chosen - rejected if examples.desirable is None else chosen
    return _Seen(
        values.detach().numpy(),
        margin.expand(len(values)).numpy(),
        torch.cat([one.reshape(len(values), -1) for one in gradients], dim=1).numpy(),
    )


def _policy(sample: CertifiedSample, index: np.ndarray, tokens: bool) -> Tensor:
    """Log-probs of the policy. Of tokens only differences to the reference are known, and read: the policy's are 0."""
    if tokens:
        return torch.zeros(len(index), int(sample.lengths.max()), dtype=torch.float64)
    return torch.from_numpy(sample.full[index])


def _logps(
    sample: CertifiedSample, examples: _Examples, policy: dict[str, Tensor], reference: np.ndarray, tokens: bool
) -> Iterator[tuple[str, Tensor]]:
    exact = reference is sample.full
    for side, index in examples.sides.items():
        name = f"{side}_token_logps" if tokens else f"{side}_logps"
        yield name, policy[side]
        against = torch.from_numpy(reference[index])
        if tokens:
            against = torch.zeros_like(policy[side]) if exact else _token_rows(sample)[torch.from_numpy(index)]
        yield f"ref_{name}", against
        yield f"{side}_lengths", torch.from_numpy(sample.lengths[index])
    other = np.roll(examples.sides["chosen"], 1)
    yield "mismatched_logps", torch.from_numpy(sample.full[other])
    yield "ref_mismatched_logps", torch.from_numpy(reference[other])


def _token_rows(sample: CertifiedSample) -> Tensor:
    """(completions, tokens) errors, token t in column t, then zeros."""
    rows = np.zeros((len(sample.lengths), int(sample.lengths.max())))
    rows[np.arange(rows.shape[1]) < sample.lengths[:, None]] = sample.token_errors.astype(np.float64)
    return torch.from_numpy(rows)


def _from_data(comparisons: list[Comparison]) -> dict[str, Tensor]:
    """Labels, scores and values, as far as every comparison has them."""
    columns: dict[str, list[Any]] = {
        "preference_probability": [one.preference_probability for one in comparisons],
        "values": [one.value for one in comparisons],
        "chosen_scores": [one.chosen_score for one in comparisons],
        "rejected_scores": [one.rejected_score for one in comparisons],
    }
    tensors = {
        name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items() if None not in column
    }
    return {name: one.squeeze(1) if one.ndim == 2 and one.shape[1] == 1 else one for name, one in tensors.items()}


def _of_labels(loss: Loss, record: LogProbs, desirable: Tensor) -> Tensor:
    assert record.chosen_logps is not None  # losses of labels read sums
    return loss.unpaired(
        UnpairedLogProbs(
            logps=record.chosen_logps,
            desirable=desirable,
            ref_logps=record.ref_chosen_logps,
            lengths=record.chosen_lengths,
            scores=record.chosen_scores,
            values=record.values,
            mismatched_logps=record.mismatched_logps,
            ref_mismatched_logps=record.ref_mismatched_logps,
        ),
        check=False,
    )
