"""One command of prefopt in a process of its own, which ends when the sweep that started it is gone.

    python -m prefopt.sweep.child PARENT train recipe.yaml

A sweep that is killed cannot tell its children; left alone they would go on training beside those of the next sweep.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from prefopt.process import TUNABLES, collect_rarely, whole_heap

LOOK_EVERY = 0.3
"""Seconds between two looks at the parent."""


@dataclass
class Child:
    """A running process and its log."""

    process: subprocess.Popen[bytes]
    log: Path
    began_at: int
    """Where this attempt begins in the log, in bytes."""
    started: float

    def code(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self.process.poll()

    def ask_to_stop(self) -> None:
        """Send Ctrl-C: the run saves its state and ends."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def seconds(self) -> float:
        """Return how long it has run."""
        return time.monotonic() - self.started

    def written(self) -> str:
        """Return what this attempt wrote."""
        with self.log.open("rb") as stream:
            stream.seek(self.began_at)
            return stream.read().decode("utf-8", errors="replace")

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def start(command: Sequence[str], log: Path, *, threads: int, environment: Mapping[str, str] | None = None) -> Child:
    """Start `prefopt COMMAND` in a session of its own, so that Ctrl-C reaches it only through the sweep.

    Args:
        command: words after `prefopt`.
        log: takes both streams, after what earlier attempts wrote.
        threads: of the numerical libraries; results on a CPU depend on it.
        environment: variables to set beside these.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        stream.write(f"--- {datetime.now().isoformat(timespec='seconds')} prefopt {' '.join(command)}\n".encode())
        stream.flush()
        began_at = stream.tell()
        process = _popen([sys.executable, "-m", "prefopt.sweep.child", str(os.getpid()), *command], stream, threads,
                         environment or {})  # fmt: skip
    return Child(process, log, began_at, time.monotonic())


def _popen(words: list[str], stream: IO[bytes], threads: int, extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    paths = [path for path in (os.getcwd(), os.environ.get("PYTHONPATH")) if path]  # a recipe's own module:function
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **numbers}
    if tunables := whole_heap(os.environ):
        own[TUNABLES] = tunables
    environment = {**os.environ, **own, **extra}
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, start_new_session=True
    )


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Watch the parent, and run the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    # A background job of a shell ignores Ctrl-C, a thread may block it, and both are inherited.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    collect_rarely()
    from prefopt.cli import main as prefopt

    return prefopt(command)


if __name__ == "__main__":
    raise SystemExit(main())
