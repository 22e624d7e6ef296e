"""Chunked log-probs are those of the dense softmax, in value and gradient, for every kind of head."""

from __future__ import annotations

import pytest
import torch

from prefopt_losses import LossError
from prefopt_losses.logps import left_aligned, token_logps_from_hidden, token_logps_from_logits

TOKENS, HIDDEN, VOCAB = 13, 8, 17


def head(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return draw(TOKENS, HIDDEN), draw(VOCAB, HIDDEN), draw(VOCAB), targets


def dense(hidden, weight, bias, targets, scale, softcap):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1)[torch.arange(TOKENS), targets]


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, None])
@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.5, None, True), (2.0, 3.0, True)])
def test_values_and_gradients_are_those_of_the_dense_head(chunk_size, scale, softcap, biased):
    hidden, weight, bias, targets = head()
    bias = bias if biased else None
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected = dense(hidden, weight, bias, targets, scale, softcap)
    found = token_logps_from_hidden(
        hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, chunk_size=chunk_size
    )
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradcheck():
    hidden, weight, bias, targets = head()

    def logps(hidden, weight, bias):
        return token_logps_from_hidden(hidden, weight, targets, bias=bias, scale=0.7, softcap=3.0, chunk_size=4)

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, targets = head(torch.float32)
    token_logps_from_hidden(hidden, weight.detach(), targets).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_results_are_fp32_under_bf16_and_near_the_exact_ones():
    hidden, weight, bias, targets = head(torch.float32)
    exact = token_logps_from_hidden(hidden, weight, targets, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_logps_from_hidden(hidden, weight, targets, bias=bias)
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).detach().abs().max()) < 0.1
    rounded.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_logits_of_any_shape():
    logits = torch.randn(2, 3, VOCAB)
    targets = torch.randint(0, VOCAB, (2, 3))
    expected = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_logps_from_logits(logits, targets), expected)


def test_left_aligned_puts_the_scored_tokens_first_in_their_order():
    logps = -torch.arange(1.0, 13.0).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0]])  # the gaps are turns of the user
    expected = torch.tensor([[-3.0, -4.0, -6.0], [-8.0, -11.0, 0.0]])
    assert torch.equal(left_aligned(logps, mask), expected)
    assert torch.equal(left_aligned(logps, mask.bool()), expected)
    assert left_aligned(logps, torch.zeros_like(mask)).shape == (2, 0)


def test_left_aligned_sums_to_the_masked_sum_and_carries_the_gradient_to_scored_tokens_only():
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(5, 9, generator=generator)
    mask = torch.rand(5, 9, generator=generator) < 0.6
    logps[~mask] = float("nan")
    logps.requires_grad_()
    aligned = left_aligned(logps, mask)
    torch.testing.assert_close(aligned.sum(-1), logps.detach().masked_fill(~mask, 0).sum(-1))
    (slope,) = torch.autograd.grad(aligned.sum(), logps)
    assert torch.equal(slope, mask.float())


def test_left_aligned_refuses_a_mask_of_other_positions():
    with pytest.raises(LossError, match=r"one shape \(batch, sequence\), given \(2, 5\) and \(2, 6\).*mask\[:, 1:\]"):
        left_aligned(torch.zeros(2, 5), torch.ones(2, 6))
