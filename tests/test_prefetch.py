"""Made ahead in a thread: the same things in the same order, errors and interrupts included."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from world import make_recipe, quiet

from prefopt.planning import every_comparison
from prefopt.prefetch import Ahead
from prefopt.prepare import prepare
from prefopt.reference.running import open_reference


def others() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefopt-ahead"]


def test_items_come_in_order_from_another_thread():
    made = list(Ahead(lambda item: (item, threading.current_thread().name), range(50)))
    assert made == [(item, "prefopt-ahead") for item in range(50)]
    assert not others()


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_it_is_never_more_than_the_bound_ahead(bound):
    begun: list[int] = []
    for used, item in enumerate(Ahead(lambda item: begun.append(item) or item, range(12), bound=bound)):
        time.sleep(0.01)
        assert item == used
        assert len(begun) <= used + 1 + max(2, bound)  # the one in use, those that wait, the one in its hands
    assert len(begun) == 12


def test_an_error_comes_where_its_item_would_have():
    def make(item):
        if item == 3:
            raise ValueError("no such row")
        return item

    stream = iter(Ahead(make, range(9)))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no such row"):
        next(stream)
    assert not others()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_when_the_block_is_left(interrupt):
    stream = iter(Ahead(lambda item: item, iter(int, 1)))  # without end

    def use():
        try:
            for number, _ in enumerate(stream):
                if number == 3:
                    raise interrupt
        finally:
            stream.close()

    with pytest.raises(interrupt):
        use()
    assert not others()


def test_batches_made_ahead_are_those_made_in_line(tmp_path):
    feed = open_reference(prepare(make_recipe(tmp_path), quiet=True), quiet()).feed("train")
    micros = [[part] for part in every_comparison(feed.dataset)]
    device = torch.device("cpu")
    for ahead, inline in zip(feed.batches(micros, device, ahead=True), feed.batches(micros, device), strict=True):
        assert ahead.keys == inline.keys
        assert torch.equal(ahead.input_ids, inline.input_ids)
        assert torch.equal(ahead.chosen, inline.chosen)
    assert not others()
