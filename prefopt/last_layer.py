"""The last decoder layer's MLP, over the positions that are read.

After the last attention no position sees another, and log-probs read only the positions that predict a completion's
token: what the MLP there makes of a prompt is thrown away, forward and backward. So the positions that are read are
gathered before it and put back among zeros after it, and the norms and sums around it still find a whole row.
Log-probs and gradients are those of the whole row.

Saved is the MLP's part of one layer for every prompt: of four prompts of 256 and pairs of 128 tokens, 4 % of the
products of a model of 8 layers, 1 % of one of 32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefopt.activations import decoder_layers
from prefopt.attention import ARGUMENT, AttentionPlan


def read_only_what_predicts(model: nn.Module) -> None:
    """Let a model's last layer compute its MLP for the positions that a row's plan says are read.

    A row without a plan is computed whole, and so is a layer of which it is not plain what its attention is.
    """
    layers = decoder_layers(model)
    attention, others = parts_that_multiply(layers[-1]) if layers else ([], [])
    if len(attention) == 1:
        _LastLayer(layers[-1], attention[0], others)


def parts_that_multiply(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the parts of a layer that hold matrices: those that are attention by their name, and the others."""
    attention: list[nn.Module] = []
    others: list[nn.Module] = []
    for name, part in layer.named_children():
        if any(weight.ndim > 1 for weight in part.parameters()):
            (attention if "attn" in name or "attention" in name else others).append(part)
    return attention, others


class _LastLayer:
    """Hooks on a layer's attention and MLP, and between them the plan of the row that is in the layer.

    Where layers are recomputed, transformers runs only what is inside the layer again; so the attention says anew
    which row it is, and the layer's end forgets it.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, others: list[nn.Module]) -> None:
        self._plan: AttentionPlan | None = None
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)
        layer.register_forward_hook(self._leave, always_call=True)
        for part in others:
            part.register_forward_pre_hook(self._gather)
            part.register_forward_hook(self._put_back)

    def _enter(self, attention: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # another program for every number of rows read: computed whole
            return
        plan = named.get(ARGUMENT)
        self._plan = plan if plan is not None and len(plan.read) < plan.tokens else None

    def _leave(self, layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._plan = None

    def _gather(self, part: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        plan = self._plan
        if plan is None or not given or not _is_row(given[0], plan.tokens):
            return None
        return (given[0].index_select(1, plan.read), *given[1:])

    def _put_back(self, part: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        plan = self._plan
        several = isinstance(output, tuple)  # experts may give their router's scores beside
        first = output[0] if several else output
        if plan is None or not given or not _is_row(given[0], len(plan.read)) or not _is_row(first, len(plan.read)):
            return None
        whole = first.new_zeros(1, plan.tokens, first.shape[2]).index_copy(1, plan.read, first)
        return (whole, *output[1:]) if several else whole


def _is_row(tensor: Any, tokens: int) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.shape[:2] == (1, tokens)
