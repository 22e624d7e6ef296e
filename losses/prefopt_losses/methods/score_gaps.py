"""What a pair brings of its own besides log-probs, as coordinates: the gap between its scores, between its lengths.

Scores come from the data: of a reward model, an annotator, or (batch, models) of an ensemble, whose mean is taken.
Each gap is a small frozen callable, so that equal hyper-parameters make equal losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt_losses.errors import LossError
from prefopt_losses.inputs import LogProbs
from prefopt_losses.score import LOG_RATIO, widened
from prefopt_losses.terms import FromRecord

SCORES = ("chosen_scores", "rejected_scores")
LENGTHS = ("chosen_lengths", "rejected_lengths")


def score_gap(scale: float = 1.0) -> FromRecord:
    """Return scale * (chosen score - rejected score) as a coordinate."""
    return FromRecord(f"{scale:g} * score gap", SCORES, ScoreGap(scale))


def log_score_gap(scale: float) -> FromRecord:
    """Return scale * log(chosen score - rejected score) as a coordinate."""
    return FromRecord(f"{scale:g} * log score gap", SCORES, LogScoreGap(scale))


def score_probability(scale: float) -> FromRecord:
    """Return s(scale * (chosen score - rejected score)), the label that Bradley-Terry reads off scores."""
    return FromRecord(f"s({scale:g} * score gap)", SCORES, ScoreProbability(scale))


def nearest_score_gap(scale: float) -> FromRecord:
    """Return, of the gaps of all models of an ensemble times scale, the one nearest to the log-ratio difference."""
    reads = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", *SCORES)
    return FromRecord(f"{scale:g} * nearest score gap", reads, NearestScoreGap(scale))


def length_gap(scale: float) -> FromRecord:
    """Return scale * (chosen tokens - rejected tokens) as a coordinate."""
    return FromRecord(f"{scale:g} * length gap", ("chosen_logps", *LENGTHS), LengthGap(scale))


def chosen_loss(scale: float) -> FromRecord:
    """Return scale * max(0, -u_w): the nats that the chosen completion has lost to the reference, with gradient."""
    return FromRecord(f"{scale:g} * chosen nats lost", ("chosen_logps", "ref_chosen_logps"), ChosenLoss(scale))


@dataclass(frozen=True)
class ScoreGap:
    """scale * (chosen score - rejected score), the mean over models of an ensemble."""

    scale: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return it, shape (batch,)."""
        return self.scale * gaps_by_model(record).mean(1)


@dataclass(frozen=True)
class LogScoreGap:
    """scale * log(chosen score - rejected score)."""

    scale: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return it, shape (batch,); -inf for equal scores, so that such a pair asks for no margin and pulls nothing.

        Raises LossError where the rejected completion scores higher (one device synchronisation; not under
        torch.compile, where it is NaN).
        """
        gap = ScoreGap(1.0)(record)
        if not torch.compiler.is_compiling() and bool((gap < 0).any()):
            rows = (gap < 0).nonzero().flatten().tolist()
            shown = ", ".join(f"{row} ({gap[row].item():g})" for row in rows[:8])
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            raise LossError(
                "chosen_scores: expected at least rejected_scores. Given a difference below 0, by row: "
                f"{shown}{more}. Swap the completions of these pairs, or drop them."
            )
        return self.scale * gap.log()


@dataclass(frozen=True)
class ScoreProbability:
    """s(scale * (chosen score - rejected score))."""

    scale: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return it, shape (batch,)."""
        return torch.sigmoid(ScoreGap(self.scale)(record))


@dataclass(frozen=True)
class NearestScoreGap:
    """Of scale * (chosen score - rejected score) of each model, the one nearest to u_w - u_l."""

    scale: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return it, shape (batch,); no gradient: the minimum over models moves by that of the model chosen."""
        gaps = self.scale * gaps_by_model(record)
        difference = LOG_RATIO.of(record, "chosen") - LOG_RATIO.of(record, "rejected")
        nearest = (difference.detach()[:, None] - gaps).abs().argmin(1, keepdim=True)
        return gaps.gather(1, nearest).squeeze(1)


@dataclass(frozen=True)
class LengthGap:
    """scale * (chosen tokens - rejected tokens)."""

    scale: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return it, shape (batch,)."""
        assert record.chosen_logps is not None  # all in `reads`, so Loss has looked
        assert record.chosen_lengths is not None
        assert record.rejected_lengths is not None
        dtype = widened(record.chosen_logps).dtype  # before the subtraction: unsigned lengths would wrap around
        return self.scale * (record.chosen_lengths.to(dtype) - record.rejected_lengths.to(dtype))


@dataclass(frozen=True)
class ChosenLoss:
    """scale * max(0, -u_w)."""

    scale: float

    def __call__(self, record: LogProbs) -> Tensor:
        """Return it, shape (batch,), with gradient."""
        return self.scale * torch.relu(-LOG_RATIO.of(record, "chosen"))


def gaps_by_model(record: LogProbs) -> Tensor:
    """Return chosen minus rejected scores, shape (batch, models), one model where scores are (batch,)."""
    assert record.chosen_scores is not None  # both in `reads`, so Loss has looked
    assert record.rejected_scores is not None
    chosen, rejected = widened(record.chosen_scores), widened(record.rejected_scores)
    if chosen.shape != rejected.shape:
        given = f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        raise LossError(f"chosen_scores, rejected_scores: expected equal shapes, given {given}.")
    gap = chosen - rejected
    return gap[:, None] if gap.ndim == 1 else gap
