"""The links of f-divergences: derivatives of their generators, kin to one another, finite far out."""

import math

import pytest
import torch
from published.records import make_record

from prefopt_losses import LossError, get_loss
from prefopt_losses.score import AlphaDivergence, chi_squared, forward_kl, jensen_shannon

# f(t) of the divergence E_ref[f(pi / pi_ref)], and the link, which is f'(e^u).
GENERATORS = {
    "forward_kl": (lambda t: t - t.log(), forward_kl),
    "jensen_shannon": (lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log() + t, jensen_shannon),
    "chi_squared": (lambda t: t.square() / 2 - t + t * t.log(), chi_squared),
    "alpha": (lambda t: t / 0.3 - t**0.7 / (0.3 * 0.7), AlphaDivergence(0.3)),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_link_is_the_derivative_of_its_generator(name):
    f, link = GENERATORS[name]
    u = torch.linspace(-3, 3, 13, dtype=torch.float64)
    t = u.exp().requires_grad_()
    (slope,) = torch.autograd.grad(f(t).sum(), t)
    constant = slope - link(u)
    torch.testing.assert_close(constant, constant[:1].expand(13))


def test_the_alpha_divergence_lies_between_reverse_and_forward_kl():
    u = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(AlphaDivergence(1e-7)(u), u, atol=1e-6, rtol=0)
    torch.testing.assert_close(AlphaDivergence(1 - 1e-9)(u), forward_kl(u))


@pytest.mark.parametrize(
    ("name", "nats"), [("forward_kl", 1), ("jensen_shannon", 2), ("chi_squared", 0.5), ("alpha", 1)]
)
def test_near_the_reference_a_unit_of_the_link_is_so_many_nats(name, nats):
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(GENERATORS[name][1](u).sum(), u)
    assert slope.item() == pytest.approx(1 / nats)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("nats", [-1e4, -81.0, 81.0, 1e4])
def test_a_link_is_finite_with_a_finite_gradient_however_far(name, nats):
    u = torch.tensor([nats], requires_grad=True)
    value = GENERATORS[name][1](u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_the_clip_of_chi_po_bounds_its_loss_on_both_sides():
    record = make_record()
    values = get_loss("chi_po", beta=5.0, r_max=1.0)(record)
    low, high = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert values.min().item() == pytest.approx(low)
    assert values.max().item() == pytest.approx(high)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("f_dpo_js", {"alpha": 0.5}, "f_dpo_js.alpha: no such hyper-parameter"),
        ("f_dpo_alpha", {"alpha": 1.0}, "expected a number > 0 and < 1, given 1.0"),
        ("f_dpo_alpha", {"f_alpha_divergence_coef": 0.5}, "TRL's is 1 - alpha since 0.29"),
        ("f_dpo_alpha", {"f_divergence_type": "js"}, "the divergence is part of the name"),
        ("chipo", {}, 'It is called "chi_po" here'),
        ("rpo", {}, 'It is called "irpo" here'),
        ("rebel", {}, 'It is called "reward_distillation" here'),
        ("discopop", {"discopop_tau": 0.05}, "it is called tau here"),
        ("exo", {"label_smoothing": 0.0}, "expected a number > 0 and < 0.5, given 0.0"),
    ],
)
def test_rivals_names_and_unused_hyper_parameters_are_refused_with_what_to_write(name, hyperparameters, message):
    with pytest.raises(LossError, match=message):
        get_loss(name, **hyperparameters)
