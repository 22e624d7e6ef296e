"""The language-model head over tiles of positions: what every statistic of a chunked softmax is built on.

The logits of a whole batch never exist: the head is applied to a tile of positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt_losses.products import matmul, product

# A tile of fp32 logits. Matrix products want tall tiles (fp32, V = 32,000, 2 cores: 1,024 positions took 229 ms in
# tiles of 192 and 198 ms in tiles of 384), softmax wants them near the cache.
CPU_TILE_BYTES = 48 * 2**20
DEVICE_TILE_BYTES = 512 * 2**20


@dataclass(frozen=True, eq=False)
class Head:
    """z = softcap * tanh(scale * (W h + b) / softcap); no cap where softcap is None."""

    weight: Tensor
    """(vocab, hidden)."""
    bias: Tensor | None = None
    """(vocab,)."""
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits of a tile, (positions, vocab), fp32 or wider."""
        logits = product(hidden, self.weight.t())
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class HeadGradients:
    """Gradients of a head and of its hidden states, added up over tiles; None where none is needed."""

    def __init__(self, head: Head, hidden: Tensor, dtype: torch.dtype, needed: tuple[bool, bool, bool]) -> None:
        """Start at zero, of the hidden states, the weight and the bias, as `needed` says; summed in `dtype`."""
        self._head = head
        self._inputs = hidden
        needs_hidden, needs_weight, needs_bias = needed
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self._weight = torch.zeros_like(head.weight, dtype=dtype) if needs_weight else None
        self._bias = torch.zeros_like(head.bias, dtype=dtype) if needs_bias and head.bias is not None else None

    def add(self, tile: slice, logits: Tensor, grad: Tensor) -> None:
        """Take d loss / d logits of a tile (positions, vocab) back through the head; overwrites it."""
        head = self._head
        if head.softcap is not None:
            grad *= 1 - (logits / head.softcap) ** 2
        if head.scale != 1.0:
            grad *= head.scale
        if self._bias is not None:
            self._bias += grad.sum(0)
        low = grad.to(self._inputs.dtype)
        if self.hidden is not None:
            self.hidden[tile] = matmul(low, head.weight)
        if self._weight is not None:
            self._weight += product(low.t(), self._inputs[tile])

    @property
    def weight(self) -> Tensor | None:
        """Of the head's weight, in its dtype."""
        return None if self._weight is None else self._weight.to(self._head.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """Of the head's bias, in its dtype."""
        if self._bias is None or self._head.bias is None:
            return None
        return self._bias.to(self._head.bias.dtype)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which the head is multiplied: autocast's where it is on, else that of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def result_dtype(hidden: Tensor) -> torch.dtype:
    """Return fp64 for fp64 hidden states, else fp32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def tile_size(hidden: Tensor, vocab: int, chunk_size: int | None) -> int:
    """Return the positions per tile: `chunk_size`, else what fills a tile on the device of `hidden`."""
    tile_bytes = CPU_TILE_BYTES if hidden.device.type == "cpu" else DEVICE_TILE_BYTES
    return max(16, tile_bytes // (4 * vocab)) if chunk_size is None else chunk_size


def tiles(positions: int, size: int) -> Iterator[slice]:
    """Yield slices of `size` positions, the last one shorter."""
    for start in range(0, positions, size):
        yield slice(start, start + size)
