"""Memory of the device: how much is free, and how what was freed goes back to the system."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from prefopt_losses import workspace


@cache
def _libc() -> Any:
    """The C library where it is glibc, else None."""
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


GROWTH = 1.1
"""How far above what a step needs resident memory may rise before what is freed goes back to the system."""
SPACING = 8
"""Steps between two returns, at least."""
KEPT_BLOCK = 32 * 2**20
"""Blocks of this size and more go back to the system as soon as they are freed: the most that the C library takes."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameters


class Trimmer:
    """Keeps what a CPU step freed for the next one, and returns it to the system where it has become pieces.

    Memory that went back must be faulted in again, page by page: 260,000 faults and 1.0 of 4.2 s in a step of 2,048
    tokens through 29 M parameters with a return after every step, 54,000 and 0.3 s without, and 12,000 and 0.1 s
    where the C library returns nothing on its own account either. But rows of ever new lengths leave its heap in
    pieces that fit nothing, so resident memory creeps up; it goes back when it stands a tenth above what the first
    step after a return needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._library = _libc() if device.type == "cpu" else None
        self._needed = 0
        self._since = 0
        if self._library is not None:
            self._library.mallopt(_MMAP_THRESHOLD, KEPT_BLOCK)
            self._library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)

    def after_step(self) -> None:
        """Return freed memory if resident memory has grown beyond what a step needs."""
        if self._library is None:
            return
        resident = _resident()
        if self._since == 0:
            self._needed = max(self._needed, resident)
        self._since += 1
        if self._since > SPACING and resident > GROWTH * self._needed:
            self._library.malloc_trim(0)
            self._since = 0


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(psutil.Process().memory_info().rss)


def unload(model: nn.Module) -> None:
    """Return a model's memory, whoever still holds it: it is empty afterwards.

    Looking for garbage would do it too where nobody does, and takes a third of a second once transformers is loaded.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
    return_memory()


def collect_and_return_memory() -> None:
    """Return what an error's traceback held, which holds itself."""
    gc.collect()
    return_memory()


def return_memory() -> None:
    """Return to the accelerator or the system what passes over more tokens than a step has leave behind."""
    workspace.free()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    library = _libc()
    if library is not None:
        library.malloc_trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU within the limit of its container."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, and unused
        return int(torch.cuda.mem_get_info(device)[0]) + held
    limits = [Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current")]
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int(file.read_text()) for file in limits)
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return max(0, min(free, limit - used))
