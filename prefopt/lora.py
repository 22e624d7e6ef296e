"""peft's LoRA of a linear layer, with fewer passes over memory.

    y = x W' + scale (x A') B'

peft computes the product with B, a scaled copy of it and its sum with the base's output as three tensors of the
output's size, and more on the way back. Here a product is added where it belongs by the matrix product itself.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt.linear_layers import is_plain
from prefopt.shared_casts import cast_once
from prefopt_losses.products import linear, matmul


class LoraLinear(Linear):
    """A linear layer and one adapter in one product; whatever else peft can do stays peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output; shape (..., out)."""
        name = self._alone()
        if name is None or args or kwargs or torch.compiler.is_compiling():
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        output: Tensor = _LoraProduct.apply(
            cast_once(x), self.base_layer.weight, self.base_layer.bias, down, up, self.scaling[name]
        )
        return output

    def _alone(self) -> str | None:
        """Return the adapter's name where it is a plain LoRA that acts alone on a plain frozen layer."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        dropout, base = self.lora_dropout[name], self.base_layer
        drops = self.training and getattr(dropout, "p", 0.0) > 0
        plain = is_plain(base) and not any(weight.requires_grad for weight in base.parameters())
        held = {self.lora_A[name].weight.dtype, self.lora_B[name].weight.dtype}
        if plain and not torch.is_autocast_enabled(base.weight.device.type):  # which gives everything one dtype
            held.add(base.weight.dtype)
        return name if plain and len(held) == 1 and not drops and not self.fan_in_fan_out else None


def fuse_adapters(model: nn.Module) -> None:
    """Let every plain LoRA layer of a model compute in one product; its weights and names stay."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear


def hold_bases_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen matrices under a model's adapters in the dtype that autocast multiplies them in.

    Products are what they were: autocast would make the same numbers of them in every pass, forward and back.
    """
    for module in model.modules():
        if isinstance(module, LoraLinear) and is_plain(module.base_layer):
            weight = module.base_layer.weight
            if not weight.requires_grad:  # a new one, for the old one can be an embedding too
                module.base_layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    for parameter in model.parameters():  # what was read from a mapped file would hold all of the file in memory
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


class _LoraProduct(torch.autograd.Function):
    """The layer's output, and the gradients of its input and of the adapter; the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            inner = rows @ down.to(dtype).T
            output = linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
            output.addmm_(inner, up.to(dtype).T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.shape, ctx.dtype, ctx.scale = x.shape, x.dtype, scale
        return output.reshape(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, down, up = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
            of_inner = (grad @ up.to(grad.dtype)).mul_(ctx.scale)
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = matmul(grad, weight.to(grad.dtype)).addmm_(of_inner, down.to(grad.dtype))
                of_x = of_x.reshape(ctx.shape).to(ctx.dtype)
            of_down = (of_inner.T @ rows).to(down.dtype)
            of_up = (grad.T @ inner).mul_(ctx.scale).to(up.dtype)
        return of_x, None, None, of_down, of_up, None
