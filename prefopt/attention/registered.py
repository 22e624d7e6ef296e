"""The one attention function that models call, under one name in transformers' registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from prefopt.attention.flex import block_attention
from prefopt.attention.plan import AttentionPlan
from prefopt.attention.products import MOST_KEYS, product_attention
from prefopt.attention.sdpa import segment_attention
from prefopt.attention.varlen import DTYPES, gathered_attention

NAME = "prefopt_tree"
"""The attention implementation's name in transformers' registry."""

ARGUMENT = "prefopt_plan"
"""The keyword under which a plan travels through the model to every attention call."""

ONLY_READ = "prefopt_only_read"
"""The keyword that says of a call that no completion's log-prob depends on what it gives for the rest of a prompt."""


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
    """Attend within each prompt tree of the row, by the plan's back end.

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
        **kwargs: the plan under `ARGUMENT`; gpt-oss' attention sinks under ``s_aux``; under `ONLY_READ` whether rows
            that predict no completion's token may be anything.

    Returns:
        ((1, tokens, heads, value_dim), None), what transformers expects of an attention function.
    """
    if ARGUMENT not in kwargs:
        raise NotImplementedError("its layers do not hand the model's keyword arguments on to their attention")
    plan: AttentionPlan = kwargs[ARGUMENT]
    plan.calls += 1
    plan.windows.add(sliding_window)
    sinks = kwargs.get("s_aux")
    unusual = softcap is not None or sinks is not None or bool(dropout)
    # Flash attention is made for 16 bit: a model that is scored in fp32 for once goes segment by segment.
    if plan.backend == "varlen" and query.dtype in DTYPES and not unusual:
        return gathered_attention(plan, query, key, value, scaling=scaling, window=sliding_window), None
    if plan.backend == "flex" and not dropout:
        output = block_attention(
            plan, query, key, value, scaling=scaling, window=sliding_window, softcap=softcap, sinks=sinks
        )
        return output, None
    if plan.backend == "products" and not unusual and plan.most_keys <= MOST_KEYS:
        output = product_attention(
            plan, query, key, value, scaling=scaling, window=sliding_window, only_read=kwargs.get(ONLY_READ, False)
        )
        return output, None
    output = segment_attention(
        plan, query, key, value,
        dropout=dropout, scaling=scaling, window=sliding_window, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    return output, None


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
