"""What a process must be told before it multiplies: variables that libraries read once, and when to collect garbage."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Mapping

KERNELS_KEPT = 32
"""Kernels of 16-bit products that torch and oneDNN each keep on a CPU. Every row length has its own, half a megabyte
each, and a pass through the layers needs about a dozen, or 25 with adapters, again and again. With so few, steps of a
26 M model with adapters are no slower than with 128 (three rounds, 1.34, 1.59, 1.69 s and 1.42, 1.38, 1.53), and the
process peaks at 1.00 GiB instead of 1.16: kernels lie between the blocks of the heap and keep them apart."""

TUNABLES = "GLIBC_TUNABLES"
NOTHING_ASIDE = "glibc.malloc.tcache_count=0"
"""glibc puts small blocks aside when they are freed, where they do not merge with their neighbours. torch's blocks are
aligned, so each is cut out of a larger one and leaves a small piece at either end; while that is aside or reused, the
hole that a tensor leaves is too small for the next one of the same size. Without, a bf16 run of a 28 M model, two
processes each, peaks at 1.68 GiB instead of 1.97, with adapters at 1.01 instead of 1.15, at the same speed."""


def start_over_on_a_whole_heap() -> None:
    """Replace this process by itself with a heap whose blocks merge, where the C library is glibc.

    It reads its settings when a process starts, so this must be the first thing a program does: nothing of what it
    did survives, which costs 20 ms. Whoever set something for glibc's small blocks keeps it.
    """
    tunables = whole_heap(os.environ)
    same_user = hasattr(os, "getuid") and os.getuid() == os.geteuid()  # else glibc forgets them, and it would not end
    if tunables is None or not same_user or not sys.executable or len(sys.orig_argv) < 2:
        return
    os.environ[TUNABLES] = tunables
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def whole_heap(environment: Mapping[str, str]) -> str | None:
    """Return glibc's settings for a heap whose blocks merge; None where there is no glibc, or it has been told."""
    given = environment.get(TUNABLES, "")
    if "tcache" in given or "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()):
        return None
    return f"{given}:{NOTHING_ASIDE}" if given else NOTHING_ASIDE


COLLECT_AFTER = 50_000
"""New objects after which Python looks for garbage, 700 by default. Loading torch and transformers makes a million that
stay, and to look through them again and again, and once more at the end, took 2 of the 5.6 seconds of a process that
does nothing else."""


def collect_rarely() -> None:
    """Look for garbage seldom, and not when the process ends: for programs, whose memory the system takes back."""
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)


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
