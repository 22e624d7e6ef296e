"""Large buffers that are used again on a CPU.

glibc returns blocks of more than 32 MiB to the system when they are freed, and the next ones page-fault: 1,024 x
32,000 logits in fp32 took 217 ms to compute into fresh memory and 183 ms into a buffer that was there. Accelerators
have allocators of their own, so nothing is kept for them.
"""

from __future__ import annotations

import math
from threading import Lock

import torch
from torch import Tensor

MOST_FREE = 4
"""Buffers that wait for their next use, at most: logits, softmax, 16-bit logits and slopes of one head."""

STEP = 8 * 2**20
"""Sizes are rounded up to so many bytes, so that batches of ever new lengths find buffers that fit."""

_free: list[Tensor] = []
_lock = Lock()


def borrow(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised buffer, on a CPU one that was given back where one is large enough.

    Where none is, the largest one that waits is let go.
    """
    count = math.prod(shape)
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = count * dtype.itemsize
    with _lock:
        fitting = [each for each in _free if each.numel() >= size]
        if fitting:
            smallest = min(fitting, key=Tensor.numel)
            _free[:] = [each for each in _free if each is not smallest]
            return smallest[:size].view(dtype).view(shape)
        del _free[:1]  # the largest, which the new one replaces: else ever new records would all wait
    return torch.empty(-(-size // STEP) * STEP, dtype=torch.uint8)[:size].view(dtype).view(shape)


def give_back(buffer: Tensor) -> None:
    """Let the next one have a borrowed buffer; nobody may read it afterwards. Unreturned ones are simply freed."""
    if buffer.device.type != "cpu" or not buffer.numel():
        return
    whole = torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
    with _lock:
        _free.append(whole)
        _free.sort(key=Tensor.numel, reverse=True)
        del _free[MOST_FREE:]


def free() -> None:
    """Let go of every buffer that waits."""
    with _lock:
        _free.clear()
