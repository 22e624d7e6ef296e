"""A batch holds exactly the tokens that must be computed, each where its completion needs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import group

from prefopt.batching import Slice, make_batch, needed_completions
from prefopt.data.groups import Comparison, PromptGroup


def test_a_completion_that_two_comparisons_share_is_computed_once():
    shared = PromptGroup(
        np.arange(3, 8),
        tuple(np.arange(3, 3 + n) for n in (4, 5, 6)),
        (Comparison(0, 1, None, 1), Comparison(0, 2, None, 2)),
    )
    batch = make_batch([shared])
    assert batch.tokens == 5 + 3 + 4 + 5
    assert batch.chosen.tolist() == [0, 0]
    assert batch.rejected.tolist() == [1, 2]


def test_positions_restart_after_the_prompt_for_every_completion():
    batch = make_batch([group(3, [3, 2]), group(2, [1])])
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert batch.predict_index.tolist() == [2, 3, 4, 2, 5, 7]


def ranked(worth, *, number=None, row=1):
    """Every ordered pair of a list, whose completions are worth this."""
    places = range(len(worth))
    return tuple(
        Comparison(i, j, None, row, list_number=number, list_scores=(worth[i], worth[j]))
        for i in places
        for j in places
        if worth[i] > worth[j]
    )


def test_the_members_of_a_list_stand_together_the_best_first():
    groups = [group(3, [2, 2, 2], comparisons=ranked([0.5, 2, -1], number=0)), group(2, [4, 1])]
    batch = make_batch(groups, lists=True)
    assert batch.list_members.tolist() == [1, 0, 2, 3, 4]
    assert batch.list_index.tolist() == [0, 0, 0, 1, 1]
    assert batch.list_scores.tolist() == [2, 0.5, -1, 1, 0]
    assert batch.list_index.dtype == torch.int64
    assert batch.list_scores.dtype == torch.float32
    assert batch.lists == 2


def test_comparisons_without_a_list_are_lists_of_two():
    batch = make_batch([group(3, [2, 2, 2])], lists=True)  # the first beats both others
    assert batch.list_members.tolist() == [0, 1, 0, 2]
    assert batch.list_index.tolist() == [0, 0, 1, 1]
    assert batch.list_scores.tolist() == [1, 0, 1, 0]


def test_what_is_not_asked_for_is_not_there():
    batch = make_batch([group(3, [2, 2])])
    names = ("chosen_scores", "rejected_scores", "values", "gold", "list_members", "list_index", "list_scores")
    assert [name for name in names if getattr(batch, name) is not None] == []
    assert batch.lists == 0


def test_a_gold_completion_is_laid_out_only_when_asked_for():
    comparisons = (Comparison(0, 1, None, 1, gold=2), Comparison(3, 1, None, 2))
    one = group(3, [2, 5, 7, 4], comparisons=comparisons)
    parts = [Slice(0, (0, 1))]
    assert needed_completions(comparisons) == [0, 1, 3]
    assert needed_completions(comparisons, gold=True) == [0, 1, 2, 3]
    assert make_batch([one], parts).completion_lengths.tolist() == [2, 5, 4]
    batch = make_batch([one], parts, gold=True)
    assert batch.completion_lengths.tolist() == [2, 5, 7, 4]
    assert batch.gold.tolist() == [2, -1]
    only = make_batch([one], parts, rejected=False, gold=True)
    assert (only.chosen.tolist(), only.rejected.tolist(), only.gold.tolist()) == ([0, 2], [-1, -1], [1, -1])


def test_scores_are_there_when_every_compared_completion_has_one():
    scored = Comparison(0, 1, None, 1, chosen_score=(2.0,), rejected_score=(1.0,), value=0.5)
    whole = make_batch([group(3, [2, 2], comparisons=(scored,))] * 2)
    assert (whole.chosen_scores.tolist(), whole.rejected_scores.tolist()) == ([2, 2], [1, 1])
    assert whole.values.tolist() == [0.5, 0.5]
    assert whole.chosen_scores.dtype == whole.values.dtype == torch.float32
    half = make_batch([group(3, [2, 2], comparisons=(scored,)), group(3, [2, 2])])
    assert (half.chosen_scores, half.rejected_scores, half.values) == (None, None, None)
    undesirable = Comparison(None, 0, None, 1, rejected_score=(1.0, 3.0))
    labels = make_batch([group(3, [2], comparisons=(undesirable,))])
    assert labels.chosen_scores.isnan().tolist() == [[True, True]]
    assert labels.rejected_scores.tolist() == [[1, 3]]


def test_a_batch_moves_with_everything_it_has():
    scored = Comparison(0, 1, None, 1, chosen_score=(2.0,), rejected_score=(1.0,), value=0.5, gold=1)
    batch = make_batch([group(3, [2, 2], comparisons=(scored,))], gold=True, lists=True).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 16
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(("probabilities", "soft"), [([0.7, 0.9], True), ([0.7, None], False)])
def test_soft_labels_count_only_when_every_comparison_has_one(probabilities, soft):
    groups = [group(3, [2, 2], comparisons=(Comparison(0, 1, p, 1),)) for p in probabilities]
    assert make_batch(groups).soft_labels is soft
