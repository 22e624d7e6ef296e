"""Attention over the whole row in one variable-length flash call.

Keys and values are gathered, so that each completion's keys are [its prompt, itself]; flash attention aligns its
causal mask to the lower right, which is what a completion after a prompt needs, and its window counts keys, which
after the gathering are positions. The gather's gradient adds what all completions send back to their prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prefopt.attention.plan import AttentionPlan

Flash = Callable[..., Tensor]
"""(queries, keys, values, query_starts, key_starts, most_queries, most_keys, *, scale, window) -> (rows, heads, dim):
lower-right causal; `window` is how many keys before its own a query sees, -1 for all."""

LARGEST_HEAD = 256
"""Head dimension up to which flash attention is made."""
DTYPES = (torch.float16, torch.bfloat16)


def gathered_attention(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    flash: Flash | None = None,
) -> Tensor:
    """Attend in one call; shapes as in `tree_attention`, 16 bit. `flash` replaces torch's own kernel."""
    segments = plan.gathered
    queries = query[0].transpose(0, 1)
    keys, values = (tensor[0].index_select(1, segments.keys).transpose(0, 1) for tensor in (key, value))
    output = (flash or torch_flash())(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        segments.query_starts,
        segments.key_starts,
        segments.most_queries,
        segments.most_keys,
        scale=scaling,
        window=-1 if window is None else window - 1,
    )
    return output[None]


@cache
def torch_flash() -> Flash:
    """Return torch's variable-length kernel under one signature; its arguments changed between 2.10 and 2.13.

    Raises:
        ImportError: this torch has none.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    groups = "enable_gqa" in known

    def flash(
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        most_queries: int,
        most_keys: int,
        *,
        scale: float | None,
        window: int,
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scale}
        if "window_size" in known:
            options["window_size"] = (window, 0)
        else:
            options["is_causal"] = True
        if queries.shape[1] != keys.shape[1]:
            if groups:
                options["enable_gqa"] = True
            else:
                times = queries.shape[1] // keys.shape[1]
                keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
        output: Tensor = varlen_attn(
            queries, keys, values, query_starts, key_starts, most_queries, most_keys, **options
        )
        return output

    return flash


def windows_supported() -> bool:
    """Whether torch's kernel takes a sliding window."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters
