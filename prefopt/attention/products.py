"""Attention segment by segment with whole matrix products in fp32, on CPUs.

torch's fused kernel for CPUs multiplies small tiles head by head and reaches a third of the rate of large products.
Here a block of queries meets all of its keys at once, for all heads in one batched product:

    S = scale Q K' + mask,  P = softmax(S),  O = P V
    dV = P' dO,  dS = P (dO V' - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS' Q

A block's keys end with its last query, so little is computed above the diagonal. P is kept for the backward pass up to
`KEPT_KEYS` keys and computed again beyond. One pair, eight heads of 64, two cores (Zen 4), forward and back beside the
fused kernel, two rounds: 256:128 10.0 and 10.8 ms beside 11.9 and 13.1, 512:64 15.0 and 17.1 beside 19.1 and 21.9,
64:256 12.2 and 9.4 beside 13.2 and 11.1; with 1,600 keys it is slower, 117 and 104 beside 113 and 99.

A model that multiplies in bf16 attends in fp32 too; nothing is rounded but what goes in and comes out: 9.6 ms beside
the fused kernel's 12.3, 17.4 beside 21.4, 11.5 beside 14.7 (25 pairs each). Products in bf16 would gain little: every
number of keys is a new shape, and making the kernel for it takes longer than the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt.attention.plan import AttentionPlan, Segment

BLOCK = 96
"""Queries of a block. 64 to 192 differ by a tenth: fewer compute less above the diagonal, more are fewer calls."""
KEPT_KEYS = 512
"""Most keys up to a block's end whose probabilities stay in memory: 4 bytes for every head, query and key."""
MOST_KEYS = 1024
"""Most keys of a segment in a row that is computed like this."""


@dataclass(frozen=True)
class Block:
    """Some queries of a segment and the keys that one of them sees, as places in the segment."""

    queries: slice
    keys: slice
    mask: Tensor
    """(queries, columns) of 0 and -inf, added to the last columns of the scores; what is before them is seen by all."""
    kept: bool
    """Whether its probabilities stay until the backward pass."""


