"""What a step must compute: floating-point operations by layout, and the rate at which this machine multiplies.

    forward over T computed tokens with causal area A (sum of squared lengths):  F(T, A) = 2 N T + 2 L d A
    head per scored token:                                                       h = 2 V H

N are the parameters of matrix products without embedding and head, d = heads x head_dim, L layers. A step is k
forwards (3 with all weights trained, 2 with an adapter) and u head products (3 kept, 4 recomputed, one less frozen).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A decoder as its matrix products."""

    parameters: float
    """Of matrix products, without embedding and head."""
    layers: int
    width: int
    """heads x head_dim."""
    vocab: int
    hidden: int

    def forward(self, tokens: float, area: float) -> float:
        """Operations of one forward pass without the head."""
        return 2 * self.parameters * tokens + 2 * self.layers * self.width * area

    def head(self, scored: float) -> float:
        """Operations of one head product."""
        return 2 * self.vocab * self.hidden * scored


Pair = tuple[int, int, int]
"""Tokens of a prompt and of its two completions."""


def naive(shape: Shape, pairs: Iterable[Pair], *, k: float, u: float, reference: bool) -> float:
    """Operations of a step that computes every prompt twice, without padding; `reference` adds its forward pass."""
    pairs = list(pairs)
    tokens = sum(2 * p + c + r for p, c, r in pairs)
    area = sum((p + c) ** 2 + (p + r) ** 2 for p, c, r in pairs)
    scored = sum(c + r for _, c, r in pairs)
    return (k + reference) * shape.forward(tokens, area) + (u + reference) * shape.head(scored)


def shared(shape: Shape, pairs: Iterable[Pair], *, k: float, u: float) -> float:
    """Operations of a step that computes every prompt once and reads the reference from a cache."""
    pairs = list(pairs)
    tokens = sum(p + c + r for p, c, r in pairs)
    area = sum((p + c) ** 2 + (p + r) ** 2 - p**2 for p, c, r in pairs)
    return k * shape.forward(tokens, area) + u * shape.head(sum(c + r for _, c, r in pairs))


def matmul_rate(dtype: torch.dtype, *, seconds: float = 0.4) -> float:
    """Operations per second of the better of two products, each as often as the time allows, at its fastest."""
    best = 0.0
    for rows, inner, columns in ((2048, 512, 1408), (1024, 1024, 1024)):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            left @ right.t()
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best
