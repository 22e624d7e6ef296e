"""A dataset -> optimizer steps -> micro-batches under a token budget, all known before anything is computed."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prefopt.batching import Slice, needed_completions
from prefopt.data.groups import Comparison, GroupDataset, lists_of

Unit = Literal["comparison", "list"]
"""What a loss has one value for. The comparisons of one list stay together where it is the list."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches and its global denominators, known before any backward pass."""

    micro_batches: tuple[tuple[Slice, ...], ...]
    comparisons: int
    chosen_tokens: int
    computed_tokens: int
    units: int
    """Comparisons, or lists: as many values as the loss has in this step."""

    @property
    def tokens_per_example(self) -> float:
        """Mean chosen tokens per comparison: the denominator of a token mean."""
        return self.chosen_tokens / max(self.comparisons, 1)


def computed_tokens(
    dataset: GroupDataset, part: Slice, comparisons: Sequence[Comparison], *, rejected: bool, gold: bool = False
) -> int:
    """Tokens that one slice adds to a row: its prompt once, and each needed completion without its last token."""
    lengths = dataset.completion_lengths(part.group)
    needed = needed_completions(comparisons, rejected=rejected, gold=gold)
    return int(dataset.prompt_lengths[part.group]) + sum(int(lengths[index]) - 1 for index in needed)


