"""Losses whose examples look at each other, and the numbers they carry from step to step.

Expected values are worked out in floats, two optimizer steps by hand.
"""

import math
from dataclasses import replace

import pytest
import torch
from published.batchwise import alpha_dpo, beta_dpo
from published.records import examples, make_record, with_gradients

from prefopt_losses import METHODS, FromRecord, LogProbs, Loss, LossError, Score, Term, UnpairedLogProbs, get_loss
from prefopt_losses.methods.batchwise import NearestMargins
from prefopt_losses.terms import Running

COUPLED = {
    "kto": ("mismatched_kl",),
    "bco": ("mean_logratio",),
    "tpo": ("gold_nll_per_step_token",),
    "tpo_l": ("gold_nll_per_step_token",),
    "aot": ("sorted margins",),
    "aot_unpaired": ("sorted scores",),
    "beta_dpo": ("dynamic_beta", "nearest_margins"),
    "alpha_dpo": ("adaptive_margin",),
}
CARRIED = {
    "bco": ("bco_mean_logratio", "bco_count"),
    "beta_dpo": ("beta_dpo_margin",),
    "alpha_dpo": ("alpha_dpo_mean", "alpha_dpo_std"),
}
PAIRS_AT_LEAST = {"aot": 2, "aot_unpaired": 2, "beta_dpo": 2, "alpha_dpo": 2}

every_coupled = pytest.mark.parametrize("name", COUPLED)
every_carrying = pytest.mark.parametrize("name", CARRIED)


def pairs(chosen, rejected, dtype=torch.float64):
    """Pairs of these log-ratios: the reference gives every completion -20 nats on 10 tokens."""
    reference = torch.full((len(chosen),), -20.0, dtype=dtype)
    policy = (torch.tensor(side, dtype=dtype) - 20 for side in (chosen, rejected))
    lengths = torch.full((len(chosen),), 10)
    return LogProbs(*policy, reference, reference, lengths, lengths)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Declared


def test_exactly_these_methods_couple_the_examples_of_a_step():
    declared = {name: get_loss(name).needs.batch for name in METHODS}
    assert {name: batch for name, batch in declared.items() if batch} == COUPLED


def test_exactly_these_methods_carry_numbers_from_step_to_step():
    declared = {name: get_loss(name).needs.state for name in METHODS}
    assert {name: state for name, state in declared.items() if state} == CARRIED
    for name, state in CARRIED.items():
        assert tuple(get_loss(name).initial_state()) == state


def test_without_the_token_mean_of_the_gold_completion_tpo_decomposes():
    for name in ("tpo", "tpo_l"):
        assert get_loss(name, normalize="sequence").needs.batch == ()


@every_coupled
def test_a_batch_too_small_to_mean_anything_is_refused(name):
    loss, least = get_loss(name), PAIRS_AT_LEAST.get(name, 1)
    assert loss.needs.minimum_batch == least
    assert loss(make_record(batch=least)).isfinite().all()
    if least > 1:
        with pytest.raises(LossError, match=f"{name}: expected at least 2 examples, .* given 1. Use a larger batch"):
            loss(make_record(batch=1))


# What a training loop does: one loss of the whole step, its gradient fed back to each micro-batch


@every_coupled
def test_micro_batches_get_the_whole_steps_gradient_through_their_own_log_probs(name):
    """d loss / d weight of a toy policy, in one go and by micro-batches whose log-probs are computed again."""
    torch.manual_seed(0)
    loss, record = get_loss(name), make_record(batch=6)
    weight = torch.full((), 0.9, dtype=torch.float64, requires_grad=True)
    fields = ("chosen_logps", "rejected_logps", "gold_logps")

    def policy(rows):
        return {field: getattr(record, field)[rows] * weight for field in fields}

    (whole,) = torch.autograd.grad(loss(replace(record, **policy(slice(None)))).mean(), weight)
    detached = {field: tensor.detach().requires_grad_() for field, tensor in policy(slice(None)).items()}
    value = loss(replace(record, **detached)).mean()
    slopes = dict(zip(fields, torch.autograd.grad(value, list(detached.values()), materialize_grads=True)))
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        for field, logps in policy(rows).items():
            logps.backward(slopes[field][rows], retain_graph=True)
    torch.testing.assert_close(weight.grad, whole, rtol=1e-12, atol=1e-14)
    assert whole != 0


