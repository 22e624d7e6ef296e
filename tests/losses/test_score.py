"""One score per completion: aggregate, reference, link, and log-odds that stay finite."""

import math

import pytest
import torch

from prefopt_losses import LINKS, LossError, Score
from prefopt_losses.score import log1mexp, log_odds

LOGPS = torch.tensor([-12.0, -30.0], dtype=torch.float64)
REFERENCE = torch.tensor([-15.0, -24.0], dtype=torch.float64)
LENGTHS = torch.tensor([4, 10])


def test_the_sum_against_a_reference_is_the_log_ratio():
    assert Score()(LOGPS, REFERENCE, None).tolist() == [3.0, -6.0]


def test_the_mean_divides_by_the_length_of_its_own_completion():
    assert Score(aggregate="mean")(LOGPS, REFERENCE, LENGTHS).tolist() == [0.75, -0.6]


def test_without_a_reference_it_is_the_likelihood():
    assert Score(reference=False)(LOGPS, None, None).tolist() == [-12.0, -30.0]
    assert Score("mean", reference=False)(LOGPS, None, LENGTHS).tolist() == [-3.0, -3.0]


def test_the_link_comes_last():
    odds = Score("mean", reference=False, link=log_odds)(LOGPS, None, LENGTHS)
    expected = -3 - math.log(1 - math.exp(-3))
    torch.testing.assert_close(odds, torch.full_like(odds, expected))


def test_sixteen_bit_inputs_are_widened_before_they_are_subtracted():
    logps, reference = torch.tensor([-512.0]).bfloat16(), torch.tensor([-3.0]).bfloat16()
    assert Score()(logps, reference, None).item() == -509.0  # bf16 has no -509: it would round to -508 or -510
    assert Score()(logps, reference, None).dtype == torch.float32


def test_a_missing_reference_or_length_is_named():
    with pytest.raises(LossError, match="ref_logps"):
        Score()(LOGPS, None, None)
    with pytest.raises(LossError, match="lengths"):
        Score("mean")(LOGPS, REFERENCE, None)


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS.keys())
def test_links_have_correct_gradients(link):
    x = torch.tensor([-0.01, -0.5, -math.log(2), -3.0, -40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(link, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logp", [0.0, -1e-30, -1e-7, -1e-3, -math.log(2), -50.0, -1e4])
def test_log_odds_are_finite_with_finite_gradient(logp, dtype):
    x = torch.tensor([logp], dtype=dtype, requires_grad=True)
    value = log_odds(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("logp", [-1e-7, -1e-3, -0.5, -5.0, -50.0])
def test_log_odds_in_fp32_agree_with_the_definition_in_double(logp):
    logp = torch.tensor(logp).item()  # as fp32 holds it
    expected = logp - math.log(-math.expm1(logp))
    assert log_odds(torch.tensor(logp)).item() == pytest.approx(expected, rel=2e-6)
    assert log1mexp(torch.tensor(logp)).item() == pytest.approx(expected * -1 + logp, abs=2e-7, rel=2e-6)


def test_probability_one_has_large_odds_and_no_gradient():
    x = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(log_odds(x).sum(), x)
    assert log_odds(x).item() > 30
    assert slope.item() == 1.0  # of the identity part alone
