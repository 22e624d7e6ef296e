"""What was computed of a micro-batch -> the record that its loss reads, and the metrics of its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.batching import RaggedBatch
from prefopt.forward import CompletionLogProbs
from prefopt_losses import ListLogProbs, LogProbs, Loss, Needs, UnpairedLogProbs, loss_metrics

Record = LogProbs | UnpairedLogProbs | ListLogProbs


@dataclass(frozen=True)
class Scored:
    """A micro-batch and everything that was computed of it."""

    batch: RaggedBatch
    policy: CompletionLogProbs
    reference: CompletionLogProbs | None
    mismatched: tuple[Tensor, Tensor] | None = None
    """Policy's and reference's summed log-probs of each comparison's mismatched completion, (comparisons,)."""


@dataclass(frozen=True)
class StepFacts:
    """What an example must know of the optimizer step that it is part of."""

    tokens_per_example: float | None = None
    """Chosen tokens per comparison of the whole step, for token means."""
    state: Mapping[str, Tensor] | None = None
    """Numbers that the loss carries from step to step."""
    draw: int = 0
    """Number of the step, for losses that sample tokens."""


def loss_record(needs: Needs, scored: Scored, facts: StepFacts) -> Record:
    """Lay out what a loss reads: by list, by label, or by comparison."""
    if needs.lists:
        return _list_record(scored)
    if scored.batch.unpaired:
        return _unpaired_record(scored, facts)
    return paired_record(scored, facts, needs)


def loss_values(loss: Loss, record: Record, *, check: bool = True) -> Tensor:
    """Return one value per comparison, label or list, unreduced; `check` looks for NaN (one synchronisation)."""
    if isinstance(record, UnpairedLogProbs):
        return loss.unpaired(record, check=check)
    return loss(record, check=check)


NOTHING = StepFacts()


def paired_record(scored: Scored, facts: StepFacts = NOTHING, needs: Needs | None = None) -> LogProbs:
    """Lay the completions' log-probs out by comparison; a side that was not scored is None."""
    batch, policy, reference = scored.batch, scored.policy, scored.reference
    sides: dict[str, Tensor | None] = {}
    for side, index in (("chosen", batch.chosen), ("rejected", batch.rejected if batch.two_sided else None)):
        if index is None:
            continue
        sides[f"{side}_logps"] = policy.sums[index]
        sides[f"{side}_lengths"] = policy.lengths[index]
        sides[f"ref_{side}_logps"] = _at(None if reference is None else reference.sums, index)
        sides[f"{side}_relative_logps"] = _at(policy.relative, index)
        sides[f"{side}_sequential_kl"] = _at(policy.sequential_kl, index)
        if needs is not None and needs.tokens:
            sides[f"{side}_token_logps"] = _token_rows(batch, policy.tokens, index)
            ref_tokens = None if reference is None else reference.tokens
            sides[f"ref_{side}_token_logps"] = _token_rows(batch, ref_tokens, index)
    mismatched, ref_mismatched = scored.mismatched or (None, None)
    return LogProbs(
        **sides,
        preference_probability=batch.preference_probability if batch.soft_labels else None,
        chosen_scores=batch.chosen_scores,
        rejected_scores=batch.rejected_scores,
        values=_values(scored, torch.where(batch.chosen >= 0, batch.chosen, batch.rejected)),
        gold_logps=_at(policy.sums, batch.gold),
        gold_lengths=_at(policy.lengths, batch.gold),
        mismatched_logps=mismatched,
        ref_mismatched_logps=ref_mismatched,
        tokens_per_example=facts.tokens_per_example,
        state=facts.state,
        draw=facts.draw,
    )


def _unpaired_record(scored: Scored, facts: StepFacts) -> UnpairedLogProbs:
    """Lay the completions' log-probs out by label."""
    batch, policy, reference = scored.batch, scored.policy, scored.reference
    desirable = batch.chosen >= 0
    index = torch.where(desirable, batch.chosen, batch.rejected)
    mismatched, ref_mismatched = scored.mismatched or (None, None)
    scores = None
    if batch.chosen_scores is not None and batch.rejected_scores is not None:
        side = desirable if batch.chosen_scores.ndim == 1 else desirable[:, None]
        scores = torch.where(side, batch.chosen_scores, batch.rejected_scores)
    return UnpairedLogProbs(
        logps=policy.sums[index],
        desirable=desirable,
        ref_logps=_at(None if reference is None else reference.sums, index),
        lengths=policy.lengths[index],
        tokens_per_example=facts.tokens_per_example,
        scores=scores,
        values=_values(scored, index),
        mismatched_logps=mismatched,
        ref_mismatched_logps=ref_mismatched,
        state=facts.state,
    )


