"""Linear layers whose weight's gradient is added up by the matrix product that makes it.

    G += (d loss / d y)' x

From a step's second micro-batch on, autograd makes a tensor of the weight's size and adds it to the sum that is
there. Here the product writes into the sum: on two cores with avx2 a weight of 1,408 x 512 took 8.4 ms over 700 tokens
that way, 8.6 ms with a sum of its own, and 8.3 ms as a product alone, all in memory that was there. Over a handful of
tokens it is no gain (11 ms a layer against 9).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt.activations import decoder_layers
from prefopt.recipe import TrainRecipe


def adds_in_place(settings: TrainRecipe, *, device: str, processes: int) -> bool:
    """Whether gradients of linear layers are added in place.

    Not on accelerators, where it has not been measured; nor among several processes, which exchange gradients as
    autograd delivers them; nor in compiled layers, which make their own backward pass.
    """
    return device == "cpu" and processes == 1 and not settings.compile


def adding_layers(model: nn.Module) -> list[nn.Linear]:
    """The trained linear layers of a decoder that can add their gradients in place: torch's own, nothing derived."""
    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    return [each for each in modules if type(each) in (nn.Linear, AddingLinear) and each.weight.requires_grad]


def add_in_place(model: nn.Module) -> None:
    """Let every trained linear layer of a decoder add its gradient in place; its weights and names stay."""
    for layer in adding_layers(model):
        layer.__class__ = AddingLinear


class AddingLinear(nn.Linear):
    """A linear layer that adds to ``weight.grad`` where there is one, unseen by hooks of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; shape (..., out)."""
        if not torch.is_grad_enabled() or not self.weight.requires_grad:
            return super().forward(x)
        output: Tensor = _AddingProduct.apply(x, self.weight, self.bias)
        return output


class _AddingProduct(torch.autograd.Function):
    """The layer's output; the gradients of input and bias, and that of the weight where none is there yet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            output = nn.functional.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        ctx.save_for_backward(rows, weight, bias)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return output.reshape(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
            if ctx.needs_input_grad[0]:
                of_x = (grad @ weight.to(grad.dtype)).reshape(ctx.shape).to(ctx.dtype)
            if weight.grad is None:
                of_weight = (grad.T @ rows).to(weight.dtype)
            elif weight.grad.dtype == grad.dtype:
                weight.grad.addmm_(grad.T, rows)
            else:
                weight.grad += grad.T @ rows
            if bias is not None and ctx.needs_input_grad[2]:
                of_bias = grad.sum(0).to(bias.dtype)
        return of_x, of_weight, of_bias
