"""A batch holds exactly the tokens that must be computed, each where its completion needs it."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import group

from prefopt.batching import make_batch
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


@pytest.mark.parametrize(("probabilities", "soft"), [([0.7, 0.9], True), ([0.7, None], False)])
def test_soft_labels_count_only_when_every_comparison_has_one(probabilities, soft):
    groups = [group(3, [2, 2], comparisons=(Comparison(0, 1, p, 1),)) for p in probabilities]
    assert make_batch(groups).soft_labels is soft
