"""Hidden states or logits -> log-probabilities of the target tokens, in fp32, in chunks, with gradients.

The logits of a whole batch never exist: the head is applied to a tile of positions at a time. While a tile's logits
are at hand, their slopes D = d(-logp) / d logits (the softmax, less 1 at the target) are made of them, and what the
backward pass needs is taken from D:

    frozen head     d(-logp) / d hidden = D W, so the backward pass is one multiplication: two head products in all
    trained head    D itself, as far as `KEPT_BYTES` reach: the backward pass is d hidden = D W and d W = D' hidden,
                    three products in all; tiles beyond that are computed again, four products

Neither needs to know the loss, so every loss is served, also one that is taken over many batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from prefopt_losses.errors import LossError
from prefopt_losses.head import Head, product_dtype, result_dtype, tile_size, tiles
from prefopt_losses.products import matmul, matmul_into, product
from prefopt_losses.workspace import borrow, give_back

KEPT_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Slopes of a trained head's logits that a forward pass keeps for its backward pass, at most: 2,048 positions of
32,000 tokens in fp32 on a CPU, 4,096 of 128,000 in 16 bit on an accelerator."""


RARE = 1e-30
"""A probability up to which its logarithm is taken from the logits: fp32 loses digits of it below 1e-38."""
SLAB_BYTES = 8 * 2**20
"""Of a head's gradient in fp32 that is made of 16-bit factors at a time: 97 to 101 ms for 32,000 x 512 over 1,000
positions, 98 to 121 in slabs of 1 to 4 MiB and 114 to 117 in one piece."""


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
    weight_grad: Tensor | None = None,
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
        weight_grad: (vocab, hidden), where the backward pass adds the weight's gradient; autograd gets none then.
            It is summed in its own dtype, so fp32 is wanted. None: autograd gets it, and adds it up itself.
            (Megatron's gradient accumulation fusion.)

    Returns:
        (tokens,), fp32, nats. Products run in the autocast dtype where autocast is on, else in the
        dtype of ``hidden``; everything after the product is fp32.

    Raises:
        LossError: shapes that do not fit together, or a tile of no positions.
    """
    _refuse_shapes(hidden, weight, targets, bias, weight_grad, chunk_size)
    dtype, size = product_dtype(hidden), tile_size(hidden, weight.shape[0], chunk_size)
    learns = torch.is_grad_enabled()
    logps: Tensor = _ChunkedHead.apply(
        hidden.to(dtype), weight, bias, targets, float(scale), softcap, size, learns, weight_grad
    )
    return logps


def _refuse_shapes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None,
    chunk_size: int | None,
) -> None:
    """Raise LossError with everything that does not fit; a head that trains would read memory that nobody wrote."""
    problems = []
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        problems.append(
            "expected hidden (tokens, hidden) and weight (vocab, hidden), "
            f"given {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        problems.append(
            f"expected a target for each of {len(hidden)} positions, given {tuple(targets.shape)}: "
            "logits at t predict token t + 1, so hidden states are cut to hidden[:-1]"
        )
    for name, given, expected in (("bias", bias, weight.shape[:1]), ("weight_grad", weight_grad, weight.shape)):
        if given is not None and given.shape != expected:
            problems.append(f"expected {name} of shape {tuple(expected)}, given {tuple(given.shape)}")
    if chunk_size is not None and chunk_size < 1:
        problems.append(f"expected chunk_size of at least 1 position, given {chunk_size}")
    if problems:
        raise LossError("token_logps_from_hidden: " + "; ".join(problems))


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
    """Head, log-softmax and gather over tiles of positions, with what the backward pass needs of each tile."""

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
        learns: bool,
        weight_grad: Tensor | None,
    ) -> Tensor:
        head = Head(weight.to(hidden.dtype), bias, scale, softcap)
        needs_hidden, *needs_head = (learns and needed for needed in ctx.needs_input_grad[:3])
        trained = any(needs_head)
        logps = torch.empty(len(targets), dtype=result_dtype(hidden), device=hidden.device)
        kept = _kept(hidden, len(weight), len(targets)) if trained else None
        slopes = torch.empty_like(hidden) if needs_hidden and not trained else None
        with _Tiles(head, hidden, targets, size) as scorer:
            for tile in tiles(len(targets), size):
                logps[tile] = scorer.logps(tile)
                if slopes is not None:
                    slopes[tile] = matmul(scorer.logit_slopes(tile).to(hidden.dtype), head.weight)
                elif kept is not None and (rows := kept[tile]).shape[0]:
                    rows.copy_(scorer.logit_slopes(tile)[: len(rows)])
        ctx.save_for_backward(hidden, head.weight, bias, targets)
        ctx.kept, ctx.slopes, ctx.size, ctx.weight_grad = kept, slopes, size, weight_grad
        ctx.scale, ctx.softcap, ctx.dtypes = scale, softcap, (weight.dtype, None if bias is None else bias.dtype)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logps,) = grad_outputs
        hidden, weight, bias, targets = ctx.saved_tensors
        if ctx.slopes is not None:
            return (ctx.slopes * -grad_logps.to(hidden.dtype)[:, None], *(None,) * 8)
        gradients = _Gradients(hidden, weight, -grad_logps, ctx.needs_input_grad[:3], ctx.weight_grad)
        kept, done = ctx.kept, 0 if ctx.kept is None else len(ctx.kept)
        if done:
            gradients.add(slice(0, done), kept)
            give_back(kept)
            ctx.kept = None
        if done < len(targets):
            with _Tiles(Head(weight, bias, ctx.scale, ctx.softcap), hidden, targets, ctx.size) as scorer:
                for tile in tiles(len(targets) - done, ctx.size):
                    rest = slice(tile.start + done, min(tile.stop + done, len(targets)))
                    scorer.logps(rest)
                    gradients.add(rest, scorer.logit_slopes(rest).to(hidden.dtype))
        of_weight, of_bias = (
            None if grad is None else grad.to(dtype) for grad, dtype in zip(gradients.of_head, ctx.dtypes)
        )
        return gradients.hidden, of_weight, of_bias, *(None,) * 6


class _Tiles:
    """Logits, log-probs and slopes of one tile after another, in two buffers that all tiles share."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor, size: int) -> None:
        self.head, self.hidden, self.targets = head, hidden, targets
        shape = (min(size, len(targets)), len(head.weight))
        dtype = result_dtype(hidden)
        self._logits = borrow(shape, dtype, hidden.device)
        self._softmax = borrow(shape, dtype, hidden.device)
        self._low = None if hidden.dtype == dtype or hidden.is_cuda else borrow(shape, hidden.dtype, hidden.device)

    def __enter__(self) -> _Tiles:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in (self._logits, self._softmax, self._low):
            if buffer is not None:
                give_back(buffer)

    def logps(self, tile: slice) -> Tensor:
        """Return the log-probs (positions,) of a tile, whose logits and softmax stand in the buffers from now on."""
        hidden, targets = self.hidden[tile], self.targets[tile, None]
        logits, softmax = self._logits[: len(hidden)], self._softmax[: len(hidden)]
        self._multiply(hidden, targets, logits)
        head = self.head
        if head.bias is not None:
            logits += head.bias
        if head.scale != 1.0:
            logits *= head.scale
        if head.softcap is not None:
            torch.tanh(logits.div_(head.softcap), out=logits).mul_(head.softcap)
        torch.softmax(logits, dim=-1, out=softmax)
        probabilities = softmax.gather(1, targets).squeeze(1)
        logps, rare = probabilities.log(), probabilities <= RARE
        if not answers_at_once(logits.device) or bool(rare.any()):
            # logsumexp(z) = max z - log max p, and max p is at least 1 / vocab: nothing underflows.
            normaliser = logits.amax(-1) - softmax.amax(-1).log()
            logps = torch.where(rare, logits.gather(1, targets).squeeze(1) - normaliser, logps)
        return logps

    def _multiply(self, hidden: Tensor, targets: Tensor, logits: Tensor) -> None:
        """Write W h of a tile into `logits`."""
        weight = self.head.weight
        if self._low is None:
            logits.copy_(product(hidden, weight.t())) if hidden.is_cuda else matmul_into(logits, hidden, weight.t())
            return
        # The product answers in 16 bit here, off by up to 2^-9 of a logit: the target's own one is computed in fp32.
        logits.copy_(torch.mm(hidden, weight.t(), out=self._low[: len(hidden)]))
        exact = (hidden.float() * weight[targets.squeeze(1)].float()).sum(-1, keepdim=True)
        logits.scatter_(1, targets, exact)

    def logit_slopes(self, tile: slice) -> Tensor:
        """Return D = d(-logp) / d(W h + b) of the tile that was scored last, (positions, vocab); spends its buffers."""
        targets, head = self.targets[tile, None], self.head
        slopes = self._softmax[: len(targets)]
        slopes.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=slopes.dtype))
        if head.softcap is not None:
            logits = self._logits[: len(targets)]
            slopes *= logits.div_(head.softcap).square_().neg_().add_(1)
        if head.scale != 1.0:
            slopes *= head.scale
        return slopes


