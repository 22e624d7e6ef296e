"""Attention over prompt trees, registered with transformers under one name.

Every layer calls `tree_attention` with the whole row. For each tree it runs the prompt with its first completion
as one causal sequence, and every further completion against [prompt, that completion]. The mask of the latter is
aligned to the lower right (SDPA's own ``is_causal`` is aligned to the upper left), and a sliding window counts
positions, which restart after the prompt, not row indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from prefopt.batching import Tree

NAME = "prefopt_tree"
"""The attention implementation's name in transformers' registry."""

ARGUMENT = "prefopt_plan"
"""The keyword under which a plan travels through the model to every attention call."""


class AttentionPlan:
    """Segments and masks of one batch, made once and used by every layer.

    Attributes:
        sizes: rows of each segment; one after another they are the whole row.
        shared: per segment (number of the segment that begins with its prompt, prompt length). The keys are the
            prompt (unless its length is 0: the segment then begins with it) followed by the segment's own rows.
        calls: how often a layer asked for attention; the start-up guard compares it with the layers.
    """

    def __init__(self, trees: tuple[Tree, ...], device: torch.device) -> None:
        self.device = device
        self.calls = 0
        self.sizes: list[int] = []
        self.shared: list[tuple[int, int]] = []
        for tree in trees:
            (begin, count), *others = tree.branches
            root = len(self.sizes)
            self.sizes += [begin + count - tree.start, *(count for _, count in others if count)]
            self.shared += [(root, 0), *((root, tree.prompt) for _, count in others if count)]
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._added: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Boolean (queries, keys) mask, lower-right causal, within the window; True attends."""
        key = (queries, keys, window)
        if key not in self._masks:
            query_position = torch.arange(keys - queries, keys, device=self.device)[:, None]
            key_position = torch.arange(keys, device=self.device)[None, :]
            mask = key_position <= query_position
            if window is not None:
                mask &= key_position > query_position - window
            self._masks[key] = mask
        return self._masks[key]

    def added_mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the same mask as a term of the scores, 0 or -inf: what SDPA would make of it in every layer."""
        key = (queries, keys, window, dtype)
        if key not in self._added:
            hidden = ~self.mask(queries, keys, window)
            self._added[key] = torch.zeros(queries, keys, dtype=dtype, device=self.device).masked_fill_(
                hidden, float("-inf")
            )
        return self._added[key]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each prompt tree of the row.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head_dim).
        key: (1, key_heads, tokens, head_dim).
        value: (1, key_heads, tokens, value_dim).
        attention_mask: ignored; the plan says who sees whom.
        dropout: probability; a shared prompt would share its dropout mask, so models are loaded without.
        scaling: factor on the scores; None is 1 / sqrt(head_dim).
        sliding_window: positions a query sees, itself included; None for full attention.
        softcap: Gemma 2's cap on the scores.
        **kwargs: the plan under `ARGUMENT`; gpt-oss' attention sinks under ``s_aux``.

    Returns:
        ((1, tokens, heads, value_dim), None), what transformers expects of an attention function.
    """
    plan: AttentionPlan = kwargs[ARGUMENT]
    plan.calls += 1
    sinks = kwargs.get("s_aux")
    parts = []
    # Split, not sliced: the gradient of a slice is a whole row of zeros, for each segment and layer.
    pieces = zip(*(tensor.split(plan.sizes, dim=2) for tensor in (query, key, value)))
    roots: list[tuple[Tensor, Tensor]] = []
    for (queries, keys, values), (root, shared) in zip(pieces, plan.shared):
        roots.append((keys, values))
        if shared:
            keys, values = (
                torch.cat((first[:, :, :shared], own), dim=2) for first, own in zip(roots[root], (keys, values))
            )
        length = keys.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < length else None
        causal = window is None and not shared
        if softcap is None and sinks is None:
            mask = None if causal else plan.added_mask(queries.shape[2], length, window, query.dtype)
            parts.append(
                F.scaled_dot_product_attention(
                    queries,
                    keys,
                    values,
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=causal,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        else:
            mask = plan.mask(queries.shape[2], length, window)
            parts.append(_plain_attention(queries, keys, values, mask, dropout, scaling, softcap, sinks))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


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


AttentionInterface.register(NAME, tree_attention)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the model with another attention implementation, and restore its own afterwards."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
