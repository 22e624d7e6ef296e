"""Who scores which batch: one append-only file per plan, in which processes say what they take.

A line is short and appended at once, so lines of several processes stand one after the other; of two that name the
same batch the earlier one holds. A claim ends with the batch, with its process, or after its time: whoever waits then
takes over. Nothing depends on claims but work done twice: the first commit of a key wins.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

CLAIM_SECONDS = 600.0
"""How long a claim of a process on another machine holds; a batch takes seconds, its first one minutes at most."""


@dataclass(frozen=True)
class Worker:
    """One of the processes that build together."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def launched(cls) -> Worker:
        """Return who this process is in `torchrun` or `accelerate launch`; alone without them."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def preferred(self, batches: int) -> list[int]:
        """Batches in the order in which this process takes them: every so-many-th, then those of others, last first."""
        own = list(range(self.rank, batches, self.processes))
        return own + [batch for batch in reversed(range(batches)) if batch % self.processes != self.rank]


class Claims:
    """The batches of a plan that processes are at work on."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.me = f"{socket.gethostname().replace(' ', '-')}:{os.getpid()}"

    def take(self, batches: Sequence[int]) -> list[int]:
        """Claim batches; returns those that are this process's now."""
        free = self.free(batches)
        if not free:
            return []
        self._write(time.time() + CLAIM_SECONDS, free)
        holders = self._holders()
        return [batch for batch in free if holders.get(batch, self.me) == self.me]

    def free(self, batches: Sequence[int]) -> list[int]:
        """Return those of the batches that no other living process is at work on."""
        holders = self._holders()
        return [batch for batch in batches if holders.get(batch, self.me) == self.me]

    def others(self) -> int:
        """Count the other processes that are at work."""
        return len(set(self._holders().values()) - {self.me})

    def release(self) -> None:
        """Give up what this process claimed."""
        if self.file.exists():
            self._write(0.0, [])

    def _write(self, until: float, batches: Sequence[int]) -> None:
        line = f"{self.me} {until:.0f} {','.join(map(str, batches))}\n"
        with contextlib.suppress(OSError):  # a claim saves work; without it the commit says what is wrong
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)

    def _holders(self) -> dict[int, str]:
        """Return the living process that first claimed each batch."""
        lines = list(self._lines())
        released = {process: number for number, (process, until, _) in enumerate(lines) if until == 0.0}
        now = time.time()
        holders: dict[int, str] = {}
        alive: dict[str, bool] = {}
        for number, (process, until, batches) in enumerate(lines):
            if number > released.get(process, -1) and until > now and alive.setdefault(process, self._lives(process)):
                for batch in batches:
                    holders.setdefault(batch, process)
        return holders

    def _lines(self) -> Iterator[tuple[str, float, list[int]]]:
        """Yield (process, until when, batches) of every line that reads as one."""
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return
        for line in lines:
            process, _, rest = line.partition(" ")
            until, _, batches = rest.partition(" ")
            with contextlib.suppress(ValueError):  # a torn line claims nothing
                yield process, float(until), [int(batch) for batch in batches.split(",") if batch]

    def _lives(self, process: str) -> bool:
        """Whether a process of this machine lives; one of another machine is believed to, until its time is over."""
        host, _, number = process.rpartition(":")
        if process == self.me or host != self.me.rpartition(":")[0]:
            return True
        try:
            return bool(psutil.Process(int(number)).status() != psutil.STATUS_ZOMBIE)
        except (psutil.NoSuchProcess, ValueError):
            return False
        except psutil.Error:
            return True
