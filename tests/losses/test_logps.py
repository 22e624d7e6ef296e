"""Chunked log-probs are those of the dense softmax, in value and gradient, for every kind of head."""

from __future__ import annotations

import pytest
import torch

from prefopt_losses import LossError, logps
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
    return torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]


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


LEARNS = {
    "all": (True, True, True),
    "a frozen head": (True, False, False),
    "a frozen weight under a trained bias": (True, False, True),
    "a trained weight under a frozen bias": (True, True, False),
    "the head alone": (False, True, True),
    "nothing": (False, False, False),
}
"""Which of hidden states, weight and bias take a gradient."""

KEPT = {"all": 2**28, "some": 5 * VOCAB, "none": 0}
"""What of a trained head's slopes a forward pass may keep for its backward pass: numbers, times their bytes."""

# L2 distance relative to the dense head in fp64 on the same, already rounded numbers. In bf16 a number is off by up
# to 2^-9; slopes and results are rounded once each, products are accumulated in fp32: 0.0045 was the most.
NEAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.01}


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-9))


HEADS = [
    {"scale": scale, "softcap": softcap, "biased": biased, "chunk_size": chunk_size}
    for scale in (1.0, 0.25)
    for softcap in (None, 3.0)
    for biased in (False, True)
    for chunk_size in (4, 100)
]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("learns", LEARNS)
def test_every_way_to_the_log_probs_has_the_dense_values_and_gradients(monkeypatch, learns, dtype, kept):
    monkeypatch.setitem(logps.KEPT_BYTES, "cpu", KEPT[kept] * dtype.itemsize)
    for kind in HEADS:
        compare_with_dense(LEARNS[learns], dtype, **kind)


def compare_with_dense(learns, dtype, *, scale, softcap, biased, chunk_size):
    *tensors, targets = head()
    mine = [tensor.detach().to(dtype).requires_grad_(on) for tensor, on in zip(tensors, learns)]
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in mine]
    if not biased:
        mine[2] = exact[2] = None
    given = {"bias": mine[2], "scale": scale, "softcap": softcap, "chunk_size": chunk_size}
    found = token_logps_from_hidden(*mine[:2], targets, **given)
    expected = dense(*exact, targets, scale, softcap)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distance(found.detach(), expected.detach()) < NEAR[dtype], given

    there = [(one, other) for one, other in zip(mine, exact) if one is not None]
    learning = [(one, other) for one, other in there if one.requires_grad]
    assert found.requires_grad == bool(learning)
    if learning:
        upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
        found.backward(upstream.to(found.dtype))
        expected.backward(upstream)
    for one, other in there:
        assert (one.grad is not None) == one.requires_grad
        if one.requires_grad:
            assert one.grad.dtype == dtype
            assert distance(one.grad, other.grad) < NEAR[dtype], given


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_batches_in_flight_do_not_touch_each_other(monkeypatch, frozen, kept):
    """Two forward passes before the backward passes, in either order; and one backward pass twice."""
    monkeypatch.setitem(logps.KEPT_BYTES, "cpu", KEPT[kept] * 8)
    hidden, weight, _, targets = head()
    weight.requires_grad_(not frozen)
    inputs = [hidden] if frozen else [hidden, weight]

    def forward(number):
        return token_logps_from_hidden(hidden * number, weight, targets, chunk_size=4).sum()

    alone = [torch.autograd.grad(forward(number), inputs) for number in (1, 2)]
    first, second = forward(1), forward(2)
    for found, expected in [(second, alone[1]), (first, alone[0]), (second, alone[1])]:
        torch.testing.assert_close(torch.autograd.grad(found, inputs, retain_graph=True), expected)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_position_is_an_empty_result_with_empty_gradients(frozen):
    hidden, weight, bias, targets = head()
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    empty = hidden.detach()[:0].requires_grad_()
    found = token_logps_from_hidden(empty, weight, targets[:0], bias=bias)
    assert found.shape == (0,)
    found.sum().backward()
    assert empty.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("learns", [which for which in LEARNS if which != "nothing"])
def test_gradcheck_of_whatever_learns(learns, biased, softcap):
    tensors = [tensor.detach().requires_grad_(on) for tensor, on in zip(head()[:3], LEARNS[learns])]
    targets = head()[3]

    def logps_of(hidden, weight, bias):
        bias = bias if biased else None
        return token_logps_from_hidden(hidden, weight, targets, bias=bias, scale=0.7, softcap=softcap, chunk_size=4)

    if learns == "a frozen weight under a trained bias" and not biased:
        tensors[2].requires_grad_(False)
    assert torch.autograd.gradcheck(logps_of, tensors)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("chunk_size", [4, 100], ids=["many tiles", "one tile"])
