"""Buffers are used again, never by two at once, and what waits does not grow with every new record of a size."""

from __future__ import annotations

import random

import pytest
import torch

from prefopt_losses import workspace
from prefopt_losses.workspace import MOST_FREE, STEP, borrow, free, give_back

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_workspace():
    free()
    yield
    free()


def waiting() -> list[int]:
    return [each.numel() // STEP for each in workspace._free]


def floats(steps: int) -> tuple[int, ...]:
    """The shape of a buffer of so many steps."""
    return (steps, STEP // 4)


def test_a_buffer_that_came_back_is_lent_again_to_whoever_needs_no_more():
    first = borrow(floats(3), torch.float32, CPU)
    place = first.data_ptr()
    give_back(first)
    assert borrow(floats(2), torch.float32, CPU).data_ptr() == place


def test_nobody_gets_what_somebody_has():
    buffers = [borrow(floats(1), torch.float32, CPU) for _ in range(3)]
    assert len({each.data_ptr() for each in buffers}) == 3


def test_the_smallest_that_fits_is_taken():
    for steps in (8, 2, 4):
        give_back(torch.empty(floats(steps)))
    borrow(floats(3), torch.float32, CPU)
    assert waiting() == [8, 2]


def test_a_larger_one_replaces_the_largest():
    give_back(torch.empty(floats(2)))
    give_back(torch.empty(floats(5)))
    give_back(borrow(floats(6), torch.float32, CPU))
    assert waiting() == [6, 2]


def test_ever_new_records_do_not_pile_up():
    """A head's slopes of ever longer batches beside its two tiles: one buffer of slopes waits, not four."""
    draw = random.Random(0)
    for step in range(200):
        slopes = borrow(floats(10 + step // 10 + draw.randrange(4)), torch.float32, CPU)
        tiles = [borrow(floats(4), torch.float32, CPU) for _ in range(2)]
        for each in (*tiles, slopes):
            give_back(each)
        assert len(waiting()) <= min(3, MOST_FREE)
        assert sum(waiting()) <= 2 * 4 + 10 + step // 10 + 4


def test_other_devices_keep_nothing():
    give_back(torch.empty(3, device="meta"))
    assert waiting() == []
