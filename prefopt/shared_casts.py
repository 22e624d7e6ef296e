"""One 16-bit copy of what several linear layers read.

Queries, keys and values read the output of one norm, the two branches of a gated MLP that of another. Under autocast
each of these layers casts its input and keeps its own copy for the backward pass: five copies of two tensors in a
Llama's layer, of which three are spared here, 6 bytes for each of a token's hidden numbers. Values and gradients are
those of autocast to the bit: every reader's gradient goes back to fp32 before they are added.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt.linear_layers import is_plain

Copy = tuple["weakref.ref[Tensor]", int, "weakref.ref[Tensor]"]


class _Last:
    """The input that was cast last, its version, and its copy; none of them is kept alive."""

    copy: Copy | None = None


def share_casts(layers: Iterable[nn.Module]) -> None:
    """Let the plain linear layers in each of a decoder's layers share the casts of their inputs."""
    for layer in layers:
        for module in layer.modules():
            if is_plain(module) and _before not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_before)


def _before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (cast_once(inputs[0]), *inputs[1:]) if inputs else None


def cast_once(x: Tensor) -> Tensor:
    """Return what autocast would multiply: `x`, or a copy in 16 bit, the one that was made before where it lives still.

    A copy lives as long as a layer keeps it for its backward pass. Without gradients, where nothing is kept, and in
    compiled layers, which fuse their casts, `x` itself is returned.
    """
    device = x.device.type
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
        return x
    if x.dtype != torch.float32 or x.is_inference():
        return x
    dtype = torch.get_autocast_dtype(device)
    made = _made_before(x, dtype)
    copy: Tensor = _Cast.apply(x, dtype, made)
    if made is None:
        _Last.copy = weakref.ref(x), x._version, weakref.ref(copy)
    return copy


def _made_before(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    if _Last.copy is None:
        return None
    of, version, copy = _Last.copy
    made = copy()
    current = version == x._version and of() is x
    return made if current and made is not None and made.dtype == dtype else None


class _Cast(torch.autograd.Function):
    """A tensor in another dtype, by a copy that exists or a new one; its gradient in the dtype it had."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, made: Tensor | None) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(dtype) if made is None else made.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None
