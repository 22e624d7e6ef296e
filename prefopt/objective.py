"""Completion log-probs of a batch -> one loss value per comparison, and the metrics of its examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefopt.batching import RaggedBatch
from prefopt.forward import CompletionLogProbs
from prefopt_losses import LogProbs, Loss, UnpairedLogProbs, loss_metrics


def comparison_losses(
    loss: Loss,
    batch: RaggedBatch,
    policy: CompletionLogProbs,
    reference: Tensor | None,
    *,
    tokens_per_example: float | None = None,
    check: bool = True,
) -> Tensor:
    """Loss of every comparison of a batch.

    Args:
        loss: the preference loss.
        batch: says who is compared with whom.
        policy: log-probs of the batch's completions.
        reference: (completions,) summed reference log-probs in nats, or None.
        tokens_per_example: chosen tokens per comparison of the whole optimizer step, for token means.
        check: look for NaN (one device synchronisation).

    Returns:
        (comparisons,) unreduced.
    """
    if batch.unpaired:
        labelled = unpaired_record(batch, policy, reference, tokens_per_example=tokens_per_example)
        return loss.unpaired(labelled, check=check)
    return loss(paired_record(batch, policy, reference, tokens_per_example=tokens_per_example), check=check)


def paired_record(
    batch: RaggedBatch,
    policy: CompletionLogProbs,
    reference: Tensor | None,
    *,
    tokens_per_example: float | None = None,
) -> LogProbs:
    """Lay the completions' log-probs out by comparison; a side that was not scored is None."""
    sides: dict[str, Tensor | None] = {}
    for side, index in (("chosen", batch.chosen), ("rejected", batch.rejected if batch.two_sided else None)):
        sides[f"{side}_logps"] = None if index is None else policy.sums[index]
        sides[f"{side}_lengths"] = None if index is None else policy.lengths[index]
        sides[f"ref_{side}_logps"] = None if index is None or reference is None else reference[index]
    return LogProbs(
        **sides,
        preference_probability=batch.preference_probability if batch.soft_labels else None,
        tokens_per_example=tokens_per_example,
    )


def unpaired_record(
    batch: RaggedBatch,
    policy: CompletionLogProbs,
    reference: Tensor | None,
    *,
    tokens_per_example: float | None = None,
) -> UnpairedLogProbs:
    """Lay the completions' log-probs out by label."""
    desirable = batch.chosen >= 0
    index = torch.where(desirable, batch.chosen, batch.rejected)
    return UnpairedLogProbs(
        logps=policy.sums[index],
        desirable=desirable,
        ref_logps=None if reference is None else reference[index],
        lengths=policy.lengths[index],
        tokens_per_example=tokens_per_example,
    )


METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logratios/chosen",
    "logratios/rejected",
    "logratios_per_token/chosen",
    "logratios_per_token/rejected",
    "displacement",
)
"""Every per-example metric; one list for all processes, so that their sums can be added."""


class MetricSums:
    """Sums and counts of per-example metrics, kept on the device until they are read."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in METRICS}
        self._counts = dict.fromkeys(METRICS, 0)

    def add(self, name: str, values: Tensor) -> None:
        """Add one value per example; an empty tensor adds nothing."""
        self._sums[name] = self._sums[name] + values.detach().double().sum()
        self._counts[name] += values.numel()

    def means(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the mean of each metric over all its examples; ``reduce`` sums a tensor over processes."""
        sums = torch.stack([self._sums[name] for name in METRICS])
        counts = torch.tensor([self._counts[name] for name in METRICS], dtype=sums.dtype, device=sums.device)
        both = torch.stack((sums, counts))
        if reduce is not None:
            both = reduce(both)
        sums, counts = both.cpu()
        return {name: float(total / count) for name, total, count in zip(METRICS, sums, counts) if count}


def add_comparison_metrics(
    sums: MetricSums,
    loss: Loss,
    batch: RaggedBatch,
    policy: CompletionLogProbs,
    reference: Tensor | None,
    losses: Tensor,
) -> None:
    """Add ``loss`` and what `prefopt_losses.loss_metrics` says of every example."""
    sums.add("loss", losses)
    records = (
        [_labelled_side(batch, policy, reference, side) for side in ("chosen", "rejected")]
        if batch.unpaired
        else [paired_record(batch, policy, reference)]
    )
    for record in records:
        for name, values in loss_metrics(loss, record).items():
            sums.add(name, values)


def _labelled_side(batch: RaggedBatch, policy: CompletionLogProbs, reference: Tensor | None, side: str) -> LogProbs:
    """The desirable completions as a record of chosen ones, or the undesirable as one of rejected ones."""
    index = batch.chosen if side == "chosen" else batch.rejected
    index = index[index >= 0]
    tensors: dict[str, Tensor | None] = {
        f"{side}_logps": policy.sums[index],
        f"{side}_lengths": policy.lengths[index],
        f"ref_{side}_logps": None if reference is None else reference[index],
    }
    return LogProbs(**tensors)
