"""Hidden states or logits -> log-probabilities of the target tokens, in fp32, in chunks, with gradients.

The logits of a whole batch never exist: the language-model head is applied to a tile of positions at a time,
in the forward pass and again in the backward pass (four head products in all, against three for dense
cross-entropy, for a memory that does not grow with the number of tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt_losses.errors import LossError
from prefopt_losses.head import Head, HeadGradients, product_dtype, result_dtype, tile_size, tiles


def token_logps_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token under its logits.

    ``logp_t = z_t[y_t] - logsumexp(z_t)``

    Args:
        logits: (..., vocab), any float dtype.
        targets: (...), token ids.

    Returns:
        (...), fp32, nats.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return -F.cross_entropy(flat, targets.reshape(-1), reduction="none").reshape(targets.shape)


def token_logps_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each target token, without ever holding the logits of all of them.

    ``z = softcap * tanh(scale * (W h + b) / softcap)`` (no cap where ``softcap`` is None), then
    ``logp = z[y] - logsumexp(z)`` in fp32.

    Args:
        hidden: (tokens, hidden), last hidden states at the positions that predict the targets.
        weight: (vocab, hidden), the language-model head. No gradient is computed for it when it is frozen.
        targets: (tokens,), token ids.
        bias: (vocab,) or None.
        scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: Gemma 2's final soft-cap, or None.
        chunk_size: positions per tile; None chooses one from the vocabulary and the device.

    Returns:
        (tokens,), fp32, nats. Products run in the autocast dtype where autocast is on, else in the
        dtype of ``hidden``; everything after the product is fp32.
    """
    dtype, size = product_dtype(hidden), tile_size(hidden, weight.shape[0], chunk_size)
    logps: Tensor = _ChunkedHead.apply(hidden.to(dtype), weight.to(dtype), bias, targets, float(scale), softcap, size)
    return logps


def left_aligned(logps: Tensor, mask: Tensor) -> Tensor:
    """Put the scored tokens of each row first, in their order: token t of a completion in column t, 0 beyond.

    Args:
        logps: (batch, sequence), per-token log-probs; what stands outside the mask is not read, NaN included.
        mask: (batch, sequence), bool or 0 and 1: the scored tokens, wherever they are in the row.

    Returns:
        (batch, tokens), as wide as the longest completion (read with one device synchronisation), in the dtype of
        ``logps``, differentiable: what `LogProbs` calls token log-probs.

    Raises:
        LossError: the shapes differ.
    """
    if logps.ndim != 2 or logps.shape != mask.shape:
        raise LossError(
            "left_aligned: expected log-probs and mask of one shape (batch, sequence), "
            f"given {tuple(logps.shape)} and {tuple(mask.shape)}. Cut both to the same positions first: "
            "logits at t predict token t + 1, so the mask of the targets is mask[:, 1:]."
        )
    scored = mask.bool()
    counts = scored.sum(-1, keepdim=True)
    longest = int(counts.max()) if counts.numel() else 0
    order = scored.int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
    beyond = torch.arange(longest, device=logps.device) >= counts
    return logps.gather(1, order).masked_fill(beyond, 0)


class _ChunkedHead(torch.autograd.Function):
    """Head, log-softmax and gather over tiles of positions; the backward pass recomputes each tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        size: int,
    ) -> Tensor:
        head = Head(weight, bias, scale, softcap)
        logps = torch.empty(len(targets), dtype=result_dtype(hidden), device=hidden.device)
        normalisers = torch.empty_like(logps)
        for tile in tiles(len(targets), size):
            logits = head(hidden[tile])
            normalisers[tile] = torch.logsumexp(logits, dim=-1)
            logps[tile] = logits.gather(1, targets[tile, None]).squeeze(1) - normalisers[tile]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.scale, ctx.softcap, ctx.size = scale, softcap, size
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logps,) = grad_outputs
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        gradients = HeadGradients(head, hidden, normalisers.dtype, ctx.needs_input_grad[:3])
        for tile in tiles(len(targets), ctx.size):
            logits = head(hidden[tile])
            # d logp / d z = onehot(y) - softmax(z)
            grad = torch.exp(logits - normalisers[tile, None]).mul_(-grad_logps[tile, None])
            grad.scatter_add_(1, targets[tile, None], grad_logps[tile, None])
            gradients.add(tile, logits, grad)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None
