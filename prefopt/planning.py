"""A dataset -> optimizer steps -> micro-batches under a token budget, all known before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.batching import Slice, needed_completions
from prefopt.data.groups import Comparison, GroupDataset


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches and its global denominators, known before any backward pass."""

    micro_batches: tuple[tuple[Slice, ...], ...]
    comparisons: int
    chosen_tokens: int
    computed_tokens: int


def computed_tokens(dataset: GroupDataset, part: Slice, comparisons: Sequence[Comparison], *, rejected: bool) -> int:
    """Tokens that one slice adds to a row: its prompt once, and each needed completion without its last token."""
    lengths = dataset.completion_lengths(part.group)
    needed = needed_completions(comparisons, rejected=rejected)
    return int(dataset.prompt_lengths[part.group]) + sum(int(lengths[index]) - 1 for index in needed)


class StepPlanner:
    """Cuts a dataset into optimizer steps; the same seed always gives the same steps.

    The data are one endless stream: epoch after epoch, each in a fresh order of groups. A step takes the next
    ``batch_size`` comparisons; a group that straddles a step boundary is split, so that the batch size never
    changes. Within a step, slices are packed into micro-batches of at most ``token_budget`` computed tokens,
    first-fit-decreasing; a slice that is larger alone is its own micro-batch.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        *,
        batch_size: int,
        token_budget: int,
        seed: int,
        rejected: bool = True,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.seed = seed
        self.rejected = rejected
        self.comparisons = int(dataset.comparisons_per_group.sum())
        self._epoch = -1
        self._stream: np.ndarray = np.empty((0, 2), dtype=np.int64)

    def total_steps(self, *, epochs: float | None, max_steps: int | None) -> int:
        """Optimizer steps of a run."""
        if max_steps is not None:
            return max_steps
        return math.ceil(self.comparisons_in(epochs or 0) / self.batch_size)

    def comparisons_in(self, epochs: float) -> int:
        """Comparisons in a number of epochs, at least one."""
        return max(1, round(epochs * self.comparisons))

    def step(self, number: int, *, last_comparison: int | None = None) -> Step:
        """Plan step ``number`` (from 0); ``last_comparison`` ends the stream there (a shorter last step)."""
        begin, end = number * self.batch_size, (number + 1) * self.batch_size
        if last_comparison is not None:
            end = min(end, last_comparison)
        members: list[tuple[int, int]] = []
        position = begin
        while position < end:
            epoch, offset = divmod(position, self.comparisons)
            order = self._order(epoch)
            taken = order[offset : offset + end - position]
            members += [(int(group), int(comparison)) for group, comparison in taken]
            position += len(taken)
        return self._pack(members)

    def _order(self, epoch: int) -> np.ndarray:
        """(comparisons, 2): group and comparison within it, in the order of that epoch."""
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            groups = generator.permutation(len(self.dataset))
            counts = self.dataset.comparisons_per_group[groups]
            ends = np.cumsum(counts)
            within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
            self._stream = np.stack((np.repeat(groups, counts), within), axis=1)
            self._epoch = epoch
        return self._stream

    def _pack(self, members: Sequence[tuple[int, int]]) -> Step:
        grouped: dict[int, list[int]] = {}
        for group, comparison in members:
            grouped.setdefault(group, []).append(comparison)
        slices = [Slice(group, tuple(comparisons)) for group, comparisons in grouped.items()]
        return pack_slices(self.dataset, slices, token_budget=self.token_budget, rejected=self.rejected)


def pack_slices(dataset: GroupDataset, slices: Sequence[Slice], *, token_budget: int, rejected: bool = True) -> Step:
    """Pack slices into micro-batches under the budget, first-fit-decreasing over computed tokens."""
    sized: list[tuple[int, Slice]] = []
    chosen_tokens = 0
    for part in slices:
        comparisons = dataset.comparisons(part.group)
        lengths = dataset.completion_lengths(part.group)
        for index in part.comparisons:
            chosen = comparisons[index].chosen
            chosen_tokens += 0 if chosen is None else int(lengths[chosen])
        for piece in _split_to_budget(dataset, part, comparisons, token_budget, rejected):
            picked = [comparisons[index] for index in piece.comparisons]
            sized.append((computed_tokens(dataset, piece, picked, rejected=rejected), piece))
    sized.sort(key=lambda item: -item[0])
    bins: list[list[Slice]] = []
    room: list[int] = []
    for size, piece in sized:
        for number, left in enumerate(room):
            if size <= left:
                bins[number].append(piece)
                room[number] -= size
                break
        else:
            bins.append([piece])
            room.append(token_budget - size)
    return Step(
        micro_batches=tuple(tuple(members) for members in bins),
        comparisons=sum(len(part.comparisons) for part in slices),
        chosen_tokens=chosen_tokens,
        computed_tokens=sum(size for size, _ in sized),
    )


def _split_to_budget(
    dataset: GroupDataset,
    part: Slice,
    comparisons: Sequence[Comparison],
    token_budget: int,
    rejected: bool,
) -> Iterator[Slice]:
    """Cut a slice whose comparisons together exceed the budget; sharing is lost at the cuts."""
    taken: list[int] = []
    for index in part.comparisons:
        candidate = [comparisons[i] for i in [*taken, index]]
        if taken and computed_tokens(dataset, part, candidate, rejected=rejected) > token_budget:
            yield Slice(part.group, tuple(taken))
            taken = []
        taken.append(index)
    yield Slice(part.group, tuple(taken))


def every_comparison(dataset: GroupDataset) -> list[Slice]:
    """Return each group with all its comparisons, in the order of the dataset."""
    return [Slice(group, tuple(range(int(count)))) for group, count in enumerate(dataset.comparisons_per_group)]