def test_autocast_over_fp32_rounds_as_bf16_does_and_leaves_fp32_gradients(frozen, chunk_size):
    hidden, weight, _, targets = head(torch.float32)
    weight.requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logps_from_hidden(hidden, weight, targets, chunk_size=chunk_size)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = dense(*exact, None, targets, 1.0, None)
    assert distance(found.detach(), expected.detach()) < NEAR[torch.bfloat16]
    upstream = torch.linspace(-1, 2, TOKENS)
    found.backward(upstream)
    expected.backward(upstream.double())
    for one, other in zip((hidden,) if frozen else (hidden, weight), exact):
        assert one.grad.dtype == torch.float32
        assert distance(one.grad, other.grad) < NEAR[torch.bfloat16]


def test_large_logits_lose_nothing_to_their_size():
    """Logits of +-1e4 in fp32: the log-prob of a certain token is 0, of an impossible one the difference of logits."""
    hidden = torch.tensor([[1e4], [1e4]]).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0], [0.0]]).requires_grad_()
    found = token_logps_from_hidden(hidden, weight, torch.tensor([0, 1]))
    assert found.tolist() == [0.0, -2e4]
    found.sum().backward()
    assert hidden.grad.tolist() == [[0.0], [-2.0]]
    assert weight.grad.isfinite().all()


def test_rare_and_certain_tokens_are_both_exact_and_each_by_itself():
    """Log-probs of -1e-6, -60 and -100 nats; the last one's probability has lost its digits in fp32."""
    hidden = torch.tensor([[13.8155], [60.0], [100.0]])
    weight = torch.tensor([[1.0], [0.0]])
    targets = torch.tensor([0, 1, 1])
    together = token_logps_from_hidden(hidden, weight, targets)
    exact = dense(hidden.double(), weight.double(), None, targets, 1.0, None)
    torch.testing.assert_close(together.double(), exact, rtol=1e-6, atol=1e-7)
    alone = [token_logps_from_hidden(hidden[row : row + 1], weight, targets[row : row + 1]) for row in range(3)]
    assert torch.equal(torch.cat(alone), together)


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


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_weights_gradient_can_be_added_elsewhere(monkeypatch, dtype, kept):
    """Twice, as two micro-batches would; 16-bit factors slab by slab."""
    monkeypatch.setitem(logps.KEPT_BYTES, "cpu", KEPT[kept] * dtype.itemsize)
    monkeypatch.setattr(logps, "SLAB_BYTES", 4 * HIDDEN * 3)
    hidden, weight, bias, targets = head(torch.float32 if dtype == torch.bfloat16 else dtype)
    autograds, elsewhere = [], torch.ones_like(weight)
    for weight_grad in (None, elsewhere, elsewhere):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = token_logps_from_hidden(hidden, weight, targets, bias=bias, chunk_size=4, weight_grad=weight_grad)
        autograds.append(torch.autograd.grad(found.sum(), (hidden, weight, bias), allow_unused=True))
    (of_hidden, of_weight, of_bias), *others = autograds
    rough = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(elsewhere, 1 + 2 * of_weight, **rough)
    for hidden_again, nothing, bias_again in others:
        assert nothing is None
        torch.testing.assert_close((hidden_again, bias_again), (of_hidden, of_bias))


def test_a_gradient_of_another_shape_is_refused():
    hidden, weight, _, targets = head()
    with pytest.raises(LossError, match=r"weight_grad of shape \(17, 8\), given \(8, 17\)"):
        token_logps_from_hidden(hidden, weight, targets, weight_grad=torch.zeros(HIDDEN, VOCAB))


@pytest.mark.parametrize("trained", [False, True])
def test_shapes_that_do_not_fit_are_all_said_before_anything_is_computed(trained):
    hidden, weight, bias, targets = head()
    weight.requires_grad_(trained)
    with pytest.raises(LossError, match=r"a target for each of 13 positions, given \(9,\)") as caught:
        token_logps_from_hidden(hidden, weight, targets[:9], bias=bias[:4], chunk_size=0)
    for said in ("expected bias of shape (17,), given (4,)", "expected chunk_size of at least 1 position, given 0"):
        assert said in str(caught.value)
    for given in (hidden[None], hidden[:, :5]):
        with pytest.raises(LossError, match=r"expected hidden \(tokens, hidden\) and weight \(vocab, hidden\)"):
            token_logps_from_hidden(given, weight, targets)
