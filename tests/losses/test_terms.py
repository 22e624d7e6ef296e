"""The algebra: a term is what its formula says, a loss is the sum of its terms, and sums add up exactly."""

import dataclasses
import json

import pytest
import torch
from published.records import make_lists, make_record

from prefopt_losses import (
    METHODS,
    PAIR,
    REJECTED,
    FromRecord,
    LogProbs,
    Loss,
    LossError,
    Score,
    Term,
    UnpairedLogProbs,
    get_loss,
    loss_from_config,
)
from prefopt_losses.convex import exponential, linear, logistic

UNPAIRED = ("bco_pair", "nca_pair", "sppo_hard", "apo_zero", "sft", "kto", "bco", "sppo", "dro", "a_star_po")


@pytest.fixture
def record():
    return make_record(batch=6)


def test_a_term_is_its_formula(record):
    term = Term(logistic, Score(), contrast=(1.0, -0.7), beta=0.3, shift=2.0, q=0.8, coefficient=1.5, weight=0.4)
    u_w = record.chosen_logps - record.ref_chosen_logps
    u_l = record.rejected_logps - record.ref_rejected_logps
    x = 0.3 * (u_w - 0.7 * u_l - 2.0)
    expected = 1.5 * 0.4 * (0.8 * torch.log(1 + torch.exp(-x)) + 0.2 * torch.log(1 + torch.exp(x)))
    torch.testing.assert_close(term(record), expected, rtol=1e-12, atol=0)


def test_coordinates_that_examples_bring_are_read_from_the_record(record):
    target = FromRecord("target", reads=("chosen_lengths",), value=lambda r: r.chosen_lengths.double())
    term = Term(linear, Score(), REJECTED, shift=target)
    expected = record.rejected_logps - record.ref_rejected_logps + record.chosen_lengths
    torch.testing.assert_close(term(record), expected, rtol=1e-12, atol=0)
    assert term.reads == {"rejected_logps", "ref_rejected_logps", "chosen_lengths"}
    assert term.coordinates()["shift"] == "target"


def test_no_gradient_flows_through_a_weight(record):
    chosen = record.chosen_logps.clone().requires_grad_()
    weight = FromRecord("weight", reads=("chosen_logps",), value=lambda r: r.chosen_logps.square())
    value = Term(linear, Score(), weight=weight)(dataclasses.replace(record, chosen_logps=chosen))
    (slope,) = torch.autograd.grad(value.sum(), chosen)
    torch.testing.assert_close(slope, -chosen.detach().square())


