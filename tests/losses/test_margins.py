"""Losses whose margin each pair brings itself: ensembles of scores, refusals, and what they turn into at the edges."""

from dataclasses import replace

import pytest
import torch
from published.margins import bernoulli_kl
from published.records import make_record, with_gradients

from prefopt_losses import METHODS, LogProbs, LossError, get_loss

RECORD = make_record()
ENSEMBLE = replace(
    RECORD,
    chosen_scores=torch.stack([RECORD.chosen_scores, RECORD.chosen_scores + 2, RECORD.chosen_scores - 0.1], 1),
    rejected_scores=torch.stack([RECORD.rejected_scores] * 3, 1),
)
WITH_SCORES = ("odpo", "modpo", "reward_distillation", "pessimistic_distillation", "rpo_bwd_kl", "rpo_fwd_kl")


def difference(record):
    return record.chosen_logps - record.ref_chosen_logps - record.rejected_logps + record.ref_rejected_logps


@pytest.mark.parametrize("name", [name for name in WITH_SCORES if name != "pessimistic_distillation"])
def test_of_an_ensemble_the_mean_score_counts(name):
    mean = replace(RECORD, chosen_scores=ENSEMBLE.chosen_scores.mean(1))
    torch.testing.assert_close(get_loss(name)(ENSEMBLE), get_loss(name)(mean))


def test_pessimistic_distillation_aims_at_the_nearest_model_of_the_ensemble():
    loss = get_loss("pessimistic_distillation", beta=0.3, eta=0.7, gamma=0.0)
    gaps = ENSEMBLE.chosen_scores - ENSEMBLE.rejected_scores
    errors = (0.3 * difference(ENSEMBLE)[:, None] - 0.7 * gaps) ** 2
    assert len(set(errors.argmin(1).tolist())) > 1
    torch.testing.assert_close(loss(ENSEMBLE), errors.min(1).values)


def test_the_gradient_of_the_least_error_is_that_of_the_model_that_has_it():
    loss = get_loss("pessimistic_distillation", beta=0.3, gamma=0.01)
    policy, record = with_gradients(ENSEMBLE)
    (ours,) = torch.autograd.grad(loss(record).sum(), policy[0])
    gaps = ENSEMBLE.chosen_scores - ENSEMBLE.rejected_scores
    errors = 0.3 * difference(ENSEMBLE)[:, None] - gaps
    nearest = errors.gather(1, errors.abs().argmin(1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(ours, 2 * 0.3 * nearest - 0.01 / 2)


def test_forgetting_what_the_reference_knows_costs_gamma_per_nat():
    loss, bare = (get_loss("pessimistic_distillation", gamma=gamma) for gamma in (0.5, 0.0))
    forgetful = replace(RECORD, chosen_logps=RECORD.chosen_logps - 3, rejected_logps=RECORD.rejected_logps - 3)
    torch.testing.assert_close(loss(forgetful) - bare(forgetful), loss(RECORD) - bare(RECORD) + 0.5 * 3)


def test_scores_of_different_shapes_are_refused():
    with pytest.raises(LossError, match=r"expected equal shapes, given \(7, 3\) and \(7,\)"):
        get_loss("modpo")(replace(ENSEMBLE, rejected_scores=RECORD.rejected_scores))


@pytest.mark.parametrize("name", WITH_SCORES)
def test_missing_scores_are_named(name):
    with pytest.raises(LossError, match=rf"chosen_scores: {name} needs it and it is missing"):
        get_loss(name)(replace(RECORD, chosen_scores=None))


def test_odpo_names_the_pairs_that_score_the_wrong_way_round():
    scores = RECORD.rejected_scores + torch.tensor([1.0, 1, -0.5, 1, 1, -2, 1])
    with pytest.raises(LossError, match=r"by row: 2 \(-0.5\), 5 \(-2\). Swap the completions"):
        get_loss("odpo")(replace(RECORD, chosen_scores=scores))


def test_a_pair_of_equal_scores_pulls_nothing_in_odpo():
    policy, record = with_gradients(replace(RECORD, chosen_scores=RECORD.rejected_scores))
    value = get_loss("odpo")(record)
    slopes = torch.autograd.grad(value.sum(), policy[:2])
    assert torch.equal(value, torch.zeros_like(value))
    assert all(torch.equal(slope, torch.zeros_like(slope)) for slope in slopes)


def test_scores_move_every_margin_the_way_they_should():
    """A larger gap of scores asks for a larger margin, so it pulls harder; a longer winner asks for less."""

    def gradient(name, record=RECORD, **options):
        policy, record = with_gradients(record)
        return torch.autograd.grad(get_loss(name, **options)(record).sum(), policy[0])[0]

    better = replace(RECORD, chosen_scores=RECORD.chosen_scores + 1)
    for name in ("odpo", "modpo", "reward_distillation", "rpo_bwd_kl"):
        assert bool((gradient(name, better) < gradient(name)).all())
    longer = replace(RECORD, chosen_lengths=RECORD.chosen_lengths + 9)
    assert bool((gradient("r_dpo", longer).abs() < gradient("r_dpo").abs()).all())


def test_the_penalty_of_dpop_is_trained_through():
    """A chosen completion that has lost to the reference is pulled up 1 + lambda times as hard as in dpo."""
    lost = replace(RECORD, chosen_logps=RECORD.ref_chosen_logps - 0.01, rejected_logps=RECORD.ref_rejected_logps)
    policy, record = with_gradients(lost)
    (slope,) = torch.autograd.grad(get_loss("dpop", beta=0.3, lambda_coef=50.0)(record).sum(), policy[0])
    x = torch.tensor(0.3 * -0.01 * 51, dtype=torch.float64)
    torch.testing.assert_close(slope, (-0.3 * 51 * torch.sigmoid(-x)).expand(7))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dpop", {"lambda_coef": 0.0}, "dpo"),
        ("r_dpo", {"alpha": 0.0}, "dpo"),
        ("irpo", {"alpha": 0.0}, "dpo"),
        ("mpo", {"preference_weight": 1.0, "quality_weight": 0.0, "generation_weight": 0.0}, "dpo"),
    ],
)
def test_without_its_addition_it_is_dpo(name, options, expected):
    torch.testing.assert_close(get_loss(name, beta=0.1, **options)(RECORD), get_loss(expected)(RECORD))


