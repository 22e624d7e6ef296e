"""PromptGroups -> ragged batches.

A batch is one row of real tokens and nothing else:

    [prompt A | completion A1 | completion A2 | prompt B | completion B1 | ...]

A prompt stands once for all its completions; positions restart after the prompt for each completion; there is
no padding. The last token of a completion predicts nothing that is scored, so it is not in the row: a completion
of C scored tokens adds C - 1 computed tokens, a group P + sum(C_k - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prefopt.data.groups import Comparison, PromptGroup


@dataclass(frozen=True)
class Tree:
    """Where one prompt and its completions lie in the row."""

    start: int
    """Row index of the first prompt token."""
    prompt: int
    """Prompt tokens."""
    branches: tuple[tuple[int, int], ...]
    """Per completion, (row index of its first computed token, computed tokens); possibly (_, 0)."""


@dataclass(frozen=True)
class RaggedBatch:
    """Prompt trees in one row, what to score in it, and who is compared with whom."""

    input_ids: Tensor
    """(tokens,) int64."""
    position_ids: Tensor
    """(tokens,) int64."""
    trees: tuple[Tree, ...]
    predict_index: Tensor
    """(scored,) row index of the hidden state that predicts each scored token."""
    targets: Tensor
    """(scored,) token ids."""
    completion_index: Tensor
    """(scored,) which completion each scored token belongs to."""
    completion_lengths: Tensor
    """(completions,) scored tokens."""
    chosen: Tensor
    """(comparisons,) completion index, -1 where the comparison has no chosen side."""
    rejected: Tensor
    """(comparisons,) completion index, -1 where the comparison has no rejected side."""
    preference_probability: Tensor
    """(comparisons,) fp32, NaN where the data give none."""
    keys: tuple[tuple[int, int], ...] = ()
    """(completions,) where each completion comes from: (group, completion) of its dataset."""
    rows: tuple[int, ...] = ()
    """(comparisons,) source rows, for messages."""
    unpaired: bool = False
    """Whether the comparisons are labels of single completions."""
    two_sided: bool = True
    """Whether every comparison has both sides in the row."""
    soft_labels: bool = False
    """Whether every comparison has a preference probability."""

    @property
    def tokens(self) -> int:
        """Computed tokens."""
        return int(self.input_ids.numel())

    @property
    def comparisons(self) -> int:
        """Comparisons (pairs or labels)."""
        return int(self.chosen.numel())

    def to(self, device: torch.device | str) -> RaggedBatch:
        """Return the batch with its tensors on the device."""
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Slice:
    """Some comparisons of one group: what one micro-batch takes of it."""

    group: int
    comparisons: tuple[int, ...]


def needed_completions(comparisons: Sequence[Comparison], *, rejected: bool = True) -> list[int]:
    """Completions that the comparisons name, each once, in their order of appearance."""
    needed: dict[int, None] = {}
    for comparison in comparisons:
        if comparison.chosen is not None:
            needed[comparison.chosen] = None
        if comparison.rejected is not None and rejected:
            needed[comparison.rejected] = None
    return list(needed)


def make_batch(
    groups: Sequence[PromptGroup],
    slices: Sequence[Slice] | None = None,
    *,
    rejected: bool = True,
) -> RaggedBatch:
    """Lay out groups (or the named slices of them) in one row.

    Args:
        groups: the groups, one per slice.
        slices: which comparisons of each; None takes every completion and every comparison.
        rejected: False leaves rejected completions out (a loss that reads only the chosen ones).

    Returns:
        A batch on the CPU.
    """
    row = _Row()
    for number, group in enumerate(groups):
        if slices is None:
            row.add(number, group, range(len(group.completions)), group.comparisons, rejected)
        else:
            part = slices[number]
            comparisons = [group.comparisons[i] for i in part.comparisons]
            wanted = needed_completions(comparisons, rejected=rejected)
            row.add(part.group, group, wanted, comparisons, rejected)
    return row.finish()


class _Row:
    """The row while it is being laid out."""

    def __init__(self) -> None:
        self.tokens = 0
        self.scored_lengths: list[int] = []
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.predict: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.trees: list[Tree] = []
        self.keys: list[tuple[int, int]] = []
        self.pairs: list[tuple[int, int, float, int]] = []
        self.unpaired = False

    def add(
        self,
        number: int,
        group: PromptGroup,
        wanted: Sequence[int],
        comparisons: Sequence[Comparison],
        rejected: bool,
    ) -> None:
        prompt = group.prompt
        start, length = self.tokens, len(prompt)
        self._append(prompt, np.arange(length))
        branches = []
        place: dict[int, int] = {}
        for index in wanted:
            completion = group.completions[index]
            place[index] = len(self.scored_lengths)
            begin, count = self.tokens, len(completion) - 1
            branches.append((begin, count))
            self._append(completion[:-1], np.arange(length, length + count))
            self.predict.append(np.concatenate(([start + length - 1], np.arange(begin, begin + count))))
            self.targets.append(completion)
            self.scored_lengths.append(count + 1)
            self.keys.append((number, index))
        self.trees.append(Tree(start, length, tuple(branches)))
        for comparison in comparisons:
            self.unpaired |= comparison.chosen is None or comparison.rejected is None
            probability = comparison.preference_probability
            self.pairs.append(
                (
                    -1 if comparison.chosen is None else place[comparison.chosen],
                    -1 if comparison.rejected is None or not rejected else place[comparison.rejected],
                    float("nan") if probability is None else probability,
                    comparison.row,
                )
            )

    def _append(self, ids: np.ndarray, positions: np.ndarray) -> None:
        self.ids.append(ids)
        self.positions.append(positions)
        self.tokens += len(ids)

    def finish(self) -> RaggedBatch:
        lengths = np.asarray(self.scored_lengths, dtype=np.int64)
        return RaggedBatch(
            input_ids=_joined(self.ids),
            position_ids=_joined(self.positions),
            trees=tuple(self.trees),
            predict_index=_joined(self.predict),
            targets=_joined(self.targets),
            completion_index=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            completion_lengths=torch.from_numpy(lengths),
            chosen=torch.tensor([pair[0] for pair in self.pairs], dtype=torch.int64),
            rejected=torch.tensor([pair[1] for pair in self.pairs], dtype=torch.int64),
            preference_probability=torch.tensor([pair[2] for pair in self.pairs], dtype=torch.float32),
            keys=tuple(self.keys),
            rows=tuple(pair[3] for pair in self.pairs),
            unpaired=self.unpaired,
            two_sided=all(chosen >= 0 and rejected >= 0 for chosen, rejected, _, _ in self.pairs),
            soft_labels=bool(self.pairs) and not any(probability != probability for _, _, probability, _ in self.pairs),
        )


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