def product_attention(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    only_read: bool = False,
) -> Tensor:
    """Attend segment by segment; shapes as in `tree_attention`, on a CPU. The output has the values' dtype.

    With `only_read` the output is 0 where no completion's token is predicted.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    output: Tensor = _Products.apply(query, key, value, plan, scale, window, only_read, learns)
    return output


def kept_probabilities(before: int, queries: int) -> int:
    """How many probabilities of a head a segment keeps for its backward pass, at most: a window sees fewer.

    Args:
        before: keys before its first query.
        queries: its queries.
    """
    ends = [min(begin + BLOCK, queries) for begin in range(0, queries, BLOCK)]
    begun = [0, *ends[:-1]]
    return sum((end - begin) * (before + end) for begin, end in zip(begun, ends) if before + end <= KEPT_KEYS)


def blocks(plan: AttentionPlan, segment: Segment, window: int | None, *, only_read: bool = False) -> Iterator[Block]:
    """Cut the queries of a segment into blocks."""
    *prompt, count = segment.sizes
    before = sum(prompt)
    for begin in range(segment.unread if only_read else 0, count, BLOCK):
        end = min(begin + BLOCK, count)
        last = before + end
        within = window if window is not None and window < last else None
        first = 0 if within is None else max(0, before + begin + 1 - within)
        columns = end - begin if within is None else last - first
        mask = plan.added_mask(end - begin, columns, within, torch.float32)
        yield Block(slice(begin, end), slice(first, last), mask, kept=last <= KEPT_KEYS)


class _Products(torch.autograd.Function):
    """The whole row in one node of the graph, with nothing cut or joined around it."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        scale: float,
        window: int | None,
        only_read: bool,
        learns: bool,
    ) -> Tensor:
        heads, width = query.shape[1], value.shape[3]
        output = value.new_zeros(1, query.shape[2], heads, width)
        wide = torch.promote_types(value.dtype, torch.float32)
        scaled, every_key, every_value = query.to(wide) * scale, key.to(wide), value.to(wide)
        kept = []
        for segment in plan.segments:
            queries = scaled[0, :, segment.rows]
            keys, values = _joined(every_key, segment), _joined(every_value, segment)
            for block in blocks(plan, segment, window, only_read=only_read):
                asking = _grouped(queries[:, block.queries], keys)
                weights = _probabilities(asking, keys[:, block.keys], block.mask)
                found = torch.bmm(weights, values[:, block.keys]).view(heads, -1, width)
                output[0, segment.rows][block.queries] = found.transpose(0, 1)
                if learns and block.kept:
                    kept.append(weights)
        ctx.save_for_backward(scaled, key, value, output, *kept)
        ctx.dtype, ctx.plan, ctx.scale, ctx.window, ctx.only_read = query.dtype, plan, scale, window, only_read
        return output

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, key, value, output, *kept = ctx.saved_tensors
        waiting = iter(kept)
        heads, width = scaled.shape[1], scaled.shape[3]
        grad, every_key, every_value = (each.to(scaled.dtype) for each in (grad, key, value))
        answered = (grad * output).sum(-1)[0].t()  # (heads, tokens)
        of_query, of_key, of_value = (torch.zeros_like(each) for each in (scaled, every_key, every_value))
        for segment in ctx.plan.segments:
            rows = segment.rows
            queries, keys, values = scaled[0, :, rows], _joined(every_key, segment), _joined(every_value, segment)
            of_keys, of_values = _joined(of_key, segment), _joined(of_value, segment)
            for block in blocks(ctx.plan, segment, ctx.window, only_read=ctx.only_read):
                asking, seen = _grouped(queries[:, block.queries], keys), keys[:, block.keys]
                weights = next(waiting) if block.kept else _probabilities(asking, seen, block.mask)
                slopes = _grouped(grad[0, rows][block.queries].transpose(0, 1), keys)
                of_values[:, block.keys].baddbmm_(weights.transpose(1, 2), slopes)
                of_scores = torch.bmm(slopes, values[:, block.keys].transpose(1, 2))
                of_scores.sub_(answered[:, rows][:, block.queries].reshape(len(keys), -1, 1)).mul_(weights)
                of_keys[:, block.keys].baddbmm_(of_scores.transpose(1, 2), asking)
                of_query[0, :, rows][:, block.queries] = torch.bmm(of_scores, seen).view(heads, -1, width)
            _put_back(of_key, segment, of_keys)
            _put_back(of_value, segment, of_values)
        of_query.mul_(ctx.scale)
        return of_query.to(ctx.dtype), of_key.to(key.dtype), of_value.to(value.dtype), *(None,) * 5


def _joined(tensor: Tensor, segment: Segment) -> Tensor:
    """(key_heads, keys, size) of what a segment's queries see: a view where it lies together, else a copy."""
    pieces = [tensor[0, :, rows] for rows in segment.keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _put_back(whole: Tensor, segment: Segment, joined: Tensor) -> None:
    """Write into the row what was added to a copy of some of it."""
    if len(segment.keys) > 1:
        for rows, piece in zip(segment.keys, joined.split(segment.sizes, dim=1), strict=True):
            whole[0, :, rows] = piece


def _grouped(rows: Tensor, keys: Tensor) -> Tensor:
    """(heads, rows, size) -> (key_heads, heads / key_heads * rows, size): what meets the same keys in one product."""
    return rows.reshape(len(keys), -1, rows.shape[2])


def _probabilities(asking: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
    """(key_heads, asking, seen) of scaled queries and their keys."""
    scores = torch.bmm(asking, seen.transpose(1, 2))
    by_head = scores.view(len(scores), -1, len(mask), scores.shape[2])
    by_head[..., -mask.shape[1] :] += mask
    return torch.softmax(scores, dim=-1, out=scores)