# State


@every_carrying
def test_only_advance_moves_the_state(name):
    loss, record = get_loss(name), make_record()
    state = loss.advance(record, loss.initial_state())
    kept = {key: number.clone() for key, number in state.items()}
    with_state = replace(record, state=state)
    first = loss(with_state)
    loss.margin(with_state)
    assert torch.equal(loss(with_state), first)
    again = loss.advance(record, state)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    assert any(not torch.equal(again[key], kept[key]) for key in kept)


@every_carrying
def test_without_a_state_the_numbers_are_those_of_this_batch_alone(name):
    loss, record = get_loss(name), make_record()
    state = loss.advance(record, loss.initial_state())
    assert torch.equal(loss(record), loss(replace(record, state=state)))


@every_carrying
def test_another_state_is_another_loss(name):
    loss, record = get_loss(name), make_record()
    once = loss.advance(record, loss.initial_state())
    twice = loss.advance(make_record(seed=2), once)
    assert not torch.allclose(loss(replace(record, state=once)), loss(replace(record, state=twice)))


@every_carrying
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_stays_fp64_on_the_cpu_whatever_the_model_computes_in(name, dtype):
    loss, record = get_loss(name), make_record(dtype)
    state = loss.advance(record, loss.initial_state())
    assert {(number.dtype, number.device.type, number.shape) for number in state.values()} == {
        (torch.float64, "cpu", torch.Size([]))
    }
    assert loss(replace(record, state=state)).dtype == torch.float32
    assert not any(number.requires_grad for number in loss.advance(with_gradients(record)[1], state).values())


def test_two_parts_may_share_a_number_but_not_its_name():
    shared = get_loss("bco") + get_loss("bco", beta=0.5)
    assert shared.needs.state == CARRIED["bco"]
    with pytest.raises(LossError, match="two parts carry a running beta_dpo_margin; use the method once"):
        get_loss("beta_dpo") + get_loss("beta_dpo", decay=0.5)


# BCO


def test_bco_takes_rewards_against_the_mean_of_all_rewards_ever_seen():
    loss = get_loss("bco", beta=0.1)
    first, second = pairs([3.0, 5.0], [1.0, -1.0]), pairs([8.0], [-2.0])
    state = loss.advance(first, loss.initial_state())
    assert state["bco_mean_logratio"] == pytest.approx((3 + 5 + 1 - 1) / 4)
    assert state["bco_count"] == 4
    state = loss.advance(second, state)
    delta = 0.1 * (3 + 5 + 1 - 1 + 8 - 2) / 6
    assert 0.1 * state["bco_mean_logratio"] == pytest.approx(delta)
    expected = -math.log(sigmoid(0.8 - delta)) - math.log(sigmoid(-(-0.2 - delta)))
    assert loss(replace(second, state=state)).item() == pytest.approx(expected)


def test_bco_counts_a_completion_of_unpaired_feedback_once():
    loss = get_loss("bco", beta=0.1)
    reference = torch.full((3,), -20.0, dtype=torch.float64)
    logps = torch.tensor([-14.0, -19.0, -22.0], dtype=torch.float64)
    record = UnpairedLogProbs(logps, torch.tensor([True, False, False]), reference)
    state = loss.advance(record, loss.initial_state())
    assert state["bco_count"] == 3
    assert state["bco_mean_logratio"] == pytest.approx((6 + 1 - 2) / 3)
    delta = 0.1 * 5 / 3
    expected = [-math.log(sigmoid(0.6 - delta)), -math.log(sigmoid(delta - 0.1)), -math.log(sigmoid(delta + 0.2))]
    assert loss.unpaired(record).tolist() == pytest.approx(expected)
    assert loss.unpaired(replace(record, state=state)).tolist() == pytest.approx(expected)


