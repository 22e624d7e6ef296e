"""What a loss is given: three records.

`LogProbs`          two completions of one prompt per example
`UnpairedLogProbs`  one completion per example, desirable or not
`ListLogProbs`      any number of completions per prompt, each with a score

A loss reads only the tensors that its `needs` name; the rest may be None. What each tensor holds stands in
`prefopt_losses.tensors`. Log-probs are in nats, summed over completion tokens (never averaged: losses that want
means divide by the lengths themselves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prefopt_losses.errors import LossError
from prefopt_losses.tensors import LIST_TENSORS, PAIR_TENSORS, check_form


@dataclass(frozen=True, eq=False)
class LogProbs:
    """A batch of comparisons: one chosen and one rejected completion per example; tensors (batch,) unless said.

    Raises LossError for tensors of the wrong shape, of different batch sizes or on different devices.
    """

    chosen_logps: Tensor | None = None
    rejected_logps: Tensor | None = None
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    preference_probability: Tensor | None = None
    tokens_per_example: float | Tensor | None = None
    """Mean chosen tokens per example over the whole optimizer step. With it a token-mean NLL decomposes
    over micro-batches and ranks; without it the mean is taken over this batch."""
    chosen_scores: Tensor | None = None
    """(batch,), or (batch, models) of an ensemble."""
    rejected_scores: Tensor | None = None
    values: Tensor | None = None
    gold_logps: Tensor | None = None
    gold_lengths: Tensor | None = None
    chosen_token_logps: Tensor | None = None
    """(batch, tokens), as the three below."""
    rejected_token_logps: Tensor | None = None
    ref_chosen_token_logps: Tensor | None = None
    ref_rejected_token_logps: Tensor | None = None
    chosen_relative_logps: Tensor | None = None
    rejected_relative_logps: Tensor | None = None
    chosen_sequential_kl: Tensor | None = None
    rejected_sequential_kl: Tensor | None = None
    mismatched_logps: Tensor | None = None
    ref_mismatched_logps: Tensor | None = None
    desirable: Tensor | None = None
    """Of unpaired feedback laid out as pairs: True where the chosen side is the real one. None for pairs."""
    state: Mapping[str, Tensor] | None = None
    """Running numbers of the loss, after this batch (`Loss.advance`); None: those of this batch alone."""
    draw: int = 0
    """Number of this draw, for losses that sample tokens; give the step's, so that every step draws anew."""

    def __post_init__(self) -> None:
        check_form(_tensors_of(self), PAIR_TENSORS)
        _check_tokens_per_example(self.tokens_per_example)


@dataclass(frozen=True, eq=False)
class UnpairedLogProbs:
    """A batch of single completions, each desirable or not; all tensors (batch,), units as in `LogProbs`.

    Raises LossError for tensors of the wrong shape, of different batch sizes or on different devices.
    """

    logps: Tensor
    desirable: Tensor
    """bool: True takes the chosen terms of the loss, False the rejected ones."""
    ref_logps: Tensor | None = None
    lengths: Tensor | None = None
    tokens_per_example: float | Tensor | None = None
    """Desirable tokens of the whole optimizer step / all its examples; see `LogProbs`."""
    scores: Tensor | None = None
    values: Tensor | None = None
    mismatched_logps: Tensor | None = None
    ref_mismatched_logps: Tensor | None = None
    state: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        names = ("logps", "desirable", "ref_logps", "lengths", "scores", "values")
        check_form(_tensors_of(self), (*names, "mismatched_logps", "ref_mismatched_logps"))
        if self.desirable.dtype != torch.bool:
            raise LossError(
                f"desirable: expected a bool tensor, given {self.desirable.dtype}. "
                "For labels of 1 and -1 (or 0) pass `labels > 0`."
            )

    def both_sides(self) -> LogProbs:
        """Return a record in which every completion stands on both sides; a loss then picks one per row."""
        step_tokens = self.tokens_per_example
        if step_tokens is None and self.lengths is not None:
            step_tokens = (self.lengths * self.desirable).sum() / self.desirable.numel()
        if step_tokens is not None:
            # A step without desirable tokens: the rows they would weigh are not selected, but 0 * inf is NaN.
            step_tokens = torch.as_tensor(step_tokens, device=self.logps.device).clamp(min=1e-6)
        return LogProbs(
            chosen_logps=self.logps,
            rejected_logps=self.logps,
            ref_chosen_logps=self.ref_logps,
            ref_rejected_logps=self.ref_logps,
            chosen_lengths=self.lengths,
            rejected_lengths=self.lengths,
            tokens_per_example=step_tokens,
            chosen_scores=self.scores,
            rejected_scores=self.scores,
            values=self.values,
            mismatched_logps=self.mismatched_logps,
            ref_mismatched_logps=self.ref_mismatched_logps,
            desirable=self.desirable,
            state=self.state,
        )


@dataclass(frozen=True, eq=False)
class ListLogProbs:
    """Completions of several prompts, K of each, in one flat row; all tensors (completions,).

    Raises LossError for tensors of the wrong shape, of different sizes or on different devices.
    """

    logps: Tensor
    lists: Tensor
    """int64, which prompt's list each completion belongs to, counted from 0 without gaps."""
    scores: Tensor | None = None
    """Higher is better; minus the rank where there are only ranks."""
    ref_logps: Tensor | None = None
    lengths: Tensor | None = None
    count: int | None = None
    """Number of lists; None reads it off `lists`, with one device synchronisation."""

    def __post_init__(self) -> None:
        check_form(_tensors_of(self), (*LIST_TENSORS, "lists"))
        if self.lists.dtype != torch.int64:
            raise LossError(f"lists: expected int64 numbers of lists, given {self.lists.dtype}.")

    @property
    def size(self) -> int:
        """Number of lists."""
        return int(self.lists.max()) + 1 if self.count is None else self.count

    def check_numbers(self) -> None:
        """Raise LossError unless the numbers of the lists are below their count, or, without one, have no gaps."""
        given = self.lists.unique().tolist()
        if not given:
            return
        if self.count is None and given != list(range(len(given))):
            raise LossError(f"lists: expected numbers from 0 without gaps, given {_few(given)}. Renumber them.")
        if given[0] < 0 or given[-1] >= self.size:
            raise LossError(f"lists: expected numbers from 0 to {self.size - 1} (count - 1), given {_few(given)}.")


def _tensors_of(record: object) -> dict[str, object]:
    named = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    return {name: value for name, value in named.items() if value is not None}


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _check_tokens_per_example(step_tokens: float | Tensor | None) -> None:
    if isinstance(step_tokens, (int, float)) and not step_tokens > 0:
        raise LossError(f"tokens_per_example: expected a positive number, given {step_tokens}")
    if isinstance(step_tokens, Tensor) and step_tokens.ndim:
        raise LossError(f"tokens_per_example: expected one number, given {tuple(step_tokens.shape)}")
