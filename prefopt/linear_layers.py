"""Linear layers that multiply in fp32 as `prefopt_losses.products` does: by the faster library of this CPU.

    y = x W' + b,   dx = dy W,   dW = dy' x,   db = sum dy

Under autocast, in other dtypes, on accelerators and in compiled layers they are torch's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt_losses.products import linear, matmul, onednn_is_faster


class FastLinear(nn.Linear):
    """A linear layer whose fp32 products are `matmul`'s."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output; shape (..., out)."""
        plain = input.dtype == self.weight.dtype == torch.float32 and input.device.type == "cpu"
        if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(input)
        output: Tensor = _Linear.apply(input, self.weight, self.bias)
        return output


def multiply_faster(layers: Iterable[nn.Module]) -> None:
    """Make the plain linear layers in a decoder's layers `FastLinear`s where that is faster; weights and names stay."""
    if not onednn_is_faster():
        return
    for layer in layers:
        for module in layer.modules():
            if type(module) is nn.Linear:
                module.__class__ = FastLinear


def is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's linear layer and nothing more."""
    return type(module) in (nn.Linear, FastLinear)


class _Linear(torch.autograd.Function):
    """x W' + b over the rows of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_weight else None, weight if needs_x else None)
        ctx.shape = x.shape
        return linear(rows, weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        of_x = matmul(grad, weight).view(ctx.shape) if needs_x else None
        of_weight = grad.t() @ rows if needs_weight else None
        return of_x, of_weight, grad.sum(0) if needs_bias else None
