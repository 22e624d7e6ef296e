"""Freed memory goes back to the system, and never at the price of the time of a run."""

from __future__ import annotations

import torch

from prefopt import memory
from prefopt.memory import TRIM_SHARE, Trimmer


class Library:
    """A C library whose trimming takes a second of a clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 100.0, 0
        monkeypatch.setattr(memory, "_libc", lambda: self)
        monkeypatch.setattr(memory.time, "perf_counter", lambda: self.now)

    def malloc_trim(self, _):
        self.calls += 1
        self.now += 1.0


def test_memory_is_returned_as_often_as_that_takes_its_share_of_the_time(monkeypatch):
    library = Library(monkeypatch)
    trimmer = Trimmer(torch.device("cpu"))
    for _ in range(1000):
        library.now += 10.0
        trimmer.after_step()
    share = library.calls / (library.now - 100.0)
    assert 0.8 * TRIM_SHARE < share <= TRIM_SHARE


def test_steps_that_take_long_are_all_followed_by_it(monkeypatch):
    library = Library(monkeypatch)
    trimmer = Trimmer(torch.device("cpu"))
    for _ in range(5):
        library.now += 60.0
        trimmer.after_step()
    assert library.calls == 5


def test_other_devices_and_other_c_libraries_are_left_alone(monkeypatch):
    library = Library(monkeypatch)
    Trimmer(torch.device("meta")).after_step()
    monkeypatch.setattr(memory, "_libc", lambda: None)
    Trimmer(torch.device("cpu")).after_step()
    assert not library.calls
