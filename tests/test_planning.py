"""Steps hold exactly their comparisons, and micro-batches stay within the token budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import group

from prefopt.batching import Slice, make_batch
from prefopt.data.groups import Comparison, PromptGroup, lists_of
from prefopt.planning import (
    StepPlanner,
    _balanced,
    _first_fit,
    computed_tokens,
    every_comparison,
    longest_unit,
    pack_slices,
)


class Groups:
    """A dataset in memory with the interface of `GroupDataset` that planning uses."""

    def __init__(self, groups: list[PromptGroup]) -> None:
        self.groups = groups
        self.prompt_lengths = np.array([len(one.prompt) for one in groups])
        self.comparisons_per_group = np.array([len(one.comparisons) for one in groups])
        self.lists_per_group = np.array([len(lists_of(one.comparisons)) for one in groups])

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        return self.groups[index]

    def completion_lengths(self, index):
        return np.array([len(completion) for completion in self.groups[index].completions])

    def comparisons(self, index):
        return self.groups[index].comparisons


def some_groups(count: int = 12) -> Groups:
    generator = np.random.default_rng(0)
    return Groups(
        [
            group(
                int(generator.integers(1, 9)),
                list(generator.integers(1, 9, generator.integers(2, 5))),
                seed=i,
            )
            for i in range(count)
        ]
    )


def members(step):
    return sorted((part.group, index) for micro in step.micro_batches for part in micro for index in part.comparisons)


@given(batch_size=st.integers(1, 30), budget=st.integers(8, 200), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_an_epoch_takes_every_comparison_once_and_the_batch_size_never_changes(batch_size, budget, seed):
    groups = some_groups()
    planner = StepPlanner(groups, batch_size=batch_size, token_budget=budget, seed=seed)
    total = planner.comparisons
    steps = [planner.step(n, last_comparison=total) for n in range(planner.total_steps(epochs=1, max_steps=None))]
    taken = [member for step in steps for member in members(step)]
    assert sorted(taken) == sorted((g, c) for g in range(len(groups)) for c in range(len(groups[g].comparisons)))
    assert [step.comparisons for step in steps[:-1]] == [batch_size] * (len(steps) - 1)


def test_the_token_budget_changes_the_micro_batches_and_nothing_else():
    groups = some_groups()
    tight = StepPlanner(groups, batch_size=10, token_budget=20, seed=3).step(1)
    loose = StepPlanner(groups, batch_size=10, token_budget=10_000, seed=3).step(1)
    assert members(tight) == members(loose)
    assert len(tight.micro_batches) > len(loose.micro_batches) == 1
    assert tight.chosen_tokens == loose.chosen_tokens


def test_micro_batches_stay_within_the_budget_unless_one_comparison_exceeds_it():
    groups = some_groups(30)
    step = pack_slices(groups, every_comparison(groups), token_budget=25)
    for micro in step.micro_batches:
        tokens = make_batch([groups[part.group] for part in micro], micro).tokens
        alone = len(micro) == 1 and len(micro[0].comparisons) == 1
        assert tokens <= 25 or alone


def test_a_completion_that_several_comparisons_share_is_counted_and_computed_once():
    """Four completions in all six pairs: one prompt and four completions, not six prompts and twelve."""
    pairs = tuple(Comparison(i, j, None, 4 * i + j) for i in range(4) for j in range(i + 1, 4))
    groups = Groups([group(7, [4, 9, 2, 6], comparisons=pairs)])
    step = pack_slices(groups, every_comparison(groups), token_budget=1000)
    ((part,),) = step.micro_batches
    batch = make_batch([groups[0]], [part])
    assert step.comparisons == batch.comparisons == 6
    assert step.computed_tokens == batch.tokens == 7 + 3 + 8 + 1 + 5
    assert batch.completion_lengths.tolist() == [4, 9, 2, 6]
    assert batch.longest_completion == 9


def test_micro_batches_of_a_step_are_of_even_size():
    generator = np.random.default_rng(2)
    groups = Groups([group(9, list(generator.integers(4, 12, 2)), seed=i) for i in range(40)])
    sizes = [
        sum(make_batch([groups[part.group]], [part]).tokens for part in micro)
        for micro in pack_slices(groups, every_comparison(groups), token_budget=600).micro_batches
    ]
    assert sum(sizes) > 600
    assert max(sizes) - min(sizes) <= 31  # one group


@given(seed=st.integers(0, 50), budget=st.integers(8, 300))
@settings(max_examples=60, deadline=None)
def test_even_sizes_cost_no_micro_batch_and_break_no_budget(seed, budget):
    generator = np.random.default_rng(seed)
    sizes = sorted((int(size) for size in generator.integers(1, 120, 30)), reverse=True)
    sized = [(size, Slice(number, (0,))) for number, size in enumerate(sizes)]
    first = _first_fit(sized, budget)
    even = _balanced(sized, len(first), budget)
    if even is not None:
        assert len(even) == len(first)
        assert sorted(part.group for one in even for part in one) == list(range(30))
        assert all(len(one) == 1 or sum(sizes[part.group] for part in one) <= budget for one in even)


def test_the_longest_comparison_is_found_without_looking_at_all_groups():
    groups, lists = some_groups(30), some_lists()
    alone = [
        make_batch([groups[g]], [Slice(g, (c,))]).tokens for g in range(30) for c in range(len(groups[g].comparisons))
    ]
    assert longest_unit(groups) == max(alone)
    whole = [
        make_batch([lists[g]], [Slice(g, indices)]).tokens
        for g in range(len(lists))
        for indices in lists_of(lists[g].comparisons)
    ]
    assert longest_unit(lists, unit="list") == max(whole)


def test_planned_tokens_are_the_tokens_of_the_batch():
    groups = some_groups()
    step = pack_slices(groups, every_comparison(groups), token_budget=60)
    laid_out = sum(make_batch([groups[p.group] for p in micro], micro).tokens for micro in step.micro_batches)
    assert step.computed_tokens == laid_out


def test_the_order_depends_on_seed_and_epoch_only():
    groups = some_groups()
    first, again, other = (StepPlanner(groups, batch_size=5, token_budget=50, seed=seed) for seed in (1, 1, 2))
    assert [members(first.step(n)) for n in (7, 0, 3)] == [members(again.step(n)) for n in (7, 0, 3)]
    assert [members(first.step(n)) for n in range(4)] != [members(other.step(n)) for n in range(4)]


def test_a_loss_of_chosen_completions_computes_no_rejected_one():
    one = group(5, [4, 9])
    groups = Groups([one])
    parts = every_comparison(groups)
    batch = make_batch([one], parts, rejected=False)
    assert batch.tokens == 5 + 3 == computed_tokens(groups, parts[0], one.comparisons, rejected=False)
    assert batch.rejected.tolist() == [-1]
    assert not batch.two_sided


def some_lists(count: int = 10) -> Groups:
    """Groups of one to three lists, whose completions they share."""
    generator = np.random.default_rng(1)
    groups = []
    for seed in range(count):
        comparisons, lengths = [], list(generator.integers(1, 9, 5))
        for number in range(generator.integers(1, 4)):
            places = sorted(generator.permutation(5)[: generator.integers(2, 5)].tolist())
            comparisons += [Comparison(i, j, None, number, list_number=number) for i in places for j in places if i < j]
        groups.append(group(int(generator.integers(1, 9)), lengths, seed=seed, comparisons=tuple(comparisons)))
    return Groups(groups)


@given(batch_size=st.integers(1, 12), budget=st.integers(5, 100), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_lists_are_counted_instead_of_comparisons_and_never_split(batch_size, budget, seed):
    groups = some_lists()
    planner = StepPlanner(groups, batch_size=batch_size, token_budget=budget, seed=seed, unit="list")
    total = planner.comparisons_in(1)
    assert total == groups.lists_per_group.sum()
    steps = [planner.step(n, last_comparison=total) for n in range(planner.total_steps(epochs=1, max_steps=None))]
    assert [step.units for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    taken = []
    for step in steps:
        assert step.comparisons == len(members(step))
        for part in (part for micro in step.micro_batches for part in micro):
            whole = lists_of(groups.comparisons(part.group))
            inside = [indices for indices in whole if set(indices) <= set(part.comparisons)]
            assert sorted(part.comparisons) == sorted(index for indices in inside for index in indices)
            taken += [(part.group, indices) for indices in inside]
    everything = [
        (number, indices) for number in range(len(groups)) for indices in lists_of(groups.comparisons(number))
    ]
    assert sorted(taken) == sorted(everything)


def test_a_list_larger_than_the_budget_is_its_own_micro_batch():
    groups = some_lists()
    step = pack_slices(groups, every_comparison(groups), token_budget=12, unit="list")
    assert step.units == groups.lists_per_group.sum()
    for micro in step.micro_batches:
        batch = make_batch([groups[part.group] for part in micro], micro, lists=True)
        assert batch.tokens <= 12 or batch.lists == 1
    assert step.units == sum(
        make_batch([groups[part.group] for part in micro], micro, lists=True).lists for micro in step.micro_batches
    )


def test_pairs_are_planned_alike_as_comparisons_and_as_lists():
    groups = some_groups()
    plans = [
        StepPlanner(groups, batch_size=7, token_budget=40, seed=2, unit=unit).step(1) for unit in ("comparison", "list")
    ]
    assert plans[0] == plans[1]
    assert plans[0].units == plans[0].comparisons == 7


def test_gold_completions_are_planned_for_only_when_asked_for():
    comparisons = (Comparison(0, 1, None, 1, gold=2), Comparison(0, 1, None, 2, gold=2), Comparison(1, 0, None, 3))
    groups = Groups([group(5, [4, 9, 7], comparisons=comparisons)])
    parts = every_comparison(groups)
    plain = pack_slices(groups, parts, token_budget=99)
    gold = pack_slices(groups, parts, token_budget=99, gold=True)
    assert gold.computed_tokens == plain.computed_tokens + 6 == make_batch([groups[0]], parts, gold=True).tokens
    planner = StepPlanner(groups, batch_size=3, token_budget=99, seed=0, gold=True)
    assert planner.step(0) == gold
