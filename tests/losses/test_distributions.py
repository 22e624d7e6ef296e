"""Chunked statistics of whole distributions are the dense ones, and never hold the logits of a batch."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt_losses import LossError, token_logps_from_hidden
from prefopt_losses.distributions import (
    relative_token_logps_from_hidden,
    relative_token_logps_from_logits,
    sequential_kl_from_hidden,
    sequential_kl_from_logits,
)

TOKENS, HIDDEN, REF_HIDDEN, VOCAB = 13, 8, 5, 17
HEADS = pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.5, None, True), (2.0, 3.0, 1)])
CHUNKS = pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, None])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def policy(dtype=torch.float64):
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    return [draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def reference(dtype=torch.float64):
    return draw(TOKENS, REF_HIDDEN, seed=4, dtype=dtype), draw(VOCAB, REF_HIDDEN, seed=5, dtype=dtype)


def targets():
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(6))


def dense(hidden, weight, bias=None, scale=1.0, softcap=None):
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Largest(TorchDispatchMode):
    """The most rows of a (rows, vocabulary) tensor that any operation makes."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.ndim == 2 and made.shape[1] == VOCAB and made.numel():
            self.rows = max(self.rows, made.shape[0])
        return made


@CHUNKS
@HEADS
def test_relative_logps_compare_a_token_with_a_sampled_one(chunk_size, scale, softcap, biased):
    hidden, weight, bias = policy()
    bias = bias if biased else None
    options = {"bias": bias, "scale": scale, "softcap": softcap}
    found = relative_token_logps_from_hidden(hidden, weight, targets(), **options, chunk_size=chunk_size)
    p = torch.softmax(dense(hidden, weight, **options), -1)
    torch.testing.assert_close(found, (p[torch.arange(TOKENS), targets()] / p.square().sum(-1)).log().detach())
    assert not found.requires_grad


def test_relative_logps_of_logits_of_any_shape():
    logits, ids = draw(2, 3, VOCAB), torch.tensor([[1, 2, 3], [4, 5, 6]])
    one_by_one = [[relative_token_logps_from_logits(logits[i, j], ids[i, j]) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(
        relative_token_logps_from_logits(logits, ids), torch.stack([torch.stack(row) for row in one_by_one])
    )


def test_a_uniform_distribution_has_no_likelier_token():
    zero = relative_token_logps_from_logits(torch.zeros(4, VOCAB), torch.arange(4))
    torch.testing.assert_close(zero, torch.zeros(4), atol=1e-6, rtol=0)


def test_relative_logps_are_logps_less_their_normaliser():
    hidden, weight, _ = policy()
    p = torch.softmax(hidden @ weight.T, -1)
    less = token_logps_from_hidden(hidden, weight, targets()) - p.square().sum(-1).log()
    torch.testing.assert_close(relative_token_logps_from_hidden(hidden, weight, targets()), less.detach())


@CHUNKS
@HEADS
def test_sequential_kl_and_its_gradients_are_the_dense_ones(chunk_size, scale, softcap, biased):
    hidden, weight, bias = policy()
    ref_hidden, ref_weight = reference()
    options = {"bias": bias if biased else None, "scale": scale, "softcap": softcap}
    inputs = [hidden, weight, bias] if biased else [hidden, weight]
    found = sequential_kl_from_hidden(hidden, weight, ref_hidden, ref_weight, **options, chunk_size=chunk_size)
    logits, ref_logits = dense(hidden, weight, **options), dense(ref_hidden, ref_weight)
    expected = kl_divergence(Categorical(logits=ref_logits), Categorical(logits=logits))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sequential_kl_from_logits(logits, ref_logits), expected)
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_references_head_has_its_own_bias_scale_and_softcap():
    (hidden, weight, bias), (ref_hidden, ref_weight) = policy(), reference()
    found = sequential_kl_from_hidden(
        hidden, weight, ref_hidden, ref_weight, ref_bias=bias, ref_scale=0.5, ref_softcap=3.0, chunk_size=4
    )
    ref_logits = dense(ref_hidden, ref_weight, bias, 0.5, 3.0)
    torch.testing.assert_close(found, sequential_kl_from_logits(dense(hidden, weight), ref_logits))
    assert torch.autograd.grad(found.sum(), bias, allow_unused=True) == (None,)


def test_gradcheck():
    ref_hidden, ref_weight = reference()

    def values(hidden, weight, bias):
        options = {"bias": bias, "scale": 0.7, "softcap": 3.0, "chunk_size": 4}
        return sequential_kl_from_hidden(hidden, weight, ref_hidden, ref_weight, **options)

    assert torch.autograd.gradcheck(values, policy())


def test_a_policy_equal_to_its_reference_is_exactly_at_zero():
    hidden, weight, _ = policy(torch.float32)
    value = sequential_kl_from_hidden(hidden, weight, hidden, weight)
    assert torch.equal(value, torch.zeros(TOKENS))
    assert all(not slope.any() for slope in torch.autograd.grad(value.sum(), (hidden, weight)))


def test_the_reference_gets_no_gradient_and_a_frozen_head_neither():
    hidden, weight, _ = policy(torch.float32)
    ref_hidden, ref_weight = (tensor.requires_grad_() for tensor in reference(torch.float32))
    sequential_kl_from_hidden(hidden, weight.detach(), ref_hidden, ref_weight).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is ref_hidden.grad is ref_weight.grad is None


def test_no_more_than_a_tile_of_logits_is_ever_held():
    (hidden, weight, _), (ref_hidden, ref_weight) = policy(), reference()
    with Largest() as largest:
        relative_token_logps_from_hidden(hidden, weight, targets(), chunk_size=10)
        sequential_kl_from_hidden(hidden, weight, ref_hidden, ref_weight, chunk_size=10).sum().backward()
    assert largest.rows == 10  # the head itself, transposed, has 8
    with Largest() as blind:
        sequential_kl_from_logits(hidden @ weight.T, ref_hidden @ ref_weight.T)
    assert blind.rows == TOKENS


def test_results_are_fp32_under_bf16_and_near_the_exact_ones():
    (hidden, weight, _), (ref_hidden, ref_weight) = policy(torch.float32), reference(torch.float32)
    exact = sequential_kl_from_hidden(hidden, weight, ref_hidden, ref_weight)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sequential_kl_from_hidden(hidden, weight, ref_hidden, ref_weight)
        relative = relative_token_logps_from_hidden(hidden, weight, targets())
    assert rounded.dtype == relative.dtype == torch.float32
    assert 0 < float((rounded - exact).detach().abs().max()) < 0.1
    rounded.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    low = [tensor.detach().bfloat16() for tensor in (hidden, weight, ref_hidden, ref_weight)]
    assert sequential_kl_from_hidden(*low).dtype == torch.float32


def test_models_of_two_vocabularies_are_refused_with_what_to_do():
    (hidden, weight, _), (ref_hidden, ref_weight) = policy(), reference()
    with pytest.raises(LossError, match="cut padded vocabularies") as caught:
        sequential_kl_from_hidden(hidden, weight, ref_hidden[1:], ref_weight[1:])
    assert len(caught.value.problems) == 2
    with pytest.raises(LossError, match="ref_logits: expected the vocabulary of logits"):
        sequential_kl_from_logits(hidden @ weight.T, ref_hidden @ ref_weight[1:].T)
