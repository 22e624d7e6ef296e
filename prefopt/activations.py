"""What a decoder keeps of every token for its backward pass: bytes, counted from its shape.

Counted are the tensors that autograd saves when transformers' own layers run eagerly, each storage once. Per token and
layer, with h the hidden size, d and k the widths of all queries and of all keys, m the width inside the MLP, and w the
bytes of the compute dtype:

    norm            its input, its normalised input and its output: 12 h in fp32; under autocast the first two are fp32
                    (8 h), and the layers that read the output share a cast (`prefopt.shared_casts`) before attention
                    and MLP, 2 h each; 8 h with 16-bit weights. An RMS norm (`prefopt.lean_layers`) not the second: 8 h,
                    4 h and 4 h
    attention       w (3 d + 4 k): queries, keys, values, the output of every segment and all of them joined; keys and
                    values of a prompt once more for its further completions
    scores          only where they are held (soft-caps and sinks, off the fused kernels): 2 copies in fp32, one in w
    products        (the attention back end) w (2 d + 2 k), 3 of each where one matrix makes queries, keys and values;
                    with 16 bits 2 d more, for queries are fp32, and under autocast 2 k, for rotated keys are;
                    and 4 bytes per head for each probability that stays
    MLP             4 w m with a gate (gate, its activation, the other branch, their product), 3 w m where the
                    activation is computed again (`prefopt.lean_layers`); 5 w m without; 6 w m with experts, which
                    autocast leaves in fp32
    adapter         nothing more, but where it is fp32 on 16-bit layers: an fp32 copy of what every adapted layer reads

The last layer's MLP keeps less, only what is read: that is left out, for with many layers it is little.

A test holds these figures against what the hooks of autograd see: 0.95 to 1.2 of it for dense decoders that compute
whole rows, up to 1.4 with an adapter, whose frozen base keeps less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefopt.attention.choice import has_sinks
from prefopt.lean_layers import looks_gated, looks_like_a_norm

FUSED_INPUTS = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
"""Linear layers that make queries, keys and values at once."""


@dataclass(frozen=True)
class DecoderShape:
    """The widths of a decoder, as far as they decide what it keeps of a token."""

    layers: int
    hidden: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together."""
    inner: int
    """Width inside the MLP; with experts, of all that a token visits."""
    gated: bool
    norms: int = 2
    """Norms of one layer over the hidden state."""
    head_norms: bool = False
    """Whether queries and keys are normalised too."""
    heads: int = 1
    scores: bool = False
    """Whether attention scores are held: by soft-caps and sinks, which the fused kernels do not know."""
    experts: bool = False
    fused: bool = False
    """Whether queries, keys and values are views of one tensor, which stays as long as one of them."""
    lean_norms: bool = False
    """Whether norms keep their input only."""
    lean_gate: bool = False
    """Whether the gate's activation is computed again."""
    adapted: int = 0
    """Inputs of one layer's linear layers that have an fp32 adapter, together."""


def shape_of(model: nn.Module) -> DecoderShape:
    """Read the shape off a transformers model: widths from its configuration, the rest from one of its layers."""
    config = model.config.get_text_config()
    layers = decoder_layers(model) or [nn.Identity()]
    # Layers without attention (state space) are counted as if they had it: their own figures are of that size.
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 1
    width, layer = getattr(config, "head_dim", None) or hidden // heads, layers[0]
    names = [name.rsplit(".", 1)[-1] for name, _ in layer.named_modules()]
    norms = [name for name in names if "norm" in name or name.startswith("ln_")]
    of_heads = [name for name in norms if name.startswith(("q_norm", "k_norm"))]
    return DecoderShape(
        layers=len(layers),
        hidden=hidden,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        inner=_inner_width(config),
        gated=any(name in ("gate_proj", "gate_up_proj", "experts") for name in names),
        norms=max(2, len(norms) - len(of_heads)),
        head_norms=bool(of_heads),
        heads=heads,
        scores=has_sinks(model) or getattr(config, "attn_logit_softcapping", None) is not None,
        experts=bool(getattr(config, "num_experts_per_tok", None)),
        fused=any(name in FUSED_INPUTS for name in names),
        lean_norms=any(looks_like_a_norm(module) for module in layer.modules()),
        lean_gate=any(looks_gated(module) for module in layer.modules()),
        adapted=sum(
            p.shape[1] for name, p in layer.named_parameters() if ".lora_A." in name and p.dtype == torch.float32
        ),
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder: its longest list of modules with parts, lists inside layers apart; or nothing."""
    stacks: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():  # from the outside in
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and any(module[0].children()) and not inside:
            stacks[name] = list(module)
    return max(stacks.values(), key=len, default=[])


def layer_bytes(
    shape: DecoderShape, precision: str, *, context: float = 0.0, probabilities: float | None = None
) -> float:
    """Bytes that one layer keeps of one token.

    Args:
        shape: the decoder's.
        precision: as in `train.precision`.
        context: tokens of a token's row, on average, for scores that are held.
        probabilities: with `prefopt.attention.products`, those of a head that stay, per token; None with another.
    """
    wide = 4 if precision == "fp32" else 2
    norm = {"fp32": 8, "bf16": 4, "bf16-pure": 4} if shape.lean_norms else {"fp32": 12, "bf16": 8, "bf16-pure": 8}
    normed = shape.norms * shape.hidden + (shape.queries + shape.keys) * shape.head_norms
    casts = 2 * 2 * shape.hidden if precision == "bf16" else 0
    attention = wide * (3 * shape.queries + 4 * shape.keys)
    scores = (8 + wide * (wide == 2)) * shape.heads * context if shape.scores else 0.0
    if probabilities is not None:
        attention = wide * (2 + shape.fused) * (shape.queries + shape.keys)
        attention += 2 * shape.queries * (precision != "fp32") + 2 * shape.keys * (precision == "bf16")
        scores = 4 * shape.heads * probabilities
    mlp = wide * shape.inner * (3 if shape.lean_gate else 4 if shape.gated else 5)
    if shape.experts:
        mlp = (2 if precision == "bf16-pure" else 4) * 6 * shape.inner
    copies = 4 * shape.adapted if precision == "bf16-pure" else 0
    return norm[precision] * normed + casts + attention + scores + mlp + copies


def activation_bytes(
    shape: DecoderShape,
    precision: str,
    *,
    recomputed: bool,
    context: float = 0.0,
    probabilities: float | None = None,
) -> float:
    """Bytes of activations per computed token: what the whole decoder keeps.

    Recomputed activations are one hidden state per layer, and one layer's full ones while it is differentiated.
    """
    layer = layer_bytes(shape, precision, context=context, probabilities=probabilities)
    state = shape.hidden * (2 if precision == "bf16-pure" else 4)
    around = 3 * 4 * shape.hidden + state  # the last norm and the embedding
    return around + (shape.layers * state + layer if recomputed else shape.layers * layer)


def _widest(width: Any) -> Any:
    """The widest of layers that differ (Gemma 3n)."""
    return max(width) if isinstance(width, list | tuple) else width


def _inner_width(config: Any) -> int:
    width = (
        _widest(getattr(config, "intermediate_size", None))
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size
    )
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        return int(width)
    return int(experts * (getattr(config, "moe_intermediate_size", None) or width))
