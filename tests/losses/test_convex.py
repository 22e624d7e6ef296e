"""Every scalar function: its published formula, its derivatives at zero, its shape, its numerics."""

import math

import pytest
import torch

from prefopt_losses.convex import (
    FUNCTIONS,
    ClippedLogistic,
    LogRatioModulated,
    ReverseKL,
    ScaledBasu,
    negative_entropy,
)

# Written out by hand for one float.
FORMULAS = {
    "logistic": lambda x: math.log(1 + math.exp(-x)),
    "hinge": lambda x: max(0.0, 1 - x),
    "squared": lambda x: (x - 1) ** 2,
    "exponential": lambda x: math.exp(-x),
    "truncated_quadratic": lambda x: max(0.0, 1 - x) ** 2,
    "savage": lambda x: 1 / (1 + math.exp(x)) ** 2,
    "ramp": lambda x: 1 / (1 + math.exp(x)),
    "linear": lambda x: -x,
    "quadratic": lambda x: x * x,
    "cell": lambda x: 0.5 * math.exp(-x) + 0.5 * math.log(1 + math.exp(-x)),
    "padll": lambda x: (0.45 if x < 0 else 0.9) * math.log(1 + math.exp(-x)),
}
# f'(0), f''(0): the slope that makes it a classification loss, and the curvature that regularises.
AT_ZERO = {
    "logistic": (-1 / 2, 1 / 4),
    "hinge": (-1, 0),
    "squared": (-2, 2),
    "exponential": (-1, 1),
    "truncated_quadratic": (-2, 2),
    "savage": (-1 / 4, 1 / 8),
    "ramp": (-1 / 4, 0),
    "linear": (-1, 0),
    "quadratic": (0, 2),
    "cell": (-3 / 4, 5 / 8),
    "padll": (-0.45, 0.225),
}
NOT_CONVEX = {"savage", "ramp", "padll"}
OVERFLOWS = {"exponential", "cell"}

every_function = pytest.mark.parametrize("name", FUNCTIONS)


def derivative(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_the_formulas_and_the_functions_are_the_same_set():
    assert set(FORMULAS) == set(FUNCTIONS) == set(AT_ZERO)


@every_function
def test_it_equals_its_formula_in_float64(name):
    x = torch.linspace(-7.3, 7.9, 61, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](each) for each in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(FUNCTIONS[name](x), expected, rtol=1e-12, atol=1e-14)


@every_function
def test_its_first_two_derivatives_at_zero_are_the_tabulated_ones(name):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum(), x)[0].item() if first.requires_grad else 0.0
    assert (first.item(), second) == pytest.approx(AT_ZERO[name], abs=1e-12)


@every_function
def test_it_is_convex_exactly_where_the_table_says_so(name):
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    rising = torch.diff(derivative(FUNCTIONS[name], x)) >= -1e-12
    assert bool(rising.all()) == (name not in NOT_CONVEX)


def test_savage_bends_the_wrong_way_below_minus_log_two():
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)
    falling = torch.diff(derivative(FUNCTIONS["savage"], x)) < 0
    middle = (x[1:] + x[:-1]) / 2
    assert torch.equal(falling, middle < -math.log(2))


