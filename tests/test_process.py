"""Libraries that read their environment once are told what serves training, unless the user said something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from prefopt import memory
from prefopt.cli import main
from prefopt.process import KERNELS_KEPT, settle_process

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
PRODUCTS_OF_MANY_LENGTHS = """
import ctypes, sys
if sys.argv[1] == "settled":
    from prefopt.process import settle_process
    settle_process()
import torch

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Heap
weight = torch.randn(64, 64, dtype=torch.bfloat16)
for length in range(100, 900):
    torch.randn(length, 64, dtype=torch.bfloat16) @ weight
print(library.mallinfo2().uordblks)
"""


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a test leaves is undone
        monkeypatch.delenv(name)


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    settle_process()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(KERNELS_KEPT)
    assert "GOMP_SPINCOUNT" not in os.environ


def test_every_command_is_told(capsys):
    main(["--version"])
    assert {name: os.environ.get(name) for name in VARIABLES[1:]} == {
        "GOMP_SPINCOUNT": "10000",
        "LRU_CACHE_CAPACITY": str(KERNELS_KEPT),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KERNELS_KEPT),
    }


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="a CPU without 16-bit products")
@pytest.mark.skipif(not hasattr(memory._libc(), "mallinfo2"), reason="no glibc, whose heap is looked at")
def test_kernels_of_ever_new_lengths_do_not_pile_up():
    held = {}
    for how in ("plain", "settled"):
        done = subprocess.run([sys.executable, "-c", PRODUCTS_OF_MANY_LENGTHS, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        held[how] = int(done.stdout)
    assert held["settled"] < held["plain"] / 2  # bytes in use: 158 and 531 million
