"""The reference without quantization: which model that is, and whether it can be held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from prefopt.memory import free_memory
from prefopt.models import ModelSource, default_device
from prefopt.reference.identity import model_folder

ROOM = 1.25
"""Memory for a forward pass of one batch without gradient, as a multiple of the weights."""
_GIB = 2**30


def full_precision(source: ModelSource) -> ModelSource:
    """Return the same weights, held and multiplied as the run does with unquantized ones."""
    return replace(source, quantization="none")


def described(source: ModelSource) -> str:
    """Name a source's precision: `float32`, or `bfloat16 products of float32 weights`."""
    held, compute = (str(dtype).removeprefix("torch.") for dtype in (source.dtype, source.compute))
    return held if held == compute else f"{compute} products of {held} weights"


def why_not_held(source: ModelSource) -> str | None:
    """Say why a source cannot be loaded beside nothing else; None where it fits the device's free memory."""
    needed, free = ROOM * _weights_bytes(source), free_memory(default_device())
    if needed <= free:
        return None
    return (
        f"the reference at full precision needs about {needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB of "
        f"{default_device().type} memory are free"
    )


def _weights_bytes(source: ModelSource) -> float:
    """Bytes of the weights in the dtype they are held in, from the files' headers."""
    folder = model_folder(source)
    files = list(folder.glob("*.safetensors"))
    if files:
        return sum(_numbers(file) for file in files) * source.dtype.itemsize
    return sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))


def _numbers(file: Path) -> int:
    def sizes() -> Iterator[int]:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield int(torch.Size(tensors.get_slice(name).get_shape()).numel())

    return sum(sizes())
