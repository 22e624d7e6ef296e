"""Every scalar function: its published formula, its derivatives at zero, its shape, its numerics."""

import math

import pytest
import torch

from prefopt_losses.convex import FUNCTIONS

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
}
NOT_CONVEX = {"savage", "ramp"}

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
    if name == "exponential":
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
