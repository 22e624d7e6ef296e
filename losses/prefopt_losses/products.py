"""Matrix products with fp32 results, by whichever library is the faster one on this CPU.

torch leaves fp32 products on CPUs to MKL, which uses 512-bit instructions on Intel's CPUs only. oneDNN, which torch has
for 16 bit, uses them on AMD's too, and it copies less of the right factor where there are few rows. Zen 4, two cores,
all products of 8 layers (512 x 1408), MKL and oneDNN in turn, 12 rounds, medians in GF/s:

    rows            512            576            768           1152
    forward     161 and 195    165 and 192    181 and 197    175 and 191
    backward    171 and 198    173 and 190    183 and 197    182 and 194

and a head of 32,000 x 512 over 384 positions 151 and 203, back 181 and 198. A factor that is transposed in memory on
the left, as for the gradient of a weight, is MKL's: 175 and 157. A kernel for a new number of rows is made in half a
millisecond to one, which a small product does not earn.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

FEWEST_ROWS = 64
"""Of a left factor that oneDNN gets: text is written row by row."""
LEAST_WEIGHT = 2**18
"""Numbers in a right factor that oneDNN gets."""
SLAB = 4096
"""Columns that are multiplied at a time where the result goes into memory that is there: they wait in the cache."""


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product of two matrices in their dtype."""
    return _by_onednn(left, right) if _takes_onednn(left, right) else left @ right


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows W' + b: (rows, in), (out, in), (out,) -> (rows, out) in their dtype."""
    if _takes_onednn(rows, weight.t()):
        return _by_onednn(rows, weight.t(), bias)
    return nn.functional.linear(rows, weight, bias)


def matmul_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write the matrix product of two matrices of one dtype into `out`."""
    if not _takes_onednn(left, right):
        torch.mm(left, right, out=out)
        return
    columns = right.shape[1]
    width = -(-columns // -(-columns // SLAB))
    for begin in range(0, columns, width):
        part = slice(begin, begin + width)
        out[:, part] = _by_onednn(left, right[:, part])


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product with an fp32 result, or fp64 of fp64; accumulated and kept in fp32 where the device can."""
    if left.dtype == torch.float32 or left.dtype == torch.float64:
        return matmul(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products are oneDNN's on this machine: an AMD CPU with AVX-512 and a torch with MKL."""
    able = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not able or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    return bool(torch.cpu.get_capabilities().get("sse4a", False))  # instructions that AMD alone ever made


def _takes_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies these: plain fp32 matrices that are worth a kernel, outside autograd."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and left.ndim == right.ndim == 2
        and len(left) >= FEWEST_ROWS
        and right.numel() >= LEAST_WEIGHT
        and left.is_contiguous()
        and 1 in right.stride()
        and {type(left), type(right)} <= {Tensor, nn.Parameter}
        and onednn_is_faster()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
    )


def _by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return result
