"""What a process must be told before it multiplies: environment variables that libraries read once."""

from __future__ import annotations

import os

KERNELS_KEPT = 128
"""Kernels of 16-bit products that torch and oneDNN each keep on a CPU. A step of a 26 M model is no slower with so few:
1.20 s, and 1.18 s with the 1,024 of both."""


def settle_process() -> None:
    """Set what the user has not set. It is read once: when torch loads, and at the first 16-bit product.

    So the command line calls this before torch is there, and the loop for those who call it from Python.

    Idle OpenMP threads give up spinning soon: with libgomp's default of milliseconds, training steps of the sandbox on
    two cores shared with other processes took 3 to 10 times as long.

    Few kernels are kept: rows of ever new lengths bring a new one for every shape of product, and torch and oneDNN
    keep 1,024 each with their scratch memory: 740 MiB after 24 steps of a 26 M model, and page faults for every one.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(KERNELS_KEPT))  # torch's, in ideep
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
