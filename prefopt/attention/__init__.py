"""Attention over prompt trees: one function registered with transformers, with a back end per device.

    sdpa      one call of torch's scaled dot product per segment: everywhere, and what all others fall back to
    products  whole matrix products per block of queries: CPUs (16 bit too, but on AMX), without soft-caps and sinks
    varlen    keys and values gathered, then one variable-length flash call for the whole row: accelerators, 16 bit
    flex      FlexAttention over the whole row with a block mask: accelerators, where flash lacks soft-caps or sinks

`prefopt.layout` holds every back end against the model's plain logits before it is used.
"""

from prefopt.attention.plan import AttentionPlan, Backend
from prefopt.attention.registered import ARGUMENT, NAME, ONLY_READ, attention, tree_attention

__all__ = ["ARGUMENT", "NAME", "ONLY_READ", "AttentionPlan", "Backend", "attention", "tree_attention"]
