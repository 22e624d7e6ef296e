"""A step's freed memory serves the next one; it goes back to the system only where it has become pieces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prefopt import memory
from prefopt.memory import GROWTH, SPACING, Trimmer, return_memory, unload
from prefopt_losses import workspace


class Library:
    """A C library, and a process whose resident memory the test sets."""

    def __init__(self, monkeypatch):
        self.resident, self.calls, self.options = 1000.0, 0, {}
        monkeypatch.setattr(memory, "_libc", lambda: self)
        monkeypatch.setattr(memory, "_resident", lambda: self.resident)

    def malloc_trim(self, _):
        self.calls += 1

    def mallopt(self, parameter, value):
        self.options[parameter] = value
        return 1


@pytest.fixture
def library(monkeypatch):
    return Library(monkeypatch)


def test_steps_that_need_what_the_first_one_needed_return_nothing(library):
    trimmer = Trimmer(torch.device("cpu"))
    for number in range(200):
        library.resident = 1000 * (1 + 0.99 * (GROWTH - 1) * (number % 7) / 6)
        trimmer.after_step()
    assert library.calls == 0


def test_memory_that_creeps_up_is_bounded(library):
    """Every step leaves 2 % in pieces, which a return takes back."""
    trimmer, most = Trimmer(torch.device("cpu")), 0.0
    for _ in range(400):
        before = library.calls
        trimmer.after_step()
        library.resident = 1000 if library.calls > before else library.resident + 20
        most = max(most, library.resident)
    assert most <= 1000 * GROWTH + SPACING * 20
    assert 400 / 20 < library.calls <= 400 / SPACING


def test_steps_that_need_more_are_not_fought(library):
    """Longer rows raise what a step needs, at the price of one return."""
    trimmer = Trimmer(torch.device("cpu"))
    for number in range(200):
        library.resident = 1000 if number < 100 else 3000
        trimmer.after_step()
    assert library.calls == 1


def test_the_library_itself_returns_nothing_meanwhile(library):
    Trimmer(torch.device("cpu"))
    assert library.options == {memory._MMAP_THRESHOLD: 32 * 2**20, memory._TRIM_THRESHOLD: 2**31 - 1}


def test_the_real_library_takes_these_options():
    library = memory._libc()
    if library is None:
        pytest.skip("no glibc")
    assert library.mallopt(memory._MMAP_THRESHOLD, 32 * 2**20) == 1
    assert library.mallopt(memory._TRIM_THRESHOLD, 2**31 - 1) == 1


def test_a_model_goes_back_at_once_whoever_still_holds_it(library):
    model = nn.BatchNorm1d(8)
    held = [*model.parameters(), *model.buffers()]
    unload(model)
    assert library.calls == 1
    assert sum(each.untyped_storage().nbytes() for each in held) == 0


def test_buffers_of_a_head_go_with_them():
    workspace.give_back(workspace.borrow((4, 1000), torch.float32, torch.device("cpu")))
    assert workspace._free
    return_memory()
    assert not workspace._free


def test_other_devices_and_other_c_libraries_are_left_alone(library, monkeypatch):
    Trimmer(torch.device("meta")).after_step()
    assert not library.options
    monkeypatch.setattr(memory, "_libc", lambda: None)
    Trimmer(torch.device("cpu")).after_step()
    return_memory()
    assert not library.calls