def test_one_gap_for_all_pairs_makes_the_forward_kl_exo():
    eps = 0.001
    gap = torch.full((7,), (1 - eps) / eps, dtype=torch.float64).log()
    record = replace(RECORD, chosen_scores=gap, rejected_scores=torch.zeros_like(gap))
    torch.testing.assert_close(get_loss("rpo_fwd_kl", beta=0.1)(record), get_loss("exo", beta=0.1)(record))


def test_both_kl_losses_are_zero_exactly_where_the_policy_agrees_with_the_scores():
    gap = RECORD.chosen_scores - RECORD.rejected_scores
    agreeing = replace(RECORD, chosen_logps=RECORD.chosen_logps - difference(RECORD) + gap / 0.2)
    for name in ("rpo_bwd_kl", "rpo_fwd_kl"):
        torch.testing.assert_close(get_loss(name)(agreeing), torch.zeros(7).double(), atol=1e-12, rtol=0)
        assert bool((get_loss(name)(RECORD) > 1e-6).all())
    assert bernoulli_kl(0.3, 0.3) == 0.0


def test_the_backward_kl_is_soft_label_dpo_up_to_a_constant_of_the_policy():
    probability = torch.sigmoid(RECORD.chosen_scores - RECORD.rejected_scores)
    soft = replace(RECORD, preference_probability=probability)
    entropy = -probability * probability.log() - (1 - probability) * (1 - probability).log()
    expected = get_loss("dpo", beta=0.2, soft_labels=True)(soft) - entropy
    torch.testing.assert_close(get_loss("rpo_bwd_kl", beta=0.2)(soft), expected)


def test_losses_of_equal_hyper_parameters_are_equal():
    for name in (*WITH_SCORES, "r_dpo", "dpop", "exo", "discopop", "bpo", "f_dpo_alpha", "chi_po"):
        assert get_loss(name) == get_loss(name)
        assert get_loss(name) != get_loss(name, beta=0.77)


def test_sixteen_bit_scores_are_widened_before_they_are_subtracted():
    scores = torch.tensor([512.0]).bfloat16(), torch.tensor([3.0]).bfloat16()
    zero = torch.zeros(1)
    record = LogProbs(zero, zero, zero, zero, chosen_scores=scores[0], rejected_scores=scores[1])
    assert get_loss("reward_distillation")(record).item() == 509.0**2  # bf16 has no 509


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("name", [name for name in METHODS if get_loss(name).needs.scores])
def test_scores_may_be_whole_numbers(name, dtype):
    loss = get_loss(name)
    record = replace(
        make_record(torch.float32, batch=3),
        chosen_scores=torch.tensor([[5.0, 4.0], [3.0, 2.0], [2.0, 5.0]]),
        rejected_scores=torch.tensor([[1.0, 2.0], [2.0, 2.0], [3.0, 1.0]]),
        values=torch.tensor([3.0, 4.0, 1.0]),
    )
    whole = {name: getattr(record, name).to(dtype) for name in ("chosen_scores", "rejected_scores", "values")}
    assert torch.equal(loss(replace(record, **whole)), loss(record))


@pytest.mark.parametrize(("name", "field"), [("odpo", "chosen_scores"), ("d2po", "rejected_token_logps")])
def test_one_broken_number_of_a_row_is_enough_to_refuse_it(name, field):
    broken = getattr(ENSEMBLE, field).clone()
    broken[4, 1] = torch.nan
    with pytest.raises(LossError, match=rf"{field}: expected finite.*by row: 4 \(nan\)"):
        get_loss(name)(replace(ENSEMBLE, **{field: broken}))
