"""List losses: on two completions they are pair losses, and how a list is laid out does not matter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from published.records import make_lists, make_record

from prefopt_losses import METHODS, ListLogProbs, LossError, get_loss

LISTWISE = [name for name, method in METHODS.items() if method.family == "listwise"]
every_list_method = pytest.mark.parametrize("name", LISTWISE)


def as_lists(pairs, scores=(1.0, 0.0)):
    """The pairs as lists of two, chosen first."""

    def both(name):
        return torch.stack([getattr(pairs, name.format(side)) for side in ("chosen", "rejected")], 1).flatten()

    lists = torch.arange(len(pairs.chosen_logps)).repeat_interleave(2)
    of_all = torch.tensor(scores, dtype=torch.float64).repeat(len(pairs.chosen_logps))
    return ListLogProbs(both("{}_logps"), lists, of_all, both("ref_{}_logps"), both("{}_lengths"))


def test_plackett_luce_of_two_is_dpo():
    pairs = make_record()
    torch.testing.assert_close(
        get_loss("plackett_luce_dpo", beta=0.3)(as_lists(pairs)), get_loss("dpo", beta=0.3)(pairs)
    )


def test_infonca_of_two_is_dpo_under_soft_labels_and_under_hard_ones_as_alpha_goes_to_zero():
    pairs = make_record()
    sure = torch.full((7,), 1 / 0.7).double().sigmoid()
    soft = get_loss("dpo", beta=0.3, soft_labels=True)(replace(pairs, preference_probability=sure))
    torch.testing.assert_close(get_loss("infonca", beta=0.3, alpha=0.7)(as_lists(pairs)), soft)
    torch.testing.assert_close(get_loss("infonca", beta=0.3)(as_lists(pairs)), get_loss("dpo", beta=0.3)(pairs))


def test_nca_of_two_is_nca_pair_as_alpha_goes_to_zero():
    pairs = make_record()
    torch.testing.assert_close(get_loss("nca_list", beta=0.3)(as_lists(pairs)), get_loss("nca_pair", beta=0.3)(pairs))


def test_rrhf_of_two_is_a_hinge_at_zero_on_likelihoods_per_token_plus_the_nll_of_the_better():
    pairs = make_record()
    behind = pairs.rejected_logps / pairs.rejected_lengths - pairs.chosen_logps / pairs.chosen_lengths
    assert 0 < (behind > 0).sum() < 7
    expected = 5 * behind.relu() - pairs.chosen_logps
    torch.testing.assert_close(get_loss("rrhf", rrhf_weight=5.0)(as_lists(pairs)), expected)


@every_list_method
def test_the_order_of_completions_and_of_lists_does_not_matter(name):
    record, loss = make_lists(), get_loss(name)
    order = torch.randperm(len(record.logps), generator=torch.Generator().manual_seed(0))
    shuffled = {key: value[order] for key, value in vars(record).items() if isinstance(value, torch.Tensor)}
    torch.testing.assert_close(loss(ListLogProbs(**shuffled)), loss(record))


@every_list_method
def test_a_list_does_not_depend_on_the_others_of_its_batch(name):
    record, loss = make_lists(sizes=(2, 4, 3)), get_loss(name)
    second = slice(2, 6)
    tensors = {key: value[second] for key, value in vars(record).items() if isinstance(value, torch.Tensor)}
    alone = ListLogProbs(**tensors | {"lists": torch.zeros(4, dtype=torch.int64)})
    torch.testing.assert_close(loss(alone), loss(record)[1:2])


@every_list_method
def test_given_the_number_of_lists_one_without_completions_is_worth_nothing(name):
    record, loss = make_lists(sizes=(2, 4)), get_loss(name)
    assert torch.equal(loss(replace(record, count=3)), torch.cat([loss(record), torch.zeros(1).double()]))


@pytest.mark.parametrize(
    ("lists", "count", "said"),
    [
        ([0, 0, 2, 2], None, "from 0 without gaps, given 0, 2. Renumber them"),
        ([1, 1, 2, 2], None, "without gaps, given 1, 2"),
        ([-1, -1, 0, 0], None, "without gaps, given -1, 0"),
        ([0, 0, 1, 1], 1, r"from 0 to 0 \(count - 1\), given 0, 1"),
        ([-1, -1, 1, 1], 2, "given -1, 1"),
    ],
)
def test_numbers_of_lists_that_cannot_be_right_are_refused(lists, count, said):
    record = ListLogProbs(-torch.ones(4), torch.tensor(lists), torch.arange(4.0), -torch.ones(4), count=count)
    with pytest.raises(LossError, match=f"lists: expected numbers.*{said}"):
        get_loss("infonca")(record)


@pytest.mark.parametrize("name", ["plackett_luce_dpo", "rrhf"])
def test_only_the_order_of_the_scores_counts_so_ranks_will_do(name):
    record, loss = make_lists(), get_loss(name)
    ranks = record.scores.argsort().argsort()  # whole numbers
    torch.testing.assert_close(loss(replace(record, scores=ranks)), loss(record))


def test_a_tie_draws_equal_completions_together():
    pairs = make_record()
    record = as_lists(pairs, scores=(0.5, 0.5))
    margin = get_loss("dpo").margin(pairs)
    both_ways = -F.logsigmoid(margin) - F.logsigmoid(-margin)
    torch.testing.assert_close(get_loss("plackett_luce_dpo")(record), both_ways)
    even = -(pairs.chosen_logps + pairs.rejected_logps) / 2
    torch.testing.assert_close(get_loss("rrhf")(record), even)  # no order to keep, two best completions
    half = replace(pairs, preference_probability=torch.full((7,), 0.5).double())
    torch.testing.assert_close(get_loss("infonca", beta=0.1)(record), get_loss("dpo", soft_labels=True)(half))


@every_list_method
def test_a_single_completion_is_not_ranked_but_may_be_learnt(name):
    record = make_lists(sizes=(1, 1))
    x = 0.01 * (record.logps - record.ref_logps)
    held = -F.logsigmoid(x) - F.logsigmoid(-x)  # near the reference
    expected = {"nca_list": held, "rrhf": -record.logps}.get(name, torch.zeros(2).double())
    torch.testing.assert_close(get_loss(name)(record), expected)


@every_list_method
def test_a_step_down_the_gradient_raises_the_best_against_the_worst(name):
    record = make_lists()
    logps = record.logps.clone().requires_grad_()
    at_reference = replace(record, logps=logps, ref_logps=record.logps)
    (slope,) = torch.autograd.grad(get_loss(name)(at_reference).sum(), logps)
    for number in range(record.size):
        of_list = (record.lists == number).nonzero().flatten()
        order = of_list[record.scores[of_list].argsort()]
        assert slope[order[-1]] < slope[order[0]]