def _list_record(scored: Scored) -> ListLogProbs:
    """Lay the completions' log-probs out by list, the best of each first."""
    batch, policy, reference = scored.batch, scored.policy, scored.reference
    members, lists = batch.list_members, batch.list_index
    assert members is not None
    assert lists is not None  # the batch was made with lists=True, which the loss's needs decide
    return ListLogProbs(
        logps=policy.sums[members],
        lists=lists,
        scores=batch.list_scores,
        ref_logps=_at(None if reference is None else reference.sums, members),
        lengths=policy.lengths[members],
        count=batch.lists,
    )


def _values(scored: Scored, index: Tensor) -> Tensor | None:
    """Return the prompts' values: the policy's value head's where it has one, else the data's."""
    return scored.batch.values if scored.policy.values is None else _at(scored.policy.values, index)


def _at(values: Tensor | None, index: Tensor | None) -> Tensor | None:
    return None if values is None or index is None else values[index]


def _token_rows(batch: RaggedBatch, tokens: Tensor | None, index: Tensor) -> Tensor | None:
    """Lay token log-probs (scored,) out as (comparisons, tokens), token t of a completion in column t, then zeros."""
    if tokens is None:
        return None
    lengths = batch.completion_lengths
    starts = lengths.cumsum(0) - lengths
    columns = torch.arange(len(tokens), device=tokens.device) - starts[batch.completion_index]
    rows = tokens.new_zeros(len(lengths), batch.longest_completion)
    return rows.index_put((batch.completion_index, columns), tokens)[index]


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
        self._counts: dict[str, int | Tensor] = dict.fromkeys(METRICS, 0)

    def add(self, name: str, values: Tensor, of: Tensor | None = None) -> None:
        """Add one value per example, or those `of` them that a mask names; an empty tensor adds nothing."""
        values = values.detach().double()
        if of is not None:  # no index by a mask: that would ask the device how many there are
            values = values.masked_fill(~of, 0.0)
        self._sums[name] = self._sums[name] + values.sum()
        self._counts[name] = self._counts[name] + (values.numel() if of is None else of.sum())

    def means(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the mean of each metric over all its examples; ``reduce`` sums a tensor over processes."""
        sums = torch.stack([self._sums[name] for name in METRICS])
        counts = torch.stack([torch.as_tensor(self._counts[name]).to(sums) for name in METRICS])
        both = torch.stack((sums, counts))
        if reduce is not None:
            both = reduce(both)
        sums, counts = both.cpu()
        return {name: float(total / count) for name, total, count in zip(METRICS, sums, counts) if count}


def add_comparison_metrics(sums: MetricSums, loss: Loss, scored: Scored, record: Record, losses: Tensor) -> None:
    """Add ``loss`` and what `prefopt_losses.loss_metrics` says of every example of a micro-batch.

    Args:
        sums: where to.
        loss: the loss; its margins are the metrics'.
        scored: the micro-batch.
        record: what the loss read of it; a list's metrics are those of its comparisons.
        losses: what it gave.
    """
    add_record_metrics(sums, loss, paired_record(scored) if isinstance(record, ListLogProbs) else record, losses)


def add_record_metrics(sums: MetricSums, loss: Loss, record: Record, losses: Tensor) -> None:
    """Add ``loss`` and the metrics of the record's examples."""
    sums.add("loss", losses)
    sides: list[tuple[LogProbs, Tensor | None]] = [(record, None)] if isinstance(record, LogProbs) else []
    if isinstance(record, UnpairedLogProbs):
        sides = [(_side(record, "chosen"), record.desirable), (_side(record, "rejected"), ~record.desirable)]
    for side, of in sides:
        for name, values in loss_metrics(loss, side).items():
            sums.add(name, values, of)


def _side(record: UnpairedLogProbs, side: str) -> LogProbs:
    """All completions as a record of chosen or of rejected ones: only those so labelled count."""
    tensors = {
        f"{side}_logps": record.logps,
        f"{side}_lengths": record.lengths,
        f"ref_{side}_logps": record.ref_logps,
    }
    return LogProbs(**tensors, state=record.state)