def test_bco_without_a_mean_to_subtract_is_bco_pair():
    record = make_record()
    zero = dict.fromkeys(get_loss("bco").initial_state(), torch.zeros((), dtype=torch.float64))
    assert torch.equal(get_loss("bco")(replace(record, state=zero)), get_loss("bco_pair", beta=0.01)(record))


# beta-DPO


def test_beta_dpo_scales_beta_by_how_far_the_margin_is_ahead_of_its_average():
    loss = get_loss("beta_dpo", beta=0.1, alpha=0.5, filtered=0.0)
    first, second = pairs([2.0, 4.0], [0.0, 0.0]), pairs([6.0, 4.0], [1.0, 0.0])
    state = loss.advance(first, loss.initial_state())
    assert state["beta_dpo_margin"] == pytest.approx(0.1 * 3)
    state = loss.advance(second, state)
    average = 0.9 * 0.3 + 0.1 * 4.5
    assert state["beta_dpo_margin"] == pytest.approx(average)
    beta = 0.1 * (1 + 0.5 * (4.5 - average))
    expected = [-math.log(sigmoid(beta * 5)), -math.log(sigmoid(beta * 4))]
    assert loss(replace(second, state=state)).tolist() == pytest.approx(expected)
    assert loss.margin(replace(second, state=state)).tolist() == pytest.approx([5 * beta, 4 * beta])


def test_beta_dpo_leaves_out_the_pairs_farthest_from_the_average():
    loss = get_loss("beta_dpo", beta=0.1, alpha=0.0, filtered=0.4)
    record = pairs([1.0, 9.0, 2.0, -8.0, 3.0], [0.0] * 5)
    state = {"beta_dpo_margin": torch.tensor(2.0, dtype=torch.float64)}
    value = loss(replace(record, state=state))
    kept = [5 / 3 * -math.log(sigmoid(0.1 * rho)) for rho in (1, 2, 3)]
    assert value.tolist() == pytest.approx([kept[0], 0.0, kept[1], 0.0, kept[2]])
    assert value.mean().item() == pytest.approx(sum(-math.log(sigmoid(0.1 * rho)) for rho in (1, 2, 3)) / 3)


def test_beta_dpo_keeps_beta_positive():
    loss = get_loss("beta_dpo", beta=0.1, alpha=5.0, filtered=0.0)
    record = pairs([-9.0, -9.0], [0.0, 0.0])
    state = {"beta_dpo_margin": torch.tensor(4.0, dtype=torch.float64)}
    assert loss.margin(replace(record, state=state)).tolist() == pytest.approx([-0.009, -0.009])


def test_no_gradient_flows_through_beta_dpos_beta():
    """The slope is that of DPO at the batch's beta, held fixed."""
    loss = get_loss("beta_dpo", filtered=0.0)
    record = make_record()
    state = loss.advance(record, loss.initial_state())
    rho = (record.chosen_logps - record.ref_chosen_logps) - (record.rejected_logps - record.ref_rejected_logps)
    beta = float(0.1 * (1 + 0.6 * (rho.mean() - state["beta_dpo_margin"])))
    leaves, with_leaves = with_gradients(record)
    ours, theirs = (
        torch.autograd.grad(each(with_leaves).sum(), leaves[:2]) for each in (loss, get_loss("dpo", beta=beta))
    )
    torch.testing.assert_close(ours, theirs)


# alpha-DPO


def test_alpha_dpo_standardises_by_averages_of_mean_and_deviation():
    loss = get_loss("alpha_dpo", beta=2.0, gamma_beta_ratio=0.3, alpha=0.1)
    first, second = pairs([2.0, 4.0], [0.0, 0.0]), pairs([6.0, 3.0], [1.0, 0.0])  # 0.2, 0.4; 0.5, 0.3 per token
    state = loss.advance(first, loss.initial_state())
    deviation = math.sqrt(2 * 0.1**2)  # of 0.2 and 0.4, one degree of freedom; of 0.5 and 0.3 too
    assert state["alpha_dpo_mean"] == pytest.approx(0.1 * 0.3)
    assert state["alpha_dpo_std"] == pytest.approx(0.1 * deviation)
    state = loss.advance(second, state)
    mean, std = 0.9 * 0.03 + 0.1 * 0.4, 0.9 * 0.1 * deviation + 0.1 * deviation
    assert state["alpha_dpo_mean"] == pytest.approx(mean)
    assert state["alpha_dpo_std"] == pytest.approx(std)
    expected = [-math.log(sigmoid(2 * (rho - 0.3 - 0.1 * (rho - mean) / std))) for rho in (0.5, 0.3)]
    assert loss(replace(second, state=state)).tolist() == pytest.approx(expected)


