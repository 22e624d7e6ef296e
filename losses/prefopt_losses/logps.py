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

# A tile of fp32 logits. On CPU it stays under glibc's 32 MiB mmap threshold: larger blocks are returned to the
# system after each use and page-fault on the next. On an accelerator a tile must be large enough to fill it.
CPU_TILE_BYTES = 24 * 2**20
DEVICE_TILE_BYTES = 512 * 2**20


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
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if chunk_size is None:
        tile_bytes = CPU_TILE_BYTES if device == "cpu" else DEVICE_TILE_BYTES
        chunk_size = max(16, tile_bytes // (4 * weight.shape[0]))
    logps: Tensor = _ChunkedHead.apply(
        hidden.to(dtype), weight.to(dtype), bias, targets, float(scale), softcap, chunk_size
    )
    return logps


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product with an fp32 result; accumulated and kept in fp32 where the device can."""
    if left.dtype == torch.float32 or left.dtype == torch.float64:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = _product(hidden, weight.t())
    if bias is not None:
        logits = logits + bias
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


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
        chunk_size: int,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(targets), dtype=wide, device=hidden.device)
        normalisers = torch.empty_like(logps)
        for start in range(0, len(targets), chunk_size):
            tile = slice(start, start + chunk_size)
            logits = _tile_logits(hidden[tile], weight, bias, scale, softcap)
            normalisers[tile] = torch.logsumexp(logits, dim=-1)
            logps[tile] = logits.gather(1, targets[tile, None]).squeeze(1) - normalisers[tile]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.scale, ctx.softcap, ctx.chunk_size = scale, softcap, chunk_size
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logps,) = grad_outputs
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=normalisers.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=normalisers.dtype) if needs_bias else None
        for start in range(0, len(targets), ctx.chunk_size):
            tile = slice(start, start + ctx.chunk_size)
            logits = _tile_logits(hidden[tile], weight, bias, ctx.scale, ctx.softcap)
            # d logp / d z = onehot(y) - softmax(z)
            grad = torch.exp(logits - normalisers[tile, None]).mul_(-grad_logps[tile, None])
            grad.scatter_add_(1, targets[tile, None], grad_logps[tile, None])
            if ctx.softcap is not None:
                grad *= 1 - (logits / ctx.softcap) ** 2
            if ctx.scale != 1.0:
                grad *= ctx.scale
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            low = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[tile] = low @ weight
            if grad_weight is not None:
                grad_weight += _product(low.t(), hidden[tile])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