@every_function
def test_its_gradient_passes_gradcheck(name):
    x = torch.tensor([-6.1, -1.2, 0.3, 0.9, 2.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FUNCTIONS[name], (x,))


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_dtype_and_is_finite_out_to_ten_thousand(name, dtype):
    x = torch.tensor([-1e4, -88.0, -1.0, 0.0, 1.0, 88.0, 1e4], dtype=dtype)
    if name in OVERFLOWS:
        x = x[1:]
    value, slope = FUNCTIONS[name](x), derivative(FUNCTIONS[name], x)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_exponential_overflows_below_minus_88_as_documented():
    assert FUNCTIONS["exponential"](torch.tensor(-89.0)).isinf()
    assert FUNCTIONS["exponential"](torch.tensor(-88.0)).isfinite()


def test_logistic_keeps_its_digits_far_out():
    """log(1 + e^-x) taken literally is 0 at x = 40 and inf at x = -100 in fp32."""
    far = FUNCTIONS["logistic"](torch.tensor([40.0, -100.0]))
    torch.testing.assert_close(far, torch.tensor([math.exp(-40.0), 100.0]))


# With a parameter: the slope and the curvature at zero that the table of the room gives.
WITH_PARAMETER = [
    (ReverseKL(0.001), -math.log(999) / 4, 1 / 4),
    (ReverseKL(0.2), -math.log(4) / 4, 1 / 4),
    (LogRatioModulated(0.05), -3 / 4 + (1 - math.log(2)) / 0.2, 5 / 8 - 5),
    (LogRatioModulated(1.0), -3 / 4 + (1 - math.log(2)) / 4, 5 / 8 - 1 / 4),
    (ScaledBasu(0.5), -1 / 2, 1 / 4),
    (ScaledBasu(2.0), -1 / 2, 1 / 4),
    (ClippedLogistic(3.0), -1 / 2, 1 / 4),
]
every_parametrised_function = pytest.mark.parametrize(("f", "slope", "curvature"), WITH_PARAMETER, ids=str)


@every_parametrised_function
def test_with_a_parameter_too_its_derivatives_at_zero_are_the_tabulated_ones(f, slope, curvature):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert (first.item(), second.item()) == pytest.approx((slope, curvature), abs=1e-12)


@every_parametrised_function
def test_with_a_parameter_it_is_not_convex(f, slope, curvature):
    x = torch.linspace(-12, 12, 1601, dtype=torch.float64)
    assert not bool((torch.diff(derivative(f, x)) >= -1e-12).all())


@pytest.mark.parametrize("f", [f for f, *_ in WITH_PARAMETER if not isinstance(f, ScaledBasu)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_parameter_it_is_finite_out_to_ten_thousand(f, dtype):
    x = torch.tensor([-1e4, -88.0, -1.0, 0.0, 1.0, 88.0, 1e4], dtype=dtype)
    assert f(x).dtype == dtype
    assert f(x).isfinite().all()
    assert derivative(f, x).isfinite().all()


def test_discopop_starts_backwards_until_its_switch_is_wide_enough():
    zero = torch.zeros(1, dtype=torch.float64)
    slopes = {tau: derivative(LogRatioModulated(tau), zero).item() for tau in (0.05, 0.102, 0.103, 1.0)}
    assert slopes[0.05] == pytest.approx(0.784, abs=5e-4)
    assert slopes[0.102] > 0 > slopes[0.103] > slopes[1.0]


def test_reverse_kl_rests_at_the_log_odds_of_its_label():
    log_odds = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64)
    assert ReverseKL(0.2)(log_odds).item() == pytest.approx(0, abs=1e-15)
    assert derivative(ReverseKL(0.2), log_odds).item() == pytest.approx(0, abs=1e-15)
    assert derivative(ReverseKL(0.2), log_odds + 1).item() > 0


@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0])
def test_scaled_basu_weighs_ratios_as_bregmans_divergence_of_its_generator_does(lam):
    """h'(R) R - h(R) - h'(1/R) with h(R) = (R^(1+lam) - R) / (4 lam (1+lam)), R = e^-x, up to a constant."""

    def h(ratio):
        return (ratio ** (1 + lam) - ratio) / (4 * lam * (1 + lam))

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    ratio = torch.exp(-x)
    expected = derivative(h, ratio) * ratio - h(ratio) - derivative(h, 1 / ratio)
    torch.testing.assert_close(torch.diff(ScaledBasu(lam)(x)), torch.diff(expected))


def test_clipped_logistic_is_logistic_within_its_bound_and_flat_beyond():
    x = torch.tensor([-5.0, -2.9, 0.0, 2.9, 5.0], dtype=torch.float64)
    inside = ClippedLogistic(3.0)(x)[1:4]
    torch.testing.assert_close(inside, FUNCTIONS["logistic"](x[1:4]))
    assert derivative(ClippedLogistic(3.0), x)[[0, 4]].tolist() == [0, 0]


def test_negative_entropy_is_least_for_an_even_coin_and_zero_for_a_certain_one():
    x = torch.tensor([0.0, 1.3, -1.3, 1e4], dtype=torch.float64)
    even, loaded, mirrored, certain = negative_entropy(x).tolist()
    assert even == pytest.approx(-math.log(2))
    assert loaded == mirrored > even
    assert certain == 0.0