def test_alpha_dpo_without_alpha_is_simpo():
    record = make_record()
    ours = get_loss("alpha_dpo", alpha=0.0, beta=2.0, gamma_beta_ratio=0.25)(record)
    torch.testing.assert_close(ours, get_loss("simpo")(record))


def test_no_gradient_flows_through_alpha_dpos_target():
    """The slope with respect to l_w is -beta / |y_w| times the probability of losing."""
    loss, record = get_loss("alpha_dpo", beta=2.0), make_record()
    leaves, with_leaves = with_gradients(record)
    value = loss(with_leaves)
    slope = torch.autograd.grad(value.sum(), leaves[0])[0]
    losing = 1 - torch.exp(-value.detach())
    torch.testing.assert_close(slope, -2.0 * losing / record.chosen_lengths)


@pytest.mark.parametrize(("name", "formula"), [("beta_dpo", beta_dpo), ("alpha_dpo", alpha_dpo)])
def test_the_published_formula_holds_for_a_batch_of_any_size(name, formula):
    loss = get_loss(name)
    for size in (2, 3, 10, 33):
        record = make_record(batch=size, seed=size)
        expected = [formula(e, **loss.hyperparameters) for e in examples(record)]
        torch.testing.assert_close(loss(record), torch.tensor(expected, dtype=torch.float64))


# KTO


def unpaired(mismatched):
    """A desirable completion 6 nats above the reference, an undesirable 2 above and one 1 below."""
    reference = torch.full((3,), -20.0, dtype=torch.float64)
    logps = torch.tensor([-14.0, -18.0, -21.0], dtype=torch.float64)
    off = torch.tensor(mismatched, dtype=torch.float64) - 20
    desirable = torch.tensor([True, False, False])
    return UnpairedLogProbs(logps, desirable, reference, mismatched_logps=off, ref_mismatched_logps=reference)


