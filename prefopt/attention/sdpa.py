"""Attention segment by segment with torch's scaled dot product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.attention.plan import AttentionPlan


def segment_attention(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend segment by segment; shapes as in `tree_attention`, any device and dtype."""
    parts = []
    # Split, not sliced: the gradient of a slice is a whole row of zeros, for each segment and layer.
    pieces = zip(*(tensor.split(plan.sizes, dim=2) for tensor in (query, key, value)), strict=True)
    for (queries, keys, values), segment in zip(pieces, plan.segments, strict=True):
        if segment.prompt is None:
            root = (keys, values)
        else:
            shared = segment.sizes[0]
            keys, values = (
                torch.cat((first[:, :, :shared], own), dim=2) for first, own in zip(root, (keys, values), strict=True)
            )
        length = keys.shape[2]
        within = window if window is not None and window < length else None
        if softcap is not None or sinks is not None:
            mask = plan.mask(queries.shape[2], length, within)
            parts.append(_plain_attention(queries, keys, values, mask, dropout, scaling, softcap, sinks))
            continue
        causal = within is None and segment.prompt is None
        parts.append(
            F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=None if causal else plan.added_mask(queries.shape[2], length, within, query.dtype),
                dropout_p=dropout,
                is_causal=causal,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a soft-cap or sinks, which SDPA does not know; scores in fp32."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).float().expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = F.dropout(weights.to(value.dtype), dropout)
    return weights @ value
