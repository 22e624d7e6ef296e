"""Steps hold exactly their comparisons, and micro-batches stay within the token budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import group

from prefopt.batching import make_batch
from prefopt.data.groups import PromptGroup
from prefopt.planning import StepPlanner, computed_tokens, every_comparison, pack_slices


class Groups:
    """A dataset in memory with the interface of `GroupDataset` that planning uses."""

    def __init__(self, groups: list[PromptGroup]) -> None:
        self.groups = groups
        self.prompt_lengths = np.array([len(one.prompt) for one in groups])
        self.comparisons_per_group = np.array([len(one.comparisons) for one in groups])

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