def test_kto_of_unpaired_feedback_takes_gains_and_losses_from_the_mismatched_mean():
    loss = get_loss("kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    z = (3 + 1 - 1) / 3
    expected = [
        1.5 * (1 - sigmoid(0.2 * (6 - z))),
        0.5 * (1 - sigmoid(0.2 * (z - 2))),
        0.5 * (1 - sigmoid(0.2 * (z + 1))),
    ]
    assert loss.unpaired(unpaired([3.0, 1.0, -1.0])).tolist() == pytest.approx(expected)


def test_kto_of_a_pair_is_the_sum_of_its_two_completions():
    record, loss = make_record(), get_loss("kto")
    total = torch.zeros(7, dtype=torch.float64)
    for side in ("chosen", "rejected"):
        desirable = torch.full((7,), side == "chosen")
        columns = getattr(record, f"{side}_logps"), desirable, getattr(record, f"ref_{side}_logps")
        off = {key: getattr(record, key) for key in ("mismatched_logps", "ref_mismatched_logps")}
        total += loss.unpaired(UnpairedLogProbs(*columns, **off))
    torch.testing.assert_close(loss(record), total)


def test_ktos_anchor_is_never_negative():
    loss = get_loss("kto")
    below = loss.unpaired(unpaired([-3.0, -1.0, -5.0]))
    assert torch.equal(below, loss.unpaired(unpaired([0.0, 0.0, 0.0])))
    assert torch.equal(below, get_loss("apo_zero").unpaired(unpaired([0.0, 0.0, 0.0])))


def test_no_gradient_flows_through_the_mismatched_completions():
    record = unpaired([3.0, 1.0, -1.0])
    off, logps = (tensor.clone().requires_grad_() for tensor in (record.mismatched_logps, record.logps))
    value = get_loss("kto").unpaired(replace(record, mismatched_logps=off, logps=logps)).sum()
    through_off, through_logps = torch.autograd.grad(value, (off, logps), materialize_grads=True)
    assert not through_off.any()
    assert through_logps.all()


def test_kto_without_mismatched_completions_says_what_they_are():
    record = replace(unpaired([0.0, 0.0, 0.0]), mismatched_logps=None)
    with pytest.raises(LossError, match=r"mismatched_logps: kto needs it .* completions of other prompts"):
        get_loss("kto").unpaired(record)


# Targets from the data


def test_regression_on_scores_takes_each_completions_own_score():
    reference = torch.full((2,), -20.0, dtype=torch.float64)
    logps = torch.tensor([-14.0, -21.0], dtype=torch.float64)
    scores, values = (torch.tensor(each, dtype=torch.float64) for each in ([0.9, 0.2], [0.5, 0.4]))
    record = UnpairedLogProbs(logps, torch.tensor([True, False]), reference, scores=scores, values=values)
    expected = [(0.4 - 0.1 * 6) ** 2, (-0.2 + 0.1 * 1) ** 2]
    assert get_loss("a_star_po", beta=0.1).unpaired(record).tolist() == pytest.approx(expected)
    assert get_loss("dro", beta=0.1).unpaired(record).tolist() == pytest.approx([each / 2 for each in expected])


def test_the_scores_of_an_ensemble_are_averaged():
    record = make_record()
    spread = torch.tensor([-0.3, 0.0, 0.3], dtype=torch.float64)
    several = {key: getattr(record, key)[:, None] + spread for key in ("chosen_scores", "rejected_scores")}
    torch.testing.assert_close(get_loss("dro")(replace(record, **several)), get_loss("dro")(record))


def test_sppo_of_sure_wins_is_sppo_hard():
    record = replace(make_record(), preference_probability=torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(get_loss("sppo")(record), get_loss("sppo_hard")(record))


def test_every_carried_number_moves_from_what_stood_before_the_step():
    """Whatever the order in which a loss names its numbers, none sees another's new value."""
    first = Running("first", 1.0, (), lambda so_far, record: so_far + 10)
    second = Running("second", 0.0, (), lambda so_far, record: so_far + record.state["first"])
    weight = FromRecord("both", (), lambda record: record.state["second"], running=(first, second))
    loss = Loss("mine", (Term(torch.nn.functional.softplus, Score(), weight=weight),))
    assert loss.advance(make_record(), loss.initial_state()) == {"first": 11, "second": 1}


@every_carrying
def test_no_gradient_flows_into_the_carried_numbers(name):
    loss = get_loss(name)
    state = {key: (value + 1).requires_grad_() for key, value in loss.initial_state().items()}
    policy, record = with_gradients(make_record())
    loss(replace(record, state=state)).sum().backward()
    assert policy[0].grad is not None
    assert all(value.grad is None for value in state.values())


# At the reference


@pytest.mark.parametrize("name", ["alpha_dpo", "beta_dpo"])
def test_rounding_at_the_reference_decides_nothing(name):
    """Sums from a cache were added up elsewhere: the last bits of some differ."""
    loss = get_loss(name)
    exact = pairs([0.0] * 8, [0.0] * 8, dtype=torch.float32)
    off = torch.tensor([1, -1, 0, 2, -2, 1, 0, -1]) * 2 * 20 * torch.finfo(torch.float32).eps
    rounded = replace(exact, chosen_logps=exact.chosen_logps + off)
    assert not torch.equal(rounded.chosen_logps, exact.chosen_logps)
    torch.testing.assert_close(loss(rounded), loss(exact), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("filtered", "pairs_in", "kept"), [(0.2, 10, 8), (0.9, 20, 2), (0.9, 10, 1), (0.5, 7, 3)])
def test_as_many_pairs_are_left_out_as_the_share_says(filtered, pairs_in, kept):
    record = pairs([float(n) for n in range(pairs_in)], [0.0] * pairs_in)
    weights = NearestMargins(filtered)(replace(record, state={"beta_dpo_margin": torch.tensor(0.0)}))
    assert int((weights > 0).sum()) == kept