def test_a_hard_label_never_touches_the_other_side(record):
    far = dataclasses.replace(record, chosen_logps=record.chosen_logps + 1e4)  # e^-(-x) overflows
    assert Term(exponential, Score())(far).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_is_the_sum_of_its_terms(name, record):
    loss = get_loss(name)
    record = make_lists() if loss.needs.lists else record
    if loss.needs.state:
        record = dataclasses.replace(record, state=loss.advance(record, loss.initial_state()))
    total = sum(term(record) for term in loss.terms)
    torch.testing.assert_close(loss(record), total, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_coordinates_are_plain_data(name):
    for term in get_loss(name).terms:
        plain = json.loads(json.dumps(term.coordinates()))
        assert plain["reduce" if get_loss(name).needs.lists else "f"]


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", ["sft", "dpo", "ipo", "bco_pair"])
def test_a_mixture_is_the_sum_of_its_parts_to_the_last_bit(first, second, record):
    a, b = get_loss(first), get_loss(second)
    if a.needs.lists:
        with pytest.raises(LossError, match="a loss of lists and a loss of pairs cannot be added"):
            a + 0.3 * b
        return
    assert torch.equal((a + 0.3 * b)(record), a(record) + 0.3 * b(record))


def test_mixing_leaves_every_part_as_it_was(record):
    """A mean-normalised part must not divide the log-probs of a summed one."""
    ipo, dpo = get_loss("ipo"), get_loss("dpo")
    torch.testing.assert_close((dpo + ipo)(record) - ipo(record), dpo(record), rtol=1e-9, atol=1e-9)


def test_sums_of_sums_are_flat_and_named():
    loss = 0.5 * (get_loss("dpo", beta=0.2) + get_loss("sft")) + get_loss("dpo")
    assert loss.name == "0.5*dpo+0.5*sft+dpo"
    assert loss.hyperparameters == {
        "dpo": {"weight": 0.5, "beta": 0.2, "soft_labels": False},
        "sft": {"weight": 0.5, "normalize": "token"},
        "dpo#2": {"weight": 1.0, "beta": 0.1, "soft_labels": False},
    }
    assert [term.coefficient for term in loss.terms] == [0.5, 0.5, 1.0]


def test_a_weight_of_zero_is_a_weight(record):
    loss = get_loss("dpo") + 0.0 * get_loss("sft")
    assert torch.equal(loss(record), get_loss("dpo")(record))
    assert loss.hyperparameters["sft"]["weight"] == 0.0


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_cannot_be_right_is_refused(weight):
    with pytest.raises(LossError, match="weight of dpo"):
        weight * get_loss("dpo")


@pytest.mark.parametrize(
    "loss",
    [get_loss("simpo", beta=2.5), get_loss("dpo+0.5*sft"), 2 * get_loss("ipo", normalize="sum")],
    ids=lambda loss: loss.name,
)
def test_config_builds_the_loss_again(loss):
    assert loss_from_config(json.loads(json.dumps(loss.config))) == loss


def test_the_margin_is_the_one_the_loss_ranks_by(record):
    """IPO ranks by per-token means; the sum would order these pairs otherwise."""
    u_w = (record.chosen_logps - record.ref_chosen_logps) / record.chosen_lengths
    u_l = (record.rejected_logps - record.ref_rejected_logps) / record.rejected_lengths
    torch.testing.assert_close(get_loss("ipo", beta=0.1).margin(record), 0.2 * (u_w - u_l))
    chosen, rejected = get_loss("ipo", beta=0.1).rewards(record)
    assert torch.equal(chosen - rejected, get_loss("ipo", beta=0.1).margin(record))


def test_the_margin_comes_before_the_shift(record):
    low, high = get_loss("simpo", gamma_beta_ratio=0.0), get_loss("simpo", gamma_beta_ratio=3.0)
    assert torch.equal(low.margin(record), high.margin(record))


def test_the_margin_of_a_mixture_is_that_of_its_pair_term(record):
    dpo = get_loss("dpo", beta=0.3)
    assert torch.equal((get_loss("sft") + dpo).margin(record), dpo.margin(record))


def test_the_margin_of_sft_is_the_difference_of_mean_likelihoods(record):
    means = record.chosen_logps / record.chosen_lengths, record.rejected_logps / record.rejected_lengths
    torch.testing.assert_close(get_loss("sft").margin(record), means[0] - means[1])


def test_the_margin_asks_for_what_the_loss_itself_does_not_need(record):
    alone = LogProbs(chosen_logps=record.chosen_logps, chosen_lengths=record.chosen_lengths)
    with pytest.raises(LossError, match="the margin of sft needs it"):
        get_loss("sft").margin(alone)


def test_needs_are_what_the_method_reads():
    assert get_loss("dpo").needs.reference
    assert not get_loss("dpo").needs.lengths
    assert get_loss("ipo").needs.lengths
    assert not get_loss("ipo", normalize="sum").needs.lengths
    assert not get_loss("simpo").needs.reference
    assert not get_loss("sft").needs.rejected
    assert get_loss("dpo", soft_labels=True).needs.preference_probability
    assert get_loss("dpo+sft").needs.lengths
    needs = {name: get_loss(name).needs for name in METHODS}
    assert {name for name, each in needs.items() if not each.pairs and not each.lists} == set(UNPAIRED)
    assert {name for name in METHODS if get_loss(name).needs.step_tokens} == {"sft", "cpo", "orpo"}


@pytest.mark.parametrize("name", ["bco_pair", "sppo_hard", "apo_zero", "nca_pair", "bco_pair+apo_zero"])
def test_unpaired_feedback_gives_the_halves_of_the_paired_loss(name, record):
    loss = get_loss(name)
    logps = torch.cat([record.chosen_logps, record.rejected_logps])
    ref_logps = torch.cat([record.ref_chosen_logps, record.ref_rejected_logps])
    values = loss.unpaired(UnpairedLogProbs(logps, torch.arange(12) < 6, ref_logps))
    torch.testing.assert_close(values[:6] + values[6:], loss(record))


def test_unpaired_sft_is_the_token_mean_over_desirable_completions(record):
    desirable = torch.tensor([True, False, True, True, False, False])
    logps = record.chosen_logps.clone().requires_grad_()
    loss = get_loss("sft").unpaired(UnpairedLogProbs(logps, desirable, lengths=record.chosen_lengths)).mean()
    expected = -logps[desirable].sum() / record.chosen_lengths[desirable].sum()
    torch.testing.assert_close(loss, expected)


def test_a_batch_without_desirable_completions_has_finite_gradients(record):
    logps = record.chosen_logps.clone().requires_grad_()
    nothing = torch.zeros(6, dtype=torch.bool)
    get_loss("sft").unpaired(UnpairedLogProbs(logps, nothing, lengths=record.chosen_lengths)).mean().backward()
    assert torch.equal(logps.grad, torch.zeros_like(logps))


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(UNPAIRED)))
def test_losses_that_contrast_two_completions_refuse_unpaired_feedback(name, record):
    with pytest.raises(LossError, match=f"{name}: contrasts chosen with rejected"):
        get_loss(name).unpaired(UnpairedLogProbs(record.chosen_logps, record.chosen_logps > -30))


def test_unpaired_feedback_has_no_soft_labels(record):
    with pytest.raises(LossError, match=r"sppo: reads preference_probability.*sppo_hard"):
        get_loss("sppo").unpaired(UnpairedLogProbs(record.chosen_logps, record.chosen_logps > -30, record.chosen_logps))


def test_a_loss_of_ones_own_has_the_same_contract(record):
    loss = Loss("mine", (Term(torch.nn.functional.softplus, Score(), PAIR, beta=-0.2),))
    torch.testing.assert_close(loss(record), get_loss("dpo", beta=0.2)(record))
    assert (loss + get_loss("sft")).needs.tensors[-1] == "chosen_lengths"


def test_conventions_say_what_the_numbers_mean():
    ipo = get_loss("ipo", beta=0.1).conventions
    assert ipo["aggregate"] == "mean over completion tokens"
    assert ipo["beta"] == "0.1 (f sees 0.2) per nat per token"
    assert "GPO beta = 2 tau" in ipo["note"]
    assert get_loss("simpo").conventions["shift"] == "0.25 in the unit of the score"
    assert get_loss("orpo").conventions["aggregate"] == "log_odds of the mean over completion tokens"
    assert get_loss("cdpo").conventions["label"] == "q = 0.9"
    assert "sft: nll" in get_loss("dpo+sft").conventions
