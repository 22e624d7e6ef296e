"""PromptGroups -> ragged batches.

A batch is one row of real tokens and nothing else:

    [prompt A | completion A1 | completion A2 | prompt B | completion B1 | ...]

A prompt stands once for all its completions; positions restart after the prompt for each completion; there is
no padding. The last token of a completion predicts nothing that is scored, so it is not in the row: a completion
of C scored tokens adds C - 1 computed tokens, a group P + sum(C_k - 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prefopt.data.groups import Comparison, PromptGroup, lists_of


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
    chosen_scores: Tensor | None = None
    """(comparisons,) or (comparisons, models) fp32, NaN where there is no chosen side; None unless all have one."""
    rejected_scores: Tensor | None = None
    """(comparisons,) or (comparisons, models) fp32, NaN where there is no rejected side; None unless all have one."""
    values: Tensor | None = None
    """(comparisons,) fp32, expected score of the prompt; None unless every comparison has one."""
    gold: Tensor | None = None
    """(comparisons,) completion index, -1 where the data give no gold completion; None where it was not asked for."""
    list_members: Tensor | None = None
    """(members,) completion index of every member of every list, lists one after another, the best first; a
    completion that several lists share stands in each. None where lists were not asked for."""
    list_index: Tensor | None = None
    """(members,) int64, which list each member belongs to, from 0."""
    list_scores: Tensor | None = None
    """(members,) fp32, what each member is worth in its list; higher is better."""
    lists: int = 0
    """Number of lists; 0 where they were not asked for."""
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

    def pinned(self) -> RaggedBatch:
        """Return the batch in page-locked memory, from where it moves to an accelerator without anybody waiting."""
        fixed = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **fixed)

    @property
    def longest_completion(self) -> int:
        """Scored tokens of the longest completion, known without asking the device."""
        return max((count + 1 for tree in self.trees for _, count in tree.branches), default=0)


@dataclass(frozen=True)
class Slice:
    """Some comparisons of one group: what one micro-batch takes of it."""

    group: int
    comparisons: tuple[int, ...]


def needed_completions(comparisons: Sequence[Comparison], *, rejected: bool = True, gold: bool = False) -> list[int]:
    """Completions that the comparisons name, each once, in their order of appearance."""
    needed: dict[int, None] = {}
    for comparison in comparisons:
        if comparison.chosen is not None:
            needed[comparison.chosen] = None
        if comparison.rejected is not None and rejected:
            needed[comparison.rejected] = None
        if comparison.gold is not None and gold:
            needed[comparison.gold] = None
    return list(needed)


def make_batch(
    groups: Sequence[PromptGroup],
    slices: Sequence[Slice] | None = None,
    *,
    rejected: bool = True,
    gold: bool = False,
    lists: bool = False,
) -> RaggedBatch:
    """Lay out groups (or the named slices of them) in one row.

    Args:
        groups: the groups, one per slice.
        slices: which comparisons of each; None takes every completion and every comparison.
        rejected: False leaves rejected completions out (a loss that reads only the chosen ones).
        gold: True takes the gold completions along.
        lists: True names the members of every list, whose comparisons must all be there (`unit="list"` of a plan).

    Returns:
        A batch on the CPU.
    """
    row = _Row(rejected=rejected, gold=gold, lists=lists)
    for number, group in enumerate(groups):
        if slices is None:
            row.add(number, group, range(len(group.completions)), group.comparisons)
        else:
            part = slices[number]
            comparisons = [group.comparisons[i] for i in part.comparisons]
            wanted = needed_completions(comparisons, rejected=rejected, gold=gold)
            row.add(part.group, group, wanted, comparisons)
    return row.finish()


class _Row:
    """The row while it is being laid out."""

    def __init__(self, *, rejected: bool, gold: bool, lists: bool) -> None:
        self.rejected, self.gold, self.lists = rejected, gold, lists
        self.tokens = 0
        self.scored_lengths: list[int] = []
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.predict: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.trees: list[Tree] = []
        self.keys: list[tuple[int, int]] = []
        self.comparisons: list[Comparison] = []
        self.places: list[tuple[int, int, int]] = []
        self.members: list[list[tuple[int, float]]] = []

    def add(self, number: int, group: PromptGroup, wanted: Sequence[int], comparisons: Sequence[Comparison]) -> None:
        prompt = group.prompt
        start, length = self.tokens, len(prompt)
        self._append(prompt, np.arange(length))
        branches = []
        place: dict[int | None, int] = {None: -1}
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
        self.comparisons += comparisons
        for one in comparisons:
            rejected = place[one.rejected] if self.rejected else -1
            self.places.append((place[one.chosen], rejected, place[one.gold] if self.gold else -1))
        if self.lists:
            self._add_lists(comparisons, place)

    def _add_lists(self, comparisons: Sequence[Comparison], place: Mapping[int | None, int]) -> None:
        for indices in lists_of(comparisons):
            worth: dict[int, float] = {}
            for one in (comparisons[index] for index in indices):
                for side, score in zip((one.chosen, one.rejected), one.list_scores):
                    if side is not None:
                        worth[place[side]] = score
            self.members.append(sorted(worth.items(), key=lambda member: (-member[1], member[0])))

    def _append(self, ids: np.ndarray, positions: np.ndarray) -> None:
        self.ids.append(ids)
        self.positions.append(positions)
        self.tokens += len(ids)

    def finish(self) -> RaggedBatch:
        lengths = np.asarray(self.scored_lengths, dtype=np.int64)
        places = torch.tensor(self.places, dtype=torch.int64).reshape(-1, 3)
        probabilities = [one.preference_probability for one in self.comparisons]
        return RaggedBatch(
            input_ids=_joined(self.ids),
            position_ids=_joined(self.positions),
            trees=tuple(self.trees),
            predict_index=_joined(self.predict),
            targets=_joined(self.targets),
            completion_index=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            completion_lengths=torch.from_numpy(lengths),
            chosen=places[:, 0].contiguous(),
            rejected=places[:, 1].contiguous(),
            preference_probability=torch.tensor(
                [math.nan if p is None else p for p in probabilities], dtype=torch.float32
            ),
            **_scores(self.comparisons),
            values=_all_or_none([one.value for one in self.comparisons]),
            gold=places[:, 2].contiguous() if self.gold else None,
            **(_list_tensors(self.members) if self.lists else {}),
            lists=len(self.members),
            keys=tuple(self.keys),
            rows=tuple(one.row for one in self.comparisons),
            unpaired=any(one.chosen is None or one.rejected is None for one in self.comparisons),
            two_sided=all(chosen >= 0 and rejected >= 0 for chosen, rejected, _ in self.places),
            soft_labels=bool(probabilities) and None not in probabilities,
        )


def _scores(comparisons: Sequence[Comparison]) -> dict[str, Tensor | None]:
    """Return the scores of both sides; none unless every completion that is compared has one."""
    sides = {
        "chosen_scores": [(one.chosen, one.chosen_score) for one in comparisons],
        "rejected_scores": [(one.rejected, one.rejected_score) for one in comparisons],
    }
    given = [score for side in sides.values() for completion, score in side if completion is not None]
    if not given or None in given:
        return dict.fromkeys(sides)
    nothing = (math.nan,) * len(given[0] or ())
    tensors = {
        name: torch.tensor([score or nothing for _, score in side], dtype=torch.float32) for name, side in sides.items()
    }
    return {name: tensor.squeeze(1) if tensor.shape[1] == 1 else tensor for name, tensor in tensors.items()}


def _list_tensors(members: Sequence[Sequence[tuple[int, float]]]) -> dict[str, Tensor | None]:
    flat = [member for one in members for member in one]
    return {
        "list_members": torch.tensor([completion for completion, _ in flat], dtype=torch.int64),
        "list_index": torch.tensor([number for number, one in enumerate(members) for _ in one], dtype=torch.int64),
        "list_scores": torch.tensor([score for _, score in flat], dtype=torch.float32),
    }


def _all_or_none(values: Sequence[float | None]) -> Tensor | None:
    return None if not values or None in values else torch.tensor(values, dtype=torch.float32)


def moved(made: Tensor, device: torch.device) -> Tensor:
    """Return what was made on the host on the device, without waiting for it."""
    if device.type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
