"""Libraries that read their environment once are told what serves training, unless the user said something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from prefopt import memory
from prefopt.__main__ import program
from prefopt.cli import main
from prefopt.process import KERNELS_KEPT, NOTHING_ASIDE, settle_process, whole_heap

OF_LIBRARIES = ("GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
VARIABLES = ("GLIBC_TUNABLES", "OMP_WAIT_POLICY", *OF_LIBRARIES)
# A process that was told or was not, and looks at its heap.
HEAP = """
import ctypes, sys
from prefopt.process import settle_process, start_over_on_a_whole_heap
if sys.argv[1] == "settled":
    settle_process()
if sys.argv[1] == "whole":
    start_over_on_a_whole_heap()
import torch

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Heap
"""
PRODUCTS_OF_MANY_LENGTHS = """
weight = torch.randn(64, 64, dtype=torch.bfloat16)
for length in range(100, 900):
    torch.randn(length, 64, dtype=torch.bfloat16) @ weight
print(library.mallinfo2().uordblks)
"""
HOLES = """
library.mallopt(-3, 2**25)  # blocks of these sizes lie in the heap
before, small = library.mallinfo2().arena, []
for _ in range(100):
    first, second = torch.empty(175_000), torch.empty(175_000)
    small += [torch.empty(4) for _ in range(20)]
    del first
    again = torch.empty(175_000)
    del second, again
print(library.mallinfo2().arena - before)
"""
GLIBC = pytest.mark.skipif(not hasattr(memory._libc(), "mallinfo2"), reason="no glibc, whose heap is looked at")


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert {name: os.environ.get(name) for name in OF_LIBRARIES} == {
        "GOMP_SPINCOUNT": "10000",
        "LRU_CACHE_CAPACITY": str(KERNELS_KEPT),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KERNELS_KEPT),
    }


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="a CPU without 16-bit products")
@GLIBC
def test_kernels_of_ever_new_lengths_do_not_pile_up():
    settled, plain = (int(python(HEAP + PRODUCTS_OF_MANY_LENGTHS, how)) for how in ("settled", "plain"))
    assert settled < plain / 2  # bytes in use: 158 and 531 million with 128 kept


@GLIBC
def test_holes_that_tensors_leave_are_filled_again():
    whole, plain = (int(python(HEAP + HOLES, how)) for how in ("whole", "plain"))
    assert whole < plain / 4  # bytes that the heap grows by for two tensors of 700,000 at a time: 4 and 71 million


GARBAGE = """
import sys
from prefopt.process import collect_rarely

class Loop:
    def __init__(self):
        self.itself = self
    def __del__(self):
        sys.stdout.write(f"{self.when} ")

if sys.argv[1] == "rarely":
    collect_rarely()
early, Loop.when = Loop(), "early"
del early
many = [[] for _ in range(10_000)]
Loop.when = "at the end"
late = Loop()
del late
"""


def test_a_program_looks_for_garbage_seldom_and_not_when_it_ends():
    assert python(GARBAGE, "as ever") == "early at the end "
    assert python(GARBAGE, "rarely") == ""


@GLIBC
def test_a_program_starts_over_once_as_it_was_called():
    code = (
        "import os, sys; from prefopt.process import start_over_on_a_whole_heap; "
        "print(os.getpid(), flush=True); start_over_on_a_whole_heap(); "
        "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    )
    first, second, told = python(code, "a word", "--flag").splitlines()
    assert first == second
    assert told == f"{NOTHING_ASIDE} ['a word', '--flag']"


@GLIBC
def test_the_program_does_and_a_call_within_another_does_not(monkeypatch):
    started = []
    monkeypatch.setattr("os.execv", lambda *words: started.append(words))
    monkeypatch.setattr("sys.orig_argv", [sys.executable, "-m", "prefopt", "--version"])
    monkeypatch.setattr("sys.argv", ["prefopt", "--version"])
    assert main() == 0
    assert not started
    assert program() == 0
    assert started == [(sys.executable, [sys.executable, "-m", "prefopt", "--version"])]


@GLIBC
def test_what_glibc_was_told_stays():
    assert whole_heap({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}) is None
    assert whole_heap({"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}) == f"glibc.malloc.perturb=1:{NOTHING_ASIDE}"


def test_elsewhere_nothing_is_told(monkeypatch):
    monkeypatch.delattr("os.confstr_names", raising=False)
    assert whole_heap({}) is None
