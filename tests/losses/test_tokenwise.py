"""Token-level losses: which tokens count, by how much, and where the gradient stops."""

from dataclasses import replace

import pytest
import torch
from published.records import at_reference, examples, make_record, split, with_gradients
from published.tokenwise import sampled

from prefopt_losses import LogProbs, LossError, get_loss
from prefopt_losses.methods.tokenwise import DecayingWeights, PrefixWeights, SampledTokens

LONG, SHORT = torch.tensor([[12]]), torch.tensor([[5]])


def kept(draw, *, seed=0, own=LONG, other=SHORT, columns=12, dtype=torch.float32):
    return SampledTokens(seed)(torch.arange(columns, dtype=dtype)[None], own, other, draw)


def test_a_token_beyond_the_other_completions_length_weighs_alpha():
    positions = torch.arange(6.0)[None]
    weights = PrefixWeights(0.3)(positions, torch.tensor([[6], [4]]), torch.tensor([[2], [6]]), 0)
    expected = torch.tensor([[1, 1, 0.3, 0.3, 0.3, 0.3], [1, 1, 1, 1, 0.3, 0.3]])  # the last two: beyond its own end
    assert torch.equal(weights, expected)


def test_of_two_completions_of_one_length_ld_dpo_and_sampo_are_dpo():
    record = make_record()
    tokens = {f"{side}_token_logps": -torch.rand(7, 9).double() for side in ("chosen", "rejected")}
    sums = {name.replace("token_", ""): value.sum(-1) for name, value in tokens.items()}
    zero = {f"ref_{name}": torch.zeros_like(value) for name, value in (tokens | sums).items()}
    lengths = {"chosen_lengths": torch.full((7,), 9), "rejected_lengths": torch.full((7,), 9)}
    same = LogProbs(**tokens, **sums, **zero, **lengths)
    for name in ("ld_dpo", "sampo"):
        torch.testing.assert_close(get_loss(name)(same), get_loss("dpo")(same))
        assert not torch.allclose(get_loss(name)(record), get_loss("dpo")(record))


def test_weights_decay_from_the_first_token_on():
    assert DecayingWeights(0.5)(torch.arange(3.0)[None], LONG, SHORT, 0).tolist() == [[0.5, 0.25, 0.125]]


def test_counted_from_zero_the_decay_is_d2po_at_beta_over_gamma():
    record = make_record()
    from_one = get_loss("d2po", beta=0.1 / 0.9, gamma=0.9).margin(record)
    by_hand = [
        0.1 * sum(0.9**t * (a - b) for t, (a, b) in enumerate(zip(e.t_w, e.tr_w)))
        - 0.1 * sum(0.9**t * (a - b) for t, (a, b) in enumerate(zip(e.t_l, e.tr_l)))
        for e in examples(record)
    ]
    torch.testing.assert_close(from_one, torch.tensor(by_hand, dtype=torch.float64))


def test_of_the_longer_completion_as_many_tokens_are_kept_as_the_shorter_has():
    for draw in range(50):
        assert kept(draw).sum() == 5
        assert kept(draw, columns=40)[:, :12].tolist() == kept(draw).tolist()  # padding changes nothing
    assert kept(0, own=SHORT, other=LONG)[:, :5].all()


def test_every_token_and_every_pair_of_tokens_is_kept_equally_often():
    draws, tokens, share = 4000, 12, 5 / 12
    samples = torch.cat([kept(draw, dtype=torch.float64) for draw in range(draws)])
    counts, expected = samples.sum(0), draws * share
    chi_squared = ((counts - expected).square() / (expected * (1 - share))).sum() * (tokens - 1) / tokens
    assert chi_squared < 31.3  # the 99.9th percentile at 11 degrees of freedom
    together = (samples.T @ samples / draws)[*torch.triu_indices(tokens, tokens, 1)]
    assert (together - 5 / 12 * 4 / 11).abs().max() < 0.03  # 4.3 standard errors


def test_another_draw_and_another_seed_are_another_sample():
    samples = {tuple(kept(draw, seed=seed)[0].tolist()) for draw in range(20) for seed in range(20)}
    assert len(samples) > 250  # of 792 possible ones; 400 fair draws see 314 on average
    assert torch.equal(kept(3, seed=4), kept(3, seed=4))