class _Gradients:
    """Gradients of hidden states and head, added up over tiles of slopes; None where none is needed."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        grad_logps: Tensor,
        needed: tuple[bool, bool, bool],
        weight_grad: Tensor | None,
    ) -> None:
        self._hidden, self._head, self._grad_logps = hidden, weight, grad_logps
        needs_hidden, self._needs_weight, self._needs_bias = needed
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self._elsewhere = weight_grad is not None
        self._weight = weight_grad
        self._bias: Tensor | None = None

    def add(self, tile: slice, slopes: Tensor) -> None:
        """Take the slopes (positions, vocab) of a tile in, in the dtype of the hidden states."""
        grad = self._grad_logps[tile, None]
        if self.hidden is not None:
            torch.mul(matmul(slopes, self._head), grad.to(slopes.dtype), out=self.hidden[tile])
        if self._needs_weight:
            scaled = (self._hidden[tile] * grad).to(slopes.dtype)
            if self._weight is None:
                self._weight = product(slopes.t(), scaled)
            else:
                _add_product(self._weight, slopes, scaled)
        if self._needs_bias:
            of_tile = slopes.t().to(grad.dtype) @ self._grad_logps[tile]
            self._bias = of_tile if self._bias is None else self._bias + of_tile

    @property
    def of_head(self) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias; not of a weight whose gradient is added elsewhere."""
        return None if self._elsewhere else self._weight, self._bias


def _add_product(total: Tensor, slopes: Tensor, scaled: Tensor) -> None:
    """Add slopes' scaled to a total; of 16-bit factors on a CPU slab by slab, without a wide copy of the product."""
    if total.dtype == slopes.dtype:
        total.addmm_(slopes.t(), scaled)
        return
    slab = max(1, SLAB_BYTES // (4 * total.shape[1])) if total.device.type == "cpu" else len(total)
    for begin in range(0, len(total), slab):
        part = slice(begin, begin + slab)
        total[part] += product(slopes[:, part].t(), scaled)


def answers_at_once(device: torch.device) -> bool:
    """Whether a look at a tensor's values waits for nothing: an accelerator is not asked."""
    return device.type == "cpu"


def _kept(hidden: Tensor, vocab: int, positions: int) -> Tensor:
    """Return room for the slopes of as many positions as `KEPT_BYTES` allow, (kept, vocab), perhaps none."""
    limit = KEPT_BYTES.get(hidden.device.type, 0) // (vocab * hidden.element_size())
    return borrow((min(positions, limit), vocab), hidden.dtype, hidden.device)
