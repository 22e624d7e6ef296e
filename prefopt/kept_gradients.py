"""The gradients of head and embedding: two blocks of vocabulary x hidden that stay in memory and are added to there.

Autograd makes the head's and the embedding's (zeros but for the rows of the tokens that occur) anew in every
micro-batch, and adds them. The C library returns blocks of 32 MiB and more as soon as they are free, so each one is
faulted in again: with 32,000 x 512 tied numbers in fp32 (65 MB), a bf16 step of four pairs took 1.62 s on two cores,
and 1.24 s with gradients that stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel


def keeps_gradients(*, device: str, processes: int) -> bool:
    """Whether head and embedding keep their gradients.

    Not on accelerators, whose allocators return nothing; nor among several processes, which exchange gradients as
    autograd delivers them.
    """
    return device == "cpu" and processes == 1


class KeptGradients:
    """Gives the head's and the embedding's weights of a model gradients that are there before the backward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        layers = kept_layers(model)
        for layer in layers:
            if isinstance(layer, nn.Embedding):
                layer.__class__ = _adding(type(layer))
        self._gradients = {layer.weight: torch.zeros_like(layer.weight) for layer in layers}
        self.reset()

    def reset(self) -> None:
        """Set them to zero, and put them where `zero_grad` took them from."""
        for weight, gradient in self._gradients.items():
            weight.grad = gradient.zero_()

    def of(self, weight: Tensor) -> Tensor | None:
        """Return the gradient of a weight, if it is one of those kept and in its place."""
        return weight.grad if isinstance(weight, nn.Parameter) and weight in self._gradients else None


def kept_layers(model: PreTrainedModel) -> list[nn.Linear | nn.Embedding]:
    """Return the head and the embedding of a model, each where it is plain and trains in fp32.

    An embedding that scales what torch's looks up (Gemma) is plain enough.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    own = [head] if type(head) is nn.Linear else []
    if isinstance(embedding, nn.Embedding) and not (
        embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm
    ):
        own.append(embedding)
    return [layer for layer in own if layer.weight.requires_grad and layer.weight.dtype == torch.float32]


def _adding(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    """Return a kind of embedding that looks up by `AddingEmbedding`, whatever else it does."""
    return AddingEmbedding if kind is nn.Embedding else type(kind.__name__, (kind, AddingEmbedding), {})


class AddingEmbedding(nn.Embedding):
    """An embedding that adds to the rows of ``weight.grad``, where there is one, unseen by hooks of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings of token ids; shape (..., hidden)."""
        if not torch.is_grad_enabled() or not self.weight.requires_grad or self.weight.grad is None:
            return super().forward(input)
        output: Tensor = _AddedRows.apply(self.weight, input, self.padding_idx)
        return output


class _AddedRows(torch.autograd.Function):
    """Rows of a weight; their gradient is added to `weight.grad`, and autograd gets none."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        flat, rows = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if ctx.padding is not None:  # torch's embedding gives it no gradient either
            rows = rows * (flat != ctx.padding)[:, None]
        ctx.weight.grad.index_add_(0, flat, rows.to(ctx.weight.dtype))
        return None, None, None