def test_the_sample_is_that_of_an_independent_hash():
    for draw, seed in ((0, 0), (7, 0), (123456, 2**31), (2**33, 1)):
        assert kept(draw, seed=seed)[0].tolist() == sampled(seed, draw, 12, 5)


def test_sampo_draws_anew_with_every_draw_and_says_so():
    loss = get_loss("sampo")
    records = [make_record(), make_record()]
    assert loss.needs.draws
    assert not get_loss("d2po").needs.draws
    assert torch.equal(loss(records[0]), loss(records[1]))
    (later,) = split(records[0], [7], draw=1)
    assert not torch.allclose(loss(later), loss(records[0]))
    assert torch.equal(loss.margin(at_reference(later)), torch.zeros(7))


@pytest.mark.parametrize("seed", [0.5, -1, float("nan"), True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(LossError, match=r"sampo\.seed: expected a number >= 0 without fraction"):
        get_loss("sampo", seed=seed)


def test_wpo_weighs_pairs_by_what_the_policy_would_write_and_sends_no_gradient_there():
    record, wpo, dpo = make_record(), get_loss("wpo", beta=0.1), get_loss("dpo")
    weight = wpo(record) / dpo(record)
    assert 0 < weight.min() < weight.max() <= 1
    likely = torch.full((7,), 2.0).double()
    (certain,) = split(record, [7])
    certain = LogProbs(**vars(certain) | {"chosen_relative_logps": likely, "rejected_relative_logps": likely})
    assert torch.equal(wpo(certain), dpo(certain))  # clamped at 1
    relative = record.chosen_relative_logps.clone().requires_grad_()
    value = wpo(LogProbs(**vars(record) | {"chosen_relative_logps": relative}))
    assert not value.requires_grad


def slopes(name):
    _, record = with_gradients(make_record())
    reached = [record.chosen_sequential_kl, record.rejected_sequential_kl]
    return torch.autograd.grad(get_loss(name)(record).sum(), reached, materialize_grads=True)


def test_tdpo1_lowers_the_rejected_completions_kl_and_raises_the_chosen_ones():
    """The loss falls where KL_l falls and KL_w grows: rho - (KL_l - KL_w) is to grow."""
    chosen, rejected = slopes("tdpo1")
    assert (chosen < 0).all()
    assert torch.equal(rejected, -chosen)


def test_tdpo2_leaves_the_chosen_completions_kl_alone():
    chosen, rejected = slopes("tdpo2")
    assert not chosen.any()
    assert (rejected > 0).all()
    record = make_record()
    half = get_loss("tdpo2", alpha=1.0)
    torch.testing.assert_close(half(record), get_loss("tdpo1")(record))  # in value, not in gradient
    torch.testing.assert_close(get_loss("tdpo2", alpha=0.0)(record), get_loss("dpo")(record))


def test_the_gradient_of_tdpo2_is_the_finite_difference_with_the_chosen_kl_held():
    record, loss = make_record(), get_loss("tdpo2")
    names = ["chosen_logps", "rejected_logps", "rejected_sequential_kl"]

    def function(*tensors):
        return loss(LogProbs(**vars(record) | dict(zip(names, tensors))), check=False)

    assert torch.autograd.gradcheck(function, [getattr(record, name).clone().requires_grad_() for name in names])


@pytest.mark.parametrize("name", ["ld_dpo", "sampo", "d2po"])
def test_what_stands_beyond_a_completions_length_is_never_read(name):
    record, loss = make_record(), get_loss(name)
    filled = {}
    for side in ("chosen", "rejected"):
        tokens, lengths = getattr(record, f"{side}_token_logps"), getattr(record, f"{side}_lengths")
        beyond = torch.arange(tokens.shape[1]) >= lengths[:, None]
        assert beyond.any()
        filled[f"{side}_token_logps"] = tokens.masked_fill(beyond, -7.0).requires_grad_()
    value = loss(replace(record, **filled))
    torch.testing.assert_close(value, loss(record), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(value.sum(), filled["chosen_token_logps"])
    assert not slope[torch.arange(slope.shape[1]) >= record.chosen_lengths[:, None]].any()