class StepPlanner:
    """Cuts a dataset into optimizer steps; the same seed always gives the same steps.

    The data are one endless stream: epoch after epoch, each in a fresh order of groups. A step takes the next
    ``batch_size`` comparisons; a group that straddles a step boundary is split, so that the batch size never
    changes. Within a step, slices are packed into micro-batches of at most ``token_budget`` computed tokens,
    first-fit-decreasing, and then spread evenly over that many; a slice that is larger alone is its own micro-batch.

    A last step of fewer than ``minimum`` comparisons is left out: losses that are taken over a step need several.
    With ``unit="list"`` lists take the place of comparisons: they are what is counted, and none is ever split.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        *,
        batch_size: int,
        token_budget: int,
        seed: int,
        rejected: bool = True,
        gold: bool = False,
        unit: Unit = "comparison",
        minimum: int = 1,
    ) -> None:
        self.dataset = dataset
        self.minimum = minimum
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.seed = seed
        self.rejected = rejected
        self.gold = gold
        self.unit: Unit = unit
        self.comparisons = int(self._units_per_group.sum())
        """Of one epoch; lists where the unit is the list."""
        self._epoch = -1
        self._stream: np.ndarray = np.empty((0, 2), dtype=np.int64)

    def total_steps(self, *, epochs: float | None, max_steps: int | None) -> int:
        """Optimizer steps of a run."""
        if max_steps is not None:
            return max_steps
        steps, rest = divmod(self.comparisons_in(epochs or 0), self.batch_size)
        return steps + (rest >= self.minimum)

    def comparisons_in(self, epochs: float) -> int:
        """Comparisons (lists where the unit is the list) in a number of epochs, at least one."""
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
        """(comparisons or lists, 2): group and number within it, in the order of that epoch."""
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            groups = generator.permutation(len(self.dataset))
            counts = self._units_per_group[groups]
            ends = np.cumsum(counts)
            within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
            self._stream = np.stack((np.repeat(groups, counts), within), axis=1)
            self._epoch = epoch
        return self._stream

    def _pack(self, members: Sequence[tuple[int, int]]) -> Step:
        grouped: dict[int, list[int]] = {}
        for group, number in members:
            grouped.setdefault(group, []).append(number)
        slices = [self._slice(group, numbers) for group, numbers in grouped.items()]
        return pack_slices(
            self.dataset,
            slices,
            token_budget=self.token_budget,
            rejected=self.rejected,
            gold=self.gold,
            unit=self.unit,
        )

    def _slice(self, group: int, numbers: Sequence[int]) -> Slice:
        if self.unit == "comparison":
            return Slice(group, tuple(numbers))
        lists = lists_of(self.dataset.comparisons(group))
        return Slice(group, tuple(index for number in numbers for index in lists[number]))

    @property
    def _units_per_group(self) -> np.ndarray:
        return self.dataset.comparisons_per_group if self.unit == "comparison" else self.dataset.lists_per_group


def pack_slices(
    dataset: GroupDataset,
    slices: Sequence[Slice],
    *,
    token_budget: int,
    rejected: bool = True,
    gold: bool = False,
    unit: Unit = "comparison",
) -> Step:
    """Pack slices into as few micro-batches under the budget as first-fit-decreasing needs, of even size.

    Args:
        dataset: the groups.
        slices: which comparisons of which groups; with ``unit="list"`` whole lists.
        token_budget: computed tokens per micro-batch.
        rejected: False where the loss reads only chosen completions.
        gold: True where the loss reads gold completions.
        unit: what is never split.
    """
    sized: list[tuple[int, Slice]] = []
    chosen_tokens = units = 0
    for part in slices:
        comparisons = dataset.comparisons(part.group)
        lengths = dataset.completion_lengths(part.group)
        for one in (comparisons[index] for index in part.comparisons):
            chosen_tokens += 0 if one.chosen is None else int(lengths[one.chosen])
        whole = _units(part, comparisons, unit)
        units += len(whole)
        sized += _split_to_budget(dataset, part, whole, comparisons, token_budget, rejected=rejected, gold=gold)
    sized.sort(key=lambda item: -item[0])
    bins = _first_fit(sized, token_budget)
    bins = _balanced(sized, len(bins), token_budget) or bins
    return Step(
        micro_batches=tuple(tuple(members) for members in bins),
        comparisons=sum(len(part.comparisons) for part in slices),
        chosen_tokens=chosen_tokens,
        computed_tokens=sum(size for size, _ in sized),
        units=units,
    )


def _first_fit(sized: Sequence[tuple[int, Slice]], token_budget: int) -> list[list[Slice]]:
    """Put each slice, the largest first, into the first micro-batch that has room for it."""
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
    return bins


def _balanced(sized: Sequence[tuple[int, Slice]], count: int, token_budget: int) -> list[list[Slice]] | None:
    """Spread slices evenly over as many micro-batches as first-fit needs; None where that breaks the budget.

    First-fit leaves a remainder in the last one: a step of 9,000 tokens under a budget of 8,192 would run 8,192 and
    808, and the small one costs nearly as many kernel launches as the large one.
    """
    bins: list[list[Slice]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for size, piece in sized:  # the largest first, each to the emptiest
        used, number = heapq.heappop(filled)
        if bins[number] and used + size > token_budget:
            return None
        bins[number].append(piece)
        heapq.heappush(filled, (used + size, number))
    return bins


def longest_unit(dataset: GroupDataset, *, rejected: bool = True, gold: bool = False, unit: Unit = "comparison") -> int:
    """Computed tokens of the longest comparison (or list) of a dataset: no micro-batch can be smaller."""
    # A group with all its completions bounds its units: looked at from the largest down, most are never looked into.
    bound = np.array(
        [dataset.prompt_lengths[group] + (dataset.completion_lengths(group) - 1).sum() for group in range(len(dataset))]
    )
    longest = 0
    for group in (int(number) for number in np.argsort(-bound, kind="stable")):
        if bound[group] <= longest:
            break
        comparisons = dataset.comparisons(group)
        whole = Slice(group, tuple(range(len(comparisons))))
        for indices in _units(whole, comparisons, unit):
            picked = [comparisons[index] for index in indices]
            longest = max(longest, computed_tokens(dataset, whole, picked, rejected=rejected, gold=gold))
    return longest


def _units(part: Slice, comparisons: Sequence[Comparison], unit: Unit) -> list[tuple[int, ...]]:
    """Return what must stay together in a slice, as indices of comparisons."""
    if unit == "comparison":
        return [(index,) for index in part.comparisons]
    lists = lists_of([comparisons[index] for index in part.comparisons])
    return [tuple(part.comparisons[place] for place in places) for places in lists]


def _split_to_budget(
    dataset: GroupDataset,
    part: Slice,
    units: Sequence[tuple[int, ...]],
    comparisons: Sequence[Comparison],
    token_budget: int,
    *,
    rejected: bool,
    gold: bool,
) -> Iterator[tuple[int, Slice]]:
    """Cut a slice whose units together exceed the budget, each with its size; sharing is lost at the cuts."""

    def size(indices: Sequence[int]) -> int:
        picked = [comparisons[index] for index in indices]
        return computed_tokens(dataset, part, picked, rejected=rejected, gold=gold)

    taken: list[int] = []
    for unit in units:
        if taken and size([*taken, *unit]) > token_budget:
            yield size(taken), Slice(part.group, tuple(taken))
            taken = []
        taken += unit
    yield size(taken), Slice(part.group, tuple(taken))


def every_comparison(dataset: GroupDataset) -> list[Slice]:
    """Return each group with all its comparisons, in the order of the dataset."""
    return [Slice(group, tuple(range(int(count)))) for group, count in enumerate(dataset.comparisons_per_group)]
