"""Make the next thing while the present one is used: a thread that stays a step or two ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

PATIENCE = 0.1
"""Seconds after which a waiting thread looks whether it is still wanted."""


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


class Ahead(Generic[Item, Made]):
    """Makes items in a thread, in order, at most `bound` of them ahead of the one that is used.

    An error in the thread is raised where its item would have come. The thread ends with the iteration: when it is
    exhausted, when it is left early, and when an interrupt or an error leaves the block that uses it.
    """

    def __init__(self, make: Callable[[Item], Made], items: Iterable[Item], *, bound: int = 2) -> None:
        self._make, self._items = make, items
        # One item is in the thread's hands; the rest of the bound waits in the queue.
        self._ready: queue.Queue[Made | _Failed | type[_End]] = queue.Queue(maxsize=max(1, bound - 1))
        self._unwanted = threading.Event()
        self.thread = threading.Thread(target=self._work, name="prefopt-ahead", daemon=True)

    def __iter__(self) -> Generator[Made, None, None]:
        self.thread.start()
        try:
            while True:
                made = self._next()
                if made is _End:
                    return
                if isinstance(made, _Failed):
                    raise made.error
                yield made  # type: ignore[misc]
        finally:
            self._unwanted.set()
            self.thread.join()

    def _next(self) -> Made | _Failed | type[_End]:
        while True:
            try:  # with a timeout, for a wait without one cannot be interrupted on every system
                return self._ready.get(timeout=PATIENCE)
            except queue.Empty:
                continue

    def _work(self) -> None:
        try:
            for item in self._items:
                if self._unwanted.is_set() or not self._hand_over(self._make(item)):
                    return
        except BaseException as error:
            self._hand_over(_Failed(error))
        else:
            self._hand_over(_End)

    def _hand_over(self, made: Made | _Failed | type[_End]) -> bool:
        """Put something into the queue; False where nobody wants it any more."""
        while not self._unwanted.is_set():
            try:
                self._ready.put(made, timeout=PATIENCE)
            except queue.Full:
                continue
            return True
        return False
