"""Statistics of whole next-token distributions, in fp32, in chunks: what WPO and TDPO read beside log-probs.

    log p(y_t) - log sum_v p(v)^2     relative log-prob, without gradient (WPO's weights)
    KL(reference || policy) at t      with gradient to the policy's hidden states and head (TDPO)

As for log-probs, the logits of a whole batch never exist: a tile of positions is scored at a time, and once more
in the backward pass. Sum either over the completion tokens of each example for what `LogProbs` takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt_losses.errors import LossError
from prefopt_losses.head import Head, HeadGradients, product_dtype, result_dtype, tile_size, tiles


@torch.no_grad()
def relative_token_logps_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token relative to that of a token sampled from the same distribution.

    ``log p[y] - log sum_v p[v]^2``; positive where the target is likelier than a sampled token is on average.

    Args:
        logits: (..., vocab), any float dtype.
        targets: (...), token ids.

    Returns:
        (...), fp32 or wider, nats; no gradient.
    """
    wide = logits.to(result_dtype(logits))
    chosen = wide.gather(-1, targets[..., None]).squeeze(-1)
    # Of p = exp(z) / Z: log p[y] - log sum p^2 = z[y] + logsumexp(z) - logsumexp(2 z).
    return chosen + torch.logsumexp(wide, dim=-1) - torch.logsumexp(2 * wide, dim=-1)


@torch.no_grad()
def relative_token_logps_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Relative log-probability of each target token, without ever holding the logits of all of them.

    ``log p[y] - log sum_v p[v]^2``, as `relative_token_logps_from_logits`.

    Args:
        hidden: (tokens, hidden), last hidden states at the positions that predict the targets.
        weight: (vocab, hidden), the language-model head.
        targets: (tokens,), token ids.
        bias: (vocab,) or None.
        scale: factor on the logits.
        softcap: final soft-cap of the logits, or None.
        chunk_size: positions per tile; None chooses one from the vocabulary and the device.

    Returns:
        (tokens,), fp32 or wider, nats; no gradient.
    """
    dtype, size = product_dtype(hidden), tile_size(hidden, weight.shape[0], chunk_size)
    head, hidden = Head(weight.to(dtype), bias, scale, softcap), hidden.to(dtype)
    relative = torch.empty(len(targets), dtype=result_dtype(hidden), device=hidden.device)
    for tile in tiles(len(targets), size):
        relative[tile] = relative_token_logps_from_logits(head(hidden[tile]), targets[tile])
    return relative


def sequential_kl_from_logits(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(reference || policy) of the next token at each position; gradient to the policy's logits only.

    ``sum_v q[v] (log q[v] - log p[v])``, p the policy's and q the reference's distribution.

    Args:
        logits: (..., vocab), the policy's, any float dtype.
        ref_logits: (..., vocab), the reference's.

    Returns:
        (...), fp32 or wider, nats.

    Raises:
        LossError: the shapes differ.
    """
    if logits.shape != ref_logits.shape:
        raise LossError(_one_vocabulary("logits", logits, "ref_logits", ref_logits))
    policy = torch.log_softmax(logits.to(result_dtype(logits)), dim=-1)
    reference = torch.log_softmax(ref_logits.detach().to(policy.dtype), dim=-1)
    return F.kl_div(policy, reference, reduction="none", log_target=True).sum(-1)


def sequential_kl_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_bias: Tensor | None = None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """KL(reference || policy) of the next token at each position, without ever holding the logits of all of them.

    ``sum_v q[v] (log q[v] - log p[v])``, p the policy's and q the reference's distribution. The gradient flows to
    the policy's hidden states and to what of its head is trained; none is computed for the reference.

    Args:
        hidden: (tokens, hidden), the policy's last hidden states.
        weight: (vocab, hidden), the policy's language-model head.
        ref_hidden: (tokens, ref_hidden), the reference's last hidden states at the same positions.
        ref_weight: (vocab, ref_hidden), the reference's head.
        bias: (vocab,) or None, the policy's.
        scale: factor on the policy's logits.
        softcap: final soft-cap of the policy's logits, or None.
        ref_bias: (vocab,) or None, the reference's.
        ref_scale: factor on the reference's logits.
        ref_softcap: final soft-cap of the reference's logits, or None.
        chunk_size: positions per tile (two tiles of logits are held at a time); None chooses one.

    Returns:
        (tokens,), fp32 or wider, nats.

    Raises:
        LossError: the two models differ in positions or vocabulary.
    """
    problems = []
    if len(hidden) != len(ref_hidden):
        problems.append(f"ref_hidden: expected {len(hidden)} positions like hidden, given {len(ref_hidden)}.")
    if len(weight) != len(ref_weight):
        problems.append(_one_vocabulary("weight", weight, "ref_weight", ref_weight))
    if problems:
        raise LossError(problems)
    dtype, size = product_dtype(hidden), tile_size(hidden, weight.shape[0], chunk_size)
    ref_dtype = product_dtype(ref_hidden)
    reference = Head(ref_weight.detach().to(ref_dtype), ref_bias, ref_scale, ref_softcap)
    ref_hidden = ref_hidden.detach().to(ref_dtype)
    values: Tensor = _ChunkedKL.apply(
        hidden.to(dtype), weight.to(dtype), bias, float(scale), softcap, ref_hidden, reference, size
    )
    return values


class _ChunkedKL(torch.autograd.Function):
    """Two heads and the KL of their softmaxes over tiles of positions; the backward pass recomputes each tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        ref_hidden: Tensor,
        reference: Head,
        size: int,
    ) -> Tensor:
        head = Head(weight, bias, scale, softcap)
        values = torch.empty(len(hidden), dtype=result_dtype(hidden), device=hidden.device)
        for tile in tiles(len(hidden), size):
            values[tile] = sequential_kl_from_logits(head(hidden[tile]), reference(ref_hidden[tile]))
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, reference.weight, reference.bias)
        ctx.scales = (scale, softcap), (reference.scale, reference.softcap)
        ctx.size = size
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_values,) = grad_outputs
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = ctx.saved_tensors
        head, reference = Head(weight, bias, *ctx.scales[0]), Head(ref_weight, ref_bias, *ctx.scales[1])
        gradients = HeadGradients(head, hidden, grad_values.dtype, ctx.needs_input_grad[:3])
        for tile in tiles(len(hidden), ctx.size):
            logits = head(hidden[tile])
            # d KL / d z = softmax(z) - softmax(z_ref)
            grad = torch.softmax(logits, dim=-1).sub_(torch.softmax(reference(ref_hidden[tile]), dim=-1))
            gradients.add(tile, logits, grad.mul_(grad_values[tile, None]))
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None, None


def _one_vocabulary(name: str, policy: Tensor, ref_name: str, reference: Tensor) -> str:
    return (
        f"{ref_name}: expected the vocabulary of {name}, shape {tuple(policy.shape)}, given {tuple(reference.shape)}. "
        "A KL needs one distribution over the same tokens: use a reference with the policy's tokenizer, and cut "
        "padded vocabularies to one size."
    )
