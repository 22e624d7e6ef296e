"""Attention over the whole row with FlexAttention and a block mask: nothing is gathered, empty blocks are skipped."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from prefopt.attention.plan import AttentionPlan


def block_attention(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend in one call; shapes as in `tree_attention`."""
    from torch.nn.attention.flex_attention import AuxRequest

    def capped(score: Tensor, batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output, aux = _flex(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=plan.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        # A sink is one more key that takes a share of the softmax and gives nothing.
        share = torch.sigmoid(aux.lse - sinks.reshape(1, -1, 1).to(aux.lse.dtype))
        output = output * share[..., None].to(output.dtype)
    return output.transpose(1, 2).contiguous()


@cache
def _flex(compiled: bool) -> Any:
    """Return FlexAttention; on an accelerator compiled once, for rows of any length."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
